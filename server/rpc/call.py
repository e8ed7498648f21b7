"""One RPC from its arrival to its end: its status, its metrics, and the count that a graceful stop waits for."""

import asyncio
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import grpc
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from adapters.errors import LorikeetError
from server.errors import ShuttingDown
from server.metrics import Metrics
from server.rpc.status import status_of, unexpected_status

# A client ends its call by its own clock, which began before the server's: with less than this left (seconds), a
# call that is cancelled was late.
CLOCK_SLACK = 0.05

# How long a status may take to leave, in seconds.
ABORT_SECONDS = 0.5

Context = grpc.aio.ServicerContext[Any, Any]


class Calls:
    """The calls in progress. `drain` refuses new ones; `idle` waits for those that run."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        self.metrics = metrics
        self.clock = clock
        self.draining = False
        self._num_active = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def drain(self) -> None:
        self.draining = True
        self.metrics.draining(True)

    async def idle(self) -> None:
        """Returns when no call is in progress."""
        await self._idle.wait()

    def entered(self) -> None:
        self._num_active += 1
        self._idle.clear()

    def left(self) -> None:
        self._num_active -= 1
        if self._num_active == 0:
            self._idle.set()


class Call:
    """One call, entered when its handler starts: `async with Call(…) as call`.

    Whatever leaves the block ends the call with the right status and is counted. What the handler learns on the
    way it sets: `adapter`, the name of the adapter once it is known to exist ("" the base, None not known), and
    `queue_seconds`.
    """

    __slots__ = ("_arrival", "_calls", "_context", "_method", "adapter", "queue_seconds", "write")

    def __init__(self, calls: Calls, method: str, context: Context) -> None:
        self._calls = calls
        self._method = method
        self._context = context
        self._arrival = calls.clock()
        self.adapter: str | None = None
        self.queue_seconds: float | None = None
        self.write = context.write  # sends a message of a stream; waits while the client's window is full

    def metadata(self, key: str) -> str | None:
        """The last value of a metadata key that is not binary; None without."""
        value = None
        for name, text in self._context.invocation_metadata() or ():
            if name == key:
                value = text if isinstance(text, str) else text.decode("ascii", errors="replace")
        return value

    def refuse_if_draining(self) -> None:
        """Raises ShuttingDown when the server is stopping."""
        if self._calls.draining:
            raise ShuttingDown("the server is shutting down and takes no new requests", retry_after=1.0)

    async def __aenter__(self) -> Self:
        self._calls.entered()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            await self._end(error)
        finally:
            self._calls.left()

    async def _end(self, error: BaseException | None) -> None:
        if error is None:
            self._count("OK")
        elif isinstance(error, asyncio.CancelledError) or self._context.done():  # the client left, or time is up
            self._count("DEADLINE_EXCEEDED" if self._is_late() else "CANCELLED")
        elif isinstance(error, grpc.aio.InternalError):  # a message did not go: the client left, or refuses its size
            self._count("CANCELLED")
            raise asyncio.CancelledError from error  # which gRPC takes for an end that needs no status
        elif isinstance(error, LorikeetError):
            self._count(error.code)
            if self.adapter is None:
                self._calls.metrics.rejected(error.reason)
            await self._abort(status_of(error))
        else:
            self._count("INTERNAL")
            await self._abort(unexpected_status(error))

    async def _abort(self, status: Status) -> None:
        """Ends the call with a status. It queues behind messages that the client has yet to read: one that never
        reads gets it never, and is not waited for."""
        try:
            async with asyncio.timeout(ABORT_SECONDS):
                await self._context.abort_with_status(rpc_status.to_status(status))
        except TimeoutError:
            raise asyncio.CancelledError from None

    def _is_late(self) -> bool:
        remaining = self._context.time_remaining()
        return remaining is not None and remaining <= CLOCK_SLACK

    def _count(self, code: str) -> None:
        metrics, seconds = self._calls.metrics, self._calls.clock() - self._arrival
        if self.adapter is None:
            metrics.request_without_adapter(method=self._method, code=code, seconds=seconds)
        else:
            metrics.request_done(
                method=self._method,
                code=code,
                adapter=self.adapter,
                seconds=seconds,
                queue_seconds=self.queue_seconds,
            )
