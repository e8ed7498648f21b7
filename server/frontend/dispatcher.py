"""What the front end knows of the running engine: who waits for which of its messages, and its last snapshot."""

import asyncio
import itertools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

from adapters.errors import LorikeetError
from server.engine.messages import (
    CallDone,
    CallProgress,
    Cancel,
    MergeReport,
    Ready,
    RequestFailed,
    Stats,
    StepOutputs,
    Submit,
    ToEngine,
    ToFrontend,
)
from server.errors import EngineUnavailable, StreamStalled
from server.frontend.engine_errors import EngineErrors
from server.frontend.streams import Stream
from server.frontend.types import OnProgress, Residency, residencies


class EngineMetrics(Protocol):
    """What is counted of the engine; `server.metrics.Metrics` in a real server."""

    def engine_stats(self, stats: Stats, names: Mapping[str, str]) -> None: ...

    def engine_started(self, ready: Ready, pid: int | None = None) -> None: ...

    def engine_restarted(self) -> None: ...


class Adapters(Protocol):
    """Hears what is in memory, and knows the names of digests; `server.frontend.catalog.Catalog` in a server."""

    @property
    def names(self) -> Mapping[str, str]: ...

    def set_resident(self, digests: Collection[str]) -> None: ...


@dataclass(frozen=True, slots=True)
class _Call:
    """A call that waits for its CallDone."""

    answer: asyncio.Future[CallDone]
    on_progress: OnProgress


class Dispatcher:
    """Gives each message of the engine to the stream or call it is for. `send` sends one to the engine, and raises
    EngineUnavailable while there is none; `on_up` hears whether there is one."""

    def __init__(
        self,
        send: Callable[[ToEngine], None],
        on_up: Callable[[bool], None],
        adapters: Adapters,
        metrics: EngineMetrics,
    ) -> None:
        self._send = send
        self._on_up = on_up
        self._adapters = adapters
        self._metrics = metrics
        self._errors = EngineErrors()
        self._ids = itertools.count(1)  # of requests and calls, never used twice
        self._streams: dict[str, Stream] = {}
        self._calls: dict[str, _Call] = {}
        self.info: Ready | None = None
        self.stats: Stats | None = None
        self.residency: dict[str, Residency] = {}

    @property
    def num_streams(self) -> int:
        """Requests that are in the engine, or on their way to it or to their end."""
        return len(self._streams)

    def next_id(self) -> str:
        """An id for a request or call, unique in the life of this process."""
        return f"{next(self._ids):x}"

    def submit(self, message: Submit) -> Stream:
        """Raises EngineUnavailable. `leave` the stream at its end, whatever that is."""
        self._send(message)
        stream = self._streams[message.request_id] = Stream()
        return stream

    def leave(self, request_id: str) -> None:
        """The stream has no reader any more: unless it has ended, its sequence is cancelled."""
        if self._streams.pop(request_id, None) is not None:
            self._cancel(request_id)

    async def call(
        self, message: ToEngine, call_id: str, on_progress: OnProgress = lambda progress: None
    ) -> MergeReport | None:
        """Sends a message, waits for its CallDone and returns the report in it. Raises the error that it carries,
        EngineUnavailable."""
        self._send(message)
        answer: asyncio.Future[CallDone] = asyncio.get_running_loop().create_future()
        self._calls[call_id] = _Call(answer, on_progress)
        try:
            done = await answer
        finally:
            self._calls.pop(call_id, None)
        if done.error is not None:
            raise self._errors(done.error)
        return done.report

    def receive(self, message: ToFrontend) -> None:
        """Takes a message of the engine (any but Ready)."""
        match message:
            case StepOutputs():
                self._receive_step(message)
            case RequestFailed():
                stream = self._streams.pop(message.request_id, None)
                if stream is not None:
                    stream.fail(self._errors(message.error), _now())
            case CallDone():
                call = self._calls.get(message.call_id)
                if call is not None and not call.answer.done():
                    call.answer.set_result(message)
            case CallProgress():
                call = self._calls.get(message.call_id)
                if call is not None:
                    call.on_progress(message)
            case Stats():
                self.stats = message
                self.residency = residencies(message.adapters)
                self._adapters.set_resident(self.residency.keys())
                self._metrics.engine_stats(message, self._adapters.names)

    def _receive_step(self, message: StepOutputs) -> None:
        now, streams = _now(), self._streams
        for output in message.outputs:
            stream = streams.get(output.request_id)
            if stream is not None:  # else it was cancelled, and the engine has not yet heard
                stream.push(output, now)
                if output.finish_reason is not None:
                    del streams[output.request_id]

    def engine_up(self, ready: Ready, pid: int) -> None:
        self.info = ready
        self._metrics.engine_started(ready, pid)
        self._on_up(True)

    def engine_down(self, error: LorikeetError) -> None:
        """Ends every stream and call with EngineUnavailable."""
        self.stats, self.residency = None, {}
        self._adapters.set_resident(())
        self._metrics.engine_restarted()
        self._on_up(False)
        self.fail_all(lambda: EngineUnavailable(f"the engine was lost: {error.message}", retry_after=5.0))

    def fail_all(self, error: Callable[[], LorikeetError]) -> None:
        """Ends every stream and call with an error of its own."""
        streams, self._streams = self._streams, {}
        for request_id, stream in streams.items():
            self._cancel(request_id)
            stream.fail(error(), _now())
        for call in self._calls.values():
            if not call.answer.done():
                call.answer.set_exception(error())

    def fail_stalled(self, timeout: float) -> None:
        """Ends the streams that have waited for their reader for longer than `timeout` seconds."""
        now = _now()
        for request_id, stream in list(self._streams.items()):
            if stream.unread_since is not None and now - stream.unread_since > timeout:
                self.leave(request_id)
                stream.fail(StreamStalled(f"the answer was not read for {timeout:g} seconds"), now)

    def _cancel(self, request_id: str) -> None:
        try:
            self._send(Cancel(request_id))
        except EngineUnavailable:
            return  # and so its sequences are gone


def _now() -> float:
    return asyncio.get_running_loop().time()
