"""The step loop: messages in, plans through the runner, outputs back.

Must hold neither tensors nor queues of its own: sequences are the scheduler's, adapters the cache's.
"""

import logging
import os
import time
from collections import deque
from collections.abc import Iterable
from typing import Protocol

from adapters.errors import InvalidAdapter, LorikeetError
from server.engine.adapter_cache import AdapterCache
from server.engine.messages import (
    AdapterRef,
    CallDone,
    Cancel,
    ErrorPayload,
    LoadAdapter,
    Ready,
    RequestFailed,
    Shutdown,
    Stats,
    StepOutputs,
    Submit,
    ToEngine,
    ToFrontend,
    UnloadAdapter,
)
from server.engine.pages import PageManager
from server.engine.plan import Plan
from server.engine.runner import Runner, StepHandle
from server.engine.scheduler import Scheduler
from server.engine.sequence import Sequence

log = logging.getLogger(__name__)

IDLE_WAIT = 0.5  # seconds between looks at the parent process and the statistics
LOADING_WAIT = 0.002  # seconds between looks at an adapter that is on its way while nothing else runs


class Channel(Protocol):
    """Where messages come from and go to."""

    def receive(self, timeout: float) -> Iterable[ToEngine]: ...

    def send(self, message: ToFrontend) -> None: ...


class Engine:
    """One device's loop. `overlap` is how many steps may be under way while the next is planned: 1 on a GPU,
    where planning hides behind the kernels, 0 on a CPU, where there is nothing to hide behind."""

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        pages: PageManager,
        runner: Runner,
        adapters: AdapterCache,
        channel: Channel,
        ready: Ready,
        memory: dict[str, int],
        overlap: int,
    ) -> None:
        self._scheduler = scheduler
        self._pages = pages
        self._runner = runner
        self._adapters = adapters
        self._channel = channel
        self._memory = memory
        self._overlap = overlap
        self._in_flight: deque[tuple[Plan, StepHandle]] = deque()
        self._load_calls: dict[str, list[str]] = {}  # digest → calls that wait for it
        self._stopping = False
        self.is_busy = False  # else the last step found nothing to run, and only a message or an adapter changes that
        self._last_stats: Stats | None = None
        self._stats_due = 0.0
        self.ready = ready

    def run(self) -> None:
        """Serve until Shutdown comes or the front end is gone."""
        parent = os.getppid()
        self._channel.send(self.ready)
        while not self._stopping and os.getppid() == parent:
            for message in self._channel.receive(self._wait()):
                self.handle(message)
            self.step()
            self._send_stats()
        self._adapters.close()

    def step(self) -> None:
        """Admit arrived adapters; schedule, execute, commit, send."""
        self._poll_adapters()
        plan = self._scheduler.schedule()
        if plan is not None:
            self._in_flight.append((plan, self._runner.execute(plan)))
        self.is_busy = bool(self._in_flight)
        if self._in_flight and (plan is None or len(self._in_flight) > self._overlap):
            done, handle = self._in_flight.popleft()
            outputs = self._scheduler.commit(done, handle.result())
            if outputs:
                self._channel.send(StepOutputs(outputs))

    def handle(self, message: ToEngine) -> None:
        match message:
            case Submit():
                self._submit(message)
            case Cancel():
                self._scheduler.cancel(message.request_id)
            case LoadAdapter():
                self._load(message.call_id, message.adapter)
            case UnloadAdapter():
                self._unload(message)
            case Shutdown():
                self._stopping = True

    def _submit(self, message: Submit) -> None:
        try:
            self._scheduler.add(
                Sequence(
                    request_id=message.request_id,
                    prompt=message.prompt,
                    sampling=message.sampling,
                    stopping=message.stopping,
                    submitted_at=time.monotonic(),
                    adapter=message.adapter,
                )
            )
        except LorikeetError as error:
            self._channel.send(RequestFailed(message.request_id, error_payload(error)))

    def _load(self, call_id: str, adapter: AdapterRef) -> None:
        if self._adapters.is_resident(adapter.digest):
            self._channel.send(CallDone(call_id))
            return
        self._load_calls.setdefault(adapter.digest, []).append(call_id)
        self._adapters.request(adapter)

    def _unload(self, message: UnloadAdapter) -> None:
        try:
            self._adapters.unload(message.digest)
        except LorikeetError as error:
            self._channel.send(CallDone(message.call_id, error_payload(error)))
        else:
            self._report()  # first, so that whoever hears of the end of the call finds the adapter gone
            self._channel.send(CallDone(message.call_id))

    def _poll_adapters(self) -> None:
        if not self._adapters.is_loading:
            return
        arrivals = self._adapters.poll()
        if arrivals.loaded:
            self._report()
        for digest in arrivals.loaded:
            for call_id in self._load_calls.pop(digest, ()):
                self._channel.send(CallDone(call_id))
        for digest, error in arrivals.failed.items():
            log.warning("adapter %s refused: %s", digest, error)
            payload = error_payload(error)
            for call_id in self._load_calls.pop(digest, ()):
                self._channel.send(CallDone(call_id, payload))
            for request_id in self._scheduler.fail_adapter(digest):
                self._channel.send(RequestFailed(request_id, payload))

    def _wait(self) -> float:
        if self.is_busy:
            return 0.0
        return LOADING_WAIT if self._adapters.is_loading else IDLE_WAIT

    def _send_stats(self) -> None:
        if time.monotonic() >= self._stats_due:
            self._report()

    def _report(self) -> None:
        """Send the statistics if they have changed."""
        self._stats_due = time.monotonic() + IDLE_WAIT
        stats = self.stats()
        if stats != self._last_stats:
            self._last_stats = stats
            self._channel.send(stats)

    def stats(self) -> Stats:
        scheduler, pages = self._scheduler, self._pages
        return Stats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            pages_used=pages.num_used,
            pages_total=pages.num_pages,
            adapters=self._adapters.snapshot(),
            memory=self._memory,
            prefix_hit_tokens=scheduler.prefix_hit_tokens,
            prefix_query_tokens=scheduler.prefix_query_tokens,
            preemptions=scheduler.preemptions,
            adapter_loads={"device": self._adapters.num_loads},
            adapter_load_failures=self._adapters.num_failures,
            adapter_evictions={"device": self._adapters.num_evictions},
        )

    def check_integrity(self) -> None:
        """Every page, row and lease is accounted for."""
        self._scheduler.check_integrity()
        self._adapters.check_integrity()


def error_payload(error: LorikeetError) -> ErrorPayload:
    """An error as it crosses to the front end."""
    faults = list(error.faults) if isinstance(error, InvalidAdapter) else []
    return ErrorPayload(error.code, error.reason, error.message, dict(error.metadata), error.retry_after, faults)
