"""The client side of the gRPC contract: a channel, and every failed call as one line that says what to do."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from server.cli.exits import ExitCode, Failure, of_status

MAX_MESSAGE_BYTES = 64 * 1024 * 1024


@contextmanager
def connect(server: str) -> Iterator[grpc.Channel]:
    """A channel to `server` (host:port); a call on it that fails raises Failure, one cancelled KeyboardInterrupt."""
    limits = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]
    with grpc.insecure_channel(server, options=limits) as channel:
        try:
            yield channel
        except grpc.RpcError as error:
            if cast(grpc.Call, error).code() is grpc.StatusCode.CANCELLED:
                raise KeyboardInterrupt from error
            raise _failure(error, server) from error


@contextmanager
def cancelled_by_interrupt(call: grpc.Call) -> Iterator[None]:
    """Ctrl-C cancels the call, in place of raising KeyboardInterrupt.

    That, raised in the midst of gRPC's own waiting for a stream, can leave its threads waiting for each other.
    """
    previous = signal.signal(signal.SIGINT, lambda *_: call.cancel())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _failure(error: grpc.RpcError, server: str) -> Failure:
    call = cast(grpc.Call, error)  # grpc raises errors that are both
    code, message = call.code(), call.details() or ""
    info, retry_after = _details(call)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return Failure(f"{server} did not finish within --timeout; raise it, or ask for less", ExitCode.TIMEOUT)
    if code is grpc.StatusCode.UNAVAILABLE and info is None:  # not the server's own answer
        lost = f"the connection to {server} was lost ({message}); see what `lorikeet serve` says"
        none = f"no server can be reached at {server}; start one with `lorikeet serve`, or name another with --server"
        return Failure(none if "connect" in message else lost, ExitCode.UNAVAILABLE)
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return Failure(f"{server} does not know this call; it is no Lorikeet server, or an older one", ExitCode.FAILURE)
    text = message or code.name
    if retry_after is not None:
        text += f" (try again in {retry_after:g} s)"
    return Failure(text, of_status(code.name))


def _details(call: grpc.Call) -> tuple[error_details_pb2.ErrorInfo | None, float | None]:
    """The ErrorInfo and RetryInfo (in seconds) of a call's google.rpc.Status, each None if absent."""
    status = rpc_status.from_call(call)
    info, retry_after = None, None
    for detail in status.details if status is not None else ():
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo.FromString(detail.value)
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry_after = error_details_pb2.RetryInfo.FromString(detail.value).retry_delay.ToTimedelta().total_seconds()
    return info, retry_after
