"""One server as its load sees it: what it serves, timed streams, and hot swaps. Blocking gRPC, gevent or not."""

import time
from collections.abc import Callable
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from loadtest.draws import Draw
from loadtest.errors import LoadTestFailed
from loadtest.records import Record
from lorikeet.v1 import (
    adapter_pb2,
    adapter_pb2_grpc,
    common_pb2,
    inference_pb2,
    inference_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
)

CALL_SECONDS = 60.0


class Client:
    """A connection of its own to the server at `address` (host:port)."""

    def __init__(self, address: str, clock: Callable[[], float] = time.perf_counter) -> None:
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
        self._channel = grpc.insecure_channel(address, options=options)
        self._inference = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._adapters = adapter_pb2_grpc.AdapterServiceStub(self._channel)
        self._server = server_pb2_grpc.ServerServiceStub(self._channel)
        self._address = address
        self._clock = clock

    def info(self) -> server_pb2.GetServerInfoResponse:
        """Raises LoadTestFailed when no server answers."""
        try:
            return self._server.GetServerInfo(server_pb2.GetServerInfoRequest(), timeout=CALL_SECONDS)
        except grpc.RpcError as error:
            raise LoadTestFailed(f"no server answers at {self._address}: {code_of(error)}") from error

    def adapter_names(self, count: int) -> list[str]:
        """The first `count` by name. Raises LoadTestFailed where there are fewer."""
        names: list[str] = []
        token = ""
        while len(names) < count:
            request = adapter_pb2.ListAdaptersRequest(page_size=min(1000, count - len(names)), page_token=token)
            page = self._adapters.ListAdapters(request, timeout=CALL_SECONDS)
            names += [adapter.name for adapter in page.adapters]
            token = page.next_page_token
            if not token:
                break
        if len(names) < count:
            raise LoadTestFailed(f"the scenario wants {count} adapters, the server has {len(names)}")
        return names

    def run(self, draw: Draw, due: float, timeout: float) -> Record:
        """Play one request to its end. A failure is in the record; so is an answer that is not what was asked for."""
        record = Record(draw.adapter, due)
        digests = set()
        try:
            for piece in self._inference.StreamGenerate(request_of(draw), timeout=timeout):
                digests.add(piece.adapter_digest)
                if piece.token_ids:
                    record.arrivals.append((self._clock(), len(piece.token_ids)))
        except grpc.RpcError as error:
            record.ended = self._clock()  # before the status is taken apart
            record.code, (record.reason, record.retry_after) = code_of(error), details_of(error)
            return record
        record.ended = self._clock()
        if len(digests) != 1 or bool(draw.adapter) != any(digests):
            record.code, record.reason = "WRONG_ADAPTER", f"{len(digests)} digests"
        elif record.num_tokens != draw.max_tokens:
            record.code, record.reason = "WRONG_LENGTH", ""
        return record

    def swap(self, adapter: str, action: str) -> Record:
        """Change an adapter under traffic; `action` as in `Swap`."""
        record = Record(adapter, self._clock())
        try:
            if action == "rollback":
                request = adapter_pb2.RollbackAdapterLabelRequest(name=adapter)
                self._adapters.RollbackAdapterLabel(request, timeout=CALL_SECONDS)
            else:
                drain = adapter_pb2.UNLOAD_MODE_DRAIN
                unload = adapter_pb2.UnloadAdapterRequest(adapter_id=adapter, mode=drain)
                self._adapters.UnloadAdapter(unload, timeout=CALL_SECONDS)
                load = adapter_pb2.LoadAdapterRequest(adapter_id=adapter)
                self._adapters.LoadAdapter(load, timeout=CALL_SECONDS)
        except grpc.RpcError as error:
            record.code, (record.reason, record.retry_after) = code_of(error), details_of(error)
        record.ended = self._clock()
        return record

    def load(self, adapter: str) -> None:
        """Have an adapter in memory before it is asked for. Raises LoadTestFailed."""
        try:
            self._adapters.LoadAdapter(adapter_pb2.LoadAdapterRequest(adapter_id=adapter), timeout=CALL_SECONDS)
        except grpc.RpcError as error:
            raise LoadTestFailed(f"{adapter} cannot be loaded: {code_of(error)} {details_of(error)[0]}") from error

    def close(self) -> None:
        self._channel.close()


def request_of(draw: Draw) -> inference_pb2.StreamGenerateRequest:
    """Greedy, and as long as was drawn whatever the model says."""
    return inference_pb2.StreamGenerateRequest(
        adapter_id=draw.adapter,
        token_ids=common_pb2.TokenIds(ids=draw.prompt),
        sampling=common_pb2.Sampling(temperature=0.0),
        stopping=common_pb2.Stopping(max_tokens=draw.max_tokens, ignore_eos=True),
    )


def code_of(error: grpc.RpcError) -> str:
    """The name of its status code."""
    call: Any = error  # a call's error is the call
    return str(call.code().name)


def details_of(error: grpc.RpcError) -> tuple[str, float | None]:
    """ErrorInfo's reason, and RetryInfo's delay in seconds; "" and None where the status has none, as that of a server
    that is not there."""
    call: Any = error
    status = rpc_status.from_call(call)
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    reason, after = "", None
    for detail in status.details if status is not None else ():
        if detail.Unpack(info):
            reason = str(info.reason)
        elif detail.Unpack(retry):
            after = float(retry.retry_delay.ToTimedelta().total_seconds())
    return reason, after
