"""The step loop: messages in, plans through the runner, outputs back.

Must hold neither tensors nor queues of its own: sequences are the scheduler's, adapters the cache's.
"""

import logging
import os
import time
from collections import defaultdict, deque
from collections.abc import Iterable
from typing import Protocol

import msgspec

from adapters.errors import LorikeetError
from server.engine.adapter_cache import AdapterCache
from server.engine.loading import Progress
from server.engine.merged_serving import MergedServing
from server.engine.messages import (
    CallDone,
    CallProgress,
    Cancel,
    ErrorPayload,
    LoadAdapter,
    MergeAdapter,
    Ready,
    RequestFailed,
    Shutdown,
    Stats,
    StepOutputs,
    Submit,
    ToEngine,
    ToFrontend,
    UnloadAdapter,
    UnmergeAdapter,
    UnpinAdapter,
)
from server.engine.pages import PageManager
from server.engine.plan import Plan
from server.engine.runner import Runner, StepHandle
from server.engine.scheduler import Scheduler
from server.engine.sequence import Sequence
from server.errors import LoadCancelled
from server.lora.pace import Pace

log = logging.getLogger(__name__)

IDLE_WAIT = 0.5  # seconds between looks at the parent process and the statistics
LOADING_WAIT = 0.02  # seconds between looks at a load or a merge while nothing else runs; loaders wake the loop


class Channel(Protocol):
    """Where messages come from and go to."""

    def receive(self, timeout: float) -> Iterable[ToEngine]: ...

    def wake(self) -> None:
        """End the wait of `receive`, or the next one; from any thread."""
        ...

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
        merged: MergedServing,
        channel: Channel,
        ready: Ready,
        memory: dict[str, int],
        pace: Pace,
        overlap: int,
    ) -> None:
        self._scheduler = scheduler
        self._pages = pages
        self._runner = runner
        self._adapters = adapters
        self._merged = merged
        self._channel = channel
        self._memory = memory
        self._pace = pace
        self._overlap = overlap
        self._in_flight: deque[tuple[Plan, StepHandle]] = deque()
        self._load_calls: defaultdict[str, list[str]] = defaultdict(list)  # digest → calls that wait for it
        self._unload_calls: defaultdict[str, list[str]] = defaultdict(list)
        self._stopping = False
        self.is_busy = False  # else the last step found nothing to run, and only a message or an adapter changes that
        self._last_stats: Stats | None = None
        self._stats_due = 0.0
        self.ready = ready

    def run(self, parent: int) -> None:
        """Serve until Shutdown comes or the front end, which has the process id `parent`, is gone."""
        self._channel.send(self.ready)
        while not self._stopping and os.getppid() == parent:
            for message in self._channel.receive(self._wait()):
                self.handle(message)
            self.step()
            self._send_stats()
        self._adapters.close()

    def step(self) -> None:
        """Admit arrived adapters, go on with a merge; schedule, execute, commit, send."""
        self._poll_adapters()
        self._advance_merge()
        plan = self._scheduler.schedule()
        if plan is not None:
            self._in_flight.append((plan, self._runner.execute(plan)))
        self.is_busy = self._pace.is_busy = bool(self._in_flight)
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
                self._load(message)
            case UnloadAdapter():
                self._unload(message)
            case UnpinAdapter():
                self._adapters.unpin(message.digest)
                self._end_calls([message.call_id])
            case MergeAdapter() | UnmergeAdapter():
                self._merge(message)
            case Shutdown():
                self._stopping = True

    def _submit(self, message: Submit) -> None:
        if message.adapter is not None:
            self._adapters.count_lookup(message.adapter.digest)
        try:
            self._merged.check("" if message.adapter is None else message.adapter.digest)
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
            self._channel.send(RequestFailed(message.request_id, ErrorPayload.of(error)))

    def _load(self, message: LoadAdapter) -> None:
        try:
            is_resident = self._adapters.load(message.adapter, message.pin)
        except LorikeetError as error:
            self._end_calls([message.call_id], error)
            return
        if is_resident:
            self._end_calls([message.call_id])
        else:
            self._load_calls[message.adapter.digest].append(message.call_id)
            self._tell(self._adapters.progress(message.adapter.digest))

    def _unload(self, message: UnloadAdapter) -> None:
        digest = message.digest
        try:
            is_gone = self._adapters.unload(digest, message.drain)
        except LorikeetError as error:
            self._end_calls([message.call_id], error)
            return
        cancelled = LoadCancelled(f"adapter {digest} was unloaded while it was being loaded")
        self._end_calls(self._load_calls.pop(digest, []), cancelled)
        self._merged.load_failed(digest, cancelled)
        if is_gone:
            self._end_calls([*self._unload_calls.pop(digest, []), message.call_id])
        else:
            self._unload_calls[digest].append(message.call_id)
            self._channel.send(CallProgress(message.call_id, "draining"))

    def _merge(self, message: MergeAdapter | UnmergeAdapter) -> None:
        try:
            if isinstance(message, MergeAdapter):
                self._merged.merge(message)
                if self._adapters.is_on_its_way(message.adapter.digest):
                    self._tell(self._adapters.progress(message.adapter.digest))
            else:
                self._merged.unmerge(message)
        except LorikeetError as error:
            self._end_calls([message.call_id], error)

    def _advance_merge(self) -> None:
        """Take the merge that is under way a step on, and send what came of that and of calls since."""
        self._merged.advance()
        messages = self._merged.take()
        if any(isinstance(message, CallDone) for message in messages):
            self._report()
        for message in messages:
            self._channel.send(message)

    def _end_calls(self, call_ids: list[str], error: LorikeetError | None = None) -> None:
        if call_ids:
            self._report()  # first, so that whoever hears of the end of a call finds what it changed
        for call_id in call_ids:
            self._channel.send(CallDone(call_id, None if error is None else ErrorPayload.of(error)))

    def _poll_adapters(self) -> None:
        if not self._adapters.is_loading:
            return
        arrivals = self._adapters.poll()
        for progress in arrivals.progress:
            self._tell(progress)
        if arrivals.loaded:
            self._report()
        for digest in arrivals.loaded:
            self._end_calls(self._load_calls.pop(digest, []), arrivals.unpinned.get(digest))
        for digest in arrivals.unloaded:
            self._end_calls(self._unload_calls.pop(digest, []))
        for digest, error in arrivals.failed.items():
            log.warning("adapter %s refused: %s", digest, error)
            self._end_calls(self._load_calls.pop(digest, []), error)
            self._merged.load_failed(digest, error)
            for request_id in self._scheduler.fail_adapter(digest):
                self._channel.send(RequestFailed(request_id, ErrorPayload.of(error)))

    def _tell(self, progress: Progress) -> None:
        for call_id in (*self._load_calls.get(progress.digest, ()), *self._merged.calls_for_load(progress.digest)):
            self._channel.send(CallProgress(call_id, progress.stage.value, 0, progress.num_bytes))

    def _wait(self) -> float:
        if self.is_busy or self._merged.is_writing:
            return 0.0
        return LOADING_WAIT if self._adapters.is_loading or self._merged.is_under_way else IDLE_WAIT

    def _send_stats(self) -> None:
        if time.monotonic() >= self._stats_due:
            self._report()

    def _report(self) -> None:
        """Send the statistics if they have changed."""
        self._stats_due = time.monotonic() + IDLE_WAIT
        stats, load_times = self.stats(), self._adapters.take_load_times()
        if stats != self._last_stats or load_times:
            self._last_stats = stats
            self._channel.send(msgspec.structs.replace(stats, adapter_load_times=load_times))

    def stats(self) -> Stats:
        """All but the times of loads, which are told once."""
        scheduler, pages, counters = self._scheduler, self._pages, self._adapters.counters
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
            adapter_load_failures=dict(counters.failures),
            adapter_loads=dict(counters.loads),
            adapter_hits=dict(counters.hits),
            adapter_misses=dict(counters.misses),
            adapter_evictions=self._adapters.evictions,
            adapter_bytes=self._adapters.used_bytes,
            merges=self._merged.num_merges,
            unmerges=self._merged.num_unmerges,
            merge_held_bytes=self._merged.held_bytes,
            served=dict(scheduler.served),
            waiting_by_adapter=scheduler.waiting_by_adapter,
            retry_after=scheduler.retry_after,
        )

    def check_integrity(self) -> None:
        """Every page, row and lease is accounted for."""
        self._scheduler.check_integrity()
        self._adapters.check_integrity()
