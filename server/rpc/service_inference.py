"""InferenceService: generations, whole or streamed."""

import asyncio
from collections.abc import Mapping
from contextlib import aclosing

from google.protobuf.message import Message

from lorikeet.v1 import inference_pb2
from server.errors import InvalidRequest, StreamStalled
from server.frontend.types import Delta, GenerateRequest
from server.rpc import convert
from server.rpc.backend import Backend
from server.rpc.call import Call
from server.rpc.handlers import Method

DESCRIPTOR = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"]

ADAPTER_METADATA = "x-adapter"


class InferenceService:
    """Passes requests down and deltas up. A call that ends early closes its generation, wherever it stands; so
    does a client that does not read its stream for `stall_timeout` seconds."""

    def __init__(self, backend: Backend, stall_timeout: float) -> None:
        self._backend = backend
        self._stall_timeout = stall_timeout

    @property
    def methods(self) -> Mapping[str, Method]:
        return {"Generate": self.generate, "StreamGenerate": self.stream_generate}

    async def generate(self, message: inference_pb2.GenerateRequest, call: Call) -> Message:
        request = _request(message, call)
        deltas: list[Delta] = []
        async with aclosing(self._backend.generate(request)) as generation:
            async for delta in generation:
                call.add(delta)
                deltas.append(delta)
        return convert.whole_response(deltas, request.request_id)

    async def stream_generate(self, message: inference_pb2.StreamGenerateRequest, call: Call) -> None:
        request = _request(message, call)
        request_id = request.request_id
        async with aclosing(self._backend.generate(request)) as generation:
            async for delta in generation:
                call.add(delta)
                await self._send(convert.stream_response(delta, request_id), call)

    async def _send(self, message: Message, call: Call) -> None:
        """Waits while the client's window is full. Raises StreamStalled when it stays so."""
        try:
            async with asyncio.timeout(self._stall_timeout):
                await call.write(message)
        except TimeoutError:
            raise StreamStalled(f"the stream was not read for {self._stall_timeout:g} seconds") from None


def _request(message: convert.AnyGenerateRequest, call: Call) -> GenerateRequest:
    """Raises InvalidRequest; also for an adapter in the metadata that is not the request's."""
    record = call.record
    if record.metadata.get(ADAPTER_METADATA, message.adapter_id) != message.adapter_id:
        raise InvalidRequest("adapter_id", f"differs from the adapter in the metadata key {ADAPTER_METADATA}")
    request = convert.generate_request(message, record.request_id)
    call.begin(request)
    return request
