"""One RPC from its arrival to its end: its status, its metrics, who hears of it, and the count that a graceful stop
waits for."""

import asyncio
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import grpc
from google.protobuf.message import Message
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from adapters.errors import LorikeetError
from adapters.ids import parse_adapter_id
from server.errors import AnswerTooLarge, ShuttingDown
from server.frontend.types import Delta, GenerateRequest
from server.metrics import Metrics
from server.rpc.record import REQUEST_ID_METADATA, CallRecord, Generation, Observer, request_id_of
from server.rpc.status import status_of, unexpected

# A client ends its call by its own clock, which began before the server's, and gRPC's core sends a timeout that is
# longer by up to a hundredth (it rounds up) and three more (it sends an earlier one again, as one byte): with less than
# this left, in seconds and of the whole time, a call that is cancelled was late.
# https://github.com/grpc/grpc/blob/master/src/core/ext/transport/chttp2/transport/hpack_encoder.cc
CLOCK_SLACK = 0.05
TIMEOUT_SLACK = 0.04

# How long a status may take to leave, in seconds.
ABORT_SECONDS = 0.5

Context = grpc.aio.ServicerContext[Any, Any]


class Calls:
    """The calls in progress. `drain` refuses new ones; `idle` waits for those that run. The observers hear of each when
    it has ended, in their order; with `keeps_texts` its record has what was generated. No answer has more than
    `max_message_bytes`."""

    def __init__(
        self,
        metrics: Metrics,
        observers: Sequence[Observer] = (),
        *,
        keeps_texts: bool = False,
        max_message_bytes: int = 4 * 1024 * 1024,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.metrics = metrics
        self.keeps_texts = keeps_texts
        self.max_message_bytes = max_message_bytes
        self.clock = clock
        self._observers = tuple(observers)
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

    def ended(self, record: CallRecord) -> None:
        """Counts it, and tells the observers."""
        _count(self.metrics, record)
        for observer in self._observers:
            observer.ended(record)


class Call:
    """One call, entered when its handler starts: `async with Call(…) as call`.

    Whatever leaves the block ends the call with the right status, and once: it is counted, and the observers hear of
    it. What the handler learns on the way it puts into `record`.
    """

    __slots__ = ("_arrival", "_calls", "_context", "record", "write")

    def __init__(self, calls: Calls, service: str, method: str, context: Context) -> None:
        self._calls = calls
        self._context = context
        self._arrival = calls.clock()
        texts = ((key, value) for key, value in context.invocation_metadata() or () if isinstance(value, str))
        metadata = dict(texts)
        self.record = CallRecord(service, method, metadata, request_id_of(metadata))
        self.write = context.write  # sends a message of a stream; waits while the client's window is full

    def begin(self, request: GenerateRequest) -> None:
        """It is a generation, and well formed."""
        self.record.request_id = request.request_id
        self.record.generation = Generation(request, [] if self._calls.keeps_texts else None)

    def add(self, delta: Delta) -> None:
        """What is new of a generation that has begun. On the path of every token."""
        record = self.record
        generation = record.generation
        assert generation is not None, "a delta of a generation that has not begun"
        if generation.first_token is None:
            adapter_id = generation.request.adapter_id
            record.adapter = parse_adapter_id(adapter_id).name if adapter_id else ""
            record.digest = delta.adapter_digest
        generation.add(delta, self._elapsed)

    def refuse_if_draining(self) -> None:
        """Raises ShuttingDown when the server is stopping."""
        if self._calls.draining:
            raise ShuttingDown("the server is shutting down and takes no new requests", retry_after=1.0)

    def check_size(self, answer: Message) -> None:
        """Of a whole answer, while the call can still end otherwise. Raises AnswerTooLarge."""
        size, limit = answer.ByteSize(), self._calls.max_message_bytes
        if size > limit:
            raise AnswerTooLarge(f"the answer has {size} bytes, the limit is {limit}; stream it, or ask for less")

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
            self._context.set_trailing_metadata(self._trailing())
            self._ended("OK")
        elif isinstance(error, asyncio.CancelledError) or self._context.done():  # the client left, or time is up
            self._ended("DEADLINE_EXCEEDED" if self._is_late() else "CANCELLED")
        elif isinstance(error, grpc.aio.InternalError):  # a message did not go: the client left, or refuses its size
            self._ended("CANCELLED")
            raise asyncio.CancelledError from error  # which gRPC takes for an end that needs no status
        else:
            public = error if isinstance(error, LorikeetError) else unexpected(error)
            self._ended(public.code, public)
            if public is error and self.record.adapter is None:
                self._calls.metrics.rejected(public.reason)
            await self._abort(status_of(public))

    async def _abort(self, status: Status) -> None:
        """Ends the call with a status. It queues behind messages that the client has yet to read: one that never
        reads gets it never, and is not waited for."""
        sent = rpc_status.to_status(status)
        trailing = (*sent.trailing_metadata, *self._trailing())
        try:
            async with asyncio.timeout(ABORT_SECONDS):
                await self._context.abort(sent.code, sent.details, trailing)
        except TimeoutError:
            raise asyncio.CancelledError from None

    def _trailing(self) -> tuple[tuple[str, str]]:
        return ((REQUEST_ID_METADATA, self.record.request_id),)

    def _elapsed(self) -> float:
        return self._calls.clock() - self._arrival

    def _is_late(self) -> bool:
        remaining = self._context.time_remaining()
        return remaining is not None and remaining <= CLOCK_SLACK + TIMEOUT_SLACK * (self._elapsed() + remaining)

    def _ended(self, code: str, error: LorikeetError | None = None) -> None:
        record = self.record
        record.code, record.seconds, record.error = code, self._elapsed(), error
        self._calls.ended(record)


def _count(metrics: Metrics, record: CallRecord) -> None:
    if record.adapter is None:
        metrics.request_without_adapter(method=record.method, code=record.code, seconds=record.seconds)
        return
    timings = record.generation.timings if record.generation is not None else None
    metrics.request_done(
        method=record.method,
        code=record.code,
        adapter=record.adapter,
        seconds=record.seconds,
        queue_seconds=None if timings is None else timings.queue,
    )
