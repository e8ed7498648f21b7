"""A server that computes nothing: every request has its tokens at once, or one each `interval` seconds.

    python -m loadtest.echo [--interval SECONDS] [--refuse-every N]

What a load test measures against it is what Locust, gRPC and this machine take by themselves. Prints its port.
"""

import argparse
import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from grpc_status import rpc_status

from lorikeet.v1 import adapter_pb2, common_pb2, inference_pb2, server_pb2
from server.errors import ServerBusy
from server.rpc.status import status_of

NUM_ADAPTERS = 1000
VOCAB_SIZE = 32_000

Context = grpc.aio.ServicerContext[Any, Any]


class Echo:
    """Adapters a0000, a0001, … that are all the same."""

    def __init__(self, interval: float, refuse_every: int) -> None:
        self._interval = interval
        self._refuse_every = refuse_every
        self._num_requests = 0

    async def stream_generate(
        self, request: inference_pb2.StreamGenerateRequest, context: Context
    ) -> AsyncIterator[inference_pb2.StreamGenerateResponse]:
        self._num_requests += 1
        if self._refuse_every and self._num_requests % self._refuse_every == 0:
            await context.abort_with_status(rpc_status.to_status(status_of(ServerBusy("an echo", retry_after=1.0))))
        digest = f"sha256:{request.adapter_id}" if request.adapter_id else ""
        loop = asyncio.get_running_loop()
        began, count = loop.time(), request.stopping.max_tokens
        for i in range(count):
            if i and self._interval:
                await asyncio.sleep(began + i * self._interval - loop.time())
            is_last = i + 1 == count
            reason = common_pb2.FINISH_REASON_LENGTH if is_last else common_pb2.FINISH_REASON_UNSPECIFIED
            yield inference_pb2.StreamGenerateResponse(
                text=" a", token_ids=[i + 100], adapter_digest=digest, finish_reason=reason
            )

    async def list_adapters(
        self, request: adapter_pb2.ListAdaptersRequest, context: Context
    ) -> adapter_pb2.ListAdaptersResponse:
        names = (f"a{i:04d}" for i in range(min(request.page_size, NUM_ADAPTERS)))
        return adapter_pb2.ListAdaptersResponse(adapters=[adapter_pb2.Adapter(name=name) for name in names])

    async def unload_adapter(
        self, request: adapter_pb2.UnloadAdapterRequest, context: Context
    ) -> adapter_pb2.UnloadAdapterResponse:
        return adapter_pb2.UnloadAdapterResponse()

    async def load_adapter(
        self, request: adapter_pb2.LoadAdapterRequest, context: Context
    ) -> adapter_pb2.LoadAdapterResponse:
        return adapter_pb2.LoadAdapterResponse()

    async def get_server_info(
        self, request: server_pb2.GetServerInfoRequest, context: Context
    ) -> server_pb2.GetServerInfoResponse:
        return server_pb2.GetServerInfoResponse(base=server_pb2.BaseModel(name="echo", vocab_size=VOCAB_SIZE))

    def handlers(self) -> list[grpc.GenericRpcHandler]:
        """The methods that a load test calls, and no others."""
        stream = grpc.unary_stream_rpc_method_handler(
            self.stream_generate,
            inference_pb2.StreamGenerateRequest.FromString,
            inference_pb2.StreamGenerateResponse.SerializeToString,
        )
        adapters = {
            "ListAdapters": _unary(self.list_adapters, adapter_pb2.ListAdaptersRequest),
            "LoadAdapter": _unary(self.load_adapter, adapter_pb2.LoadAdapterRequest),
            "UnloadAdapter": _unary(self.unload_adapter, adapter_pb2.UnloadAdapterRequest),
        }
        info = {"GetServerInfo": _unary(self.get_server_info, server_pb2.GetServerInfoRequest)}
        return [
            grpc.method_handlers_generic_handler("lorikeet.v1.InferenceService", {"StreamGenerate": stream}),
            grpc.method_handlers_generic_handler("lorikeet.v1.AdapterService", adapters),
            grpc.method_handlers_generic_handler("lorikeet.v1.ServerService", info),
        ]


def _unary(function: Callable[[Any, Context], Awaitable[Any]], request: Any) -> "grpc.RpcMethodHandler[Any, Any]":
    return grpc.unary_unary_rpc_method_handler(function, request.FromString, lambda answer: answer.SerializeToString())


async def serve(interval: float, refuse_every: int) -> None:
    """Until cancelled."""
    server = grpc.aio.server()
    echo = Echo(interval, refuse_every)
    server.add_generic_rpc_handlers(echo.handlers())
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interval", type=float, default=0.0)
    parser.add_argument("--refuse-every", type=int, default=0, metavar="N", help="refuse each N-th request as if full")
    options = parser.parse_args()
    asyncio.run(serve(options.interval, options.refuse_every))


if __name__ == "__main__":
    main()
