"""Which adapter is in the base's weights, and the way there and back under traffic. Touches no tensor.

    merge    LOADING → DRAINING → WRITING → merged
    unmerge            DRAINING → WRITING → not

While it drains, the sequences that were there when it began run on to their end, those that come wait, and after
`drain_seconds` it is given up. It writes one product a step, so that messages are read in between. Half-written weights
are seen by nobody: no sequence runs, and the adapters' canary, which runs the model too, has to wait for its turn.

Once merged, sequences of that adapter run as the base does. Others are refused, or *compensated*: the merged adapter's
rows, with their sign changed, are one more low-rank term of theirs.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum

from adapters.errors import LorikeetError
from server.engine.adapter_cache import AdapterCache
from server.engine.merging import BaseMerger
from server.engine.messages import (
    CallDone,
    CallProgress,
    ErrorPayload,
    MergeAdapter,
    MergeReport,
    RequestFailed,
    Serving,
    ToFrontend,
    UnmergeAdapter,
)
from server.engine.scheduler import Scheduler
from server.engine.sequence import Sequence
from server.errors import BaseMerged, MergeAborted
from server.lora.pace import Pace
from server.lora.pool import AdapterPool, Ranges

RETRY_AFTER = 1.0  # seconds


class Stage(Enum):
    """Where a merge or an unmerge is."""

    LOADING = "loading"
    DRAINING = "draining"
    WRITING = "merging"


@dataclass(slots=True)
class _Job:
    """One merge (of `message`) or unmerge (None) under way, and the calls that wait for it."""

    digest: str
    message: MergeAdapter | None
    drain_seconds: float
    stage: Stage
    calls: list[str]
    deadline: float = 0.0  # of the draining
    steps: Iterator[tuple[int, int] | MergeReport] = field(default_factory=lambda: iter(()))
    report: MergeReport | None = None


class MergedServing:
    """The base's state, and at most one job that changes it. All methods belong to the step loop's thread.

    While weights are written it is its turn at `pace`, and no loader's. `compensates`: others than the merged adapter
    are served, too. What is to be sent waits for `take`.
    """

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        adapters: AdapterCache,
        pool: AdapterPool,
        merger: BaseMerger,
        pace: Pace,
        compensates: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._scheduler = scheduler
        self._adapters = adapters
        self._pool = pool
        self._merger = merger
        self._pace = pace
        self._compensates = compensates
        self._clock = clock
        self._job: _Job | None = None
        self._outbox: list[ToFrontend] = []
        self.num_merges = 0
        self.num_unmerges = 0

    @property
    def digest(self) -> str | None:
        """The merged adapter's; None while the base has its own weights."""
        return self._scheduler.merged

    @property
    def held_bytes(self) -> int:
        """Host memory that keeps the base's own weights."""
        return self._merger.held_bytes

    @property
    def is_under_way(self) -> bool:
        return self._job is not None

    @property
    def is_writing(self) -> bool:
        return self._job is not None and self._job.stage is Stage.WRITING

    def calls_for_load(self, digest: str) -> tuple[str, ...]:
        """The calls that wait for an adapter's load, to be told how far it is."""
        job = self._job
        return tuple(job.calls) if job is not None and job.stage is Stage.LOADING and job.digest == digest else ()

    def take(self) -> list[ToFrontend]:
        """What is to be sent, once."""
        taken, self._outbox = self._outbox, []
        return taken

    # What sequences ask

    def check(self, digest: str) -> None:
        """Raises BaseMerged for a sequence of an adapter (or "", the base) that is not served now. While the weights
        are about to change it waits, and is looked at when they have."""
        if self._job is None and self._refuses and digest != self.digest:
            raise self._base_merged()

    def rows_of(self, seq: Sequence) -> Ranges | None:
        """The pool rows of a sequence's low-rank term; None for no term."""
        own = None if seq.adapter is None else self._adapters.rows(seq.digest)
        if seq.merged is None:
            return own
        if seq.serving is Serving.MERGED:
            return None
        return self._adapters.rows(seq.merged) + (own or ())

    # What calls ask

    def merge(self, message: MergeAdapter) -> None:
        """Begin, or join a merge of the same adapter that is under way. Raises BaseMerged while another adapter is
        merged, MergeAborted while something else is under way, and what loading raises."""
        digest, job = message.adapter.digest, self._job
        if job is not None:
            if job.message is None or job.digest != digest:
                raise MergeAborted("another merge or unmerge is under way; try again", retry_after=RETRY_AFTER)
            job.calls.append(message.call_id)
        elif self.digest == digest:
            self._outbox.append(CallDone(message.call_id))
        elif self.digest is not None:
            raise self._base_merged()
        else:
            self._adapters.load(message.adapter)
            self._job = _Job(digest, message, message.drain_seconds, Stage.LOADING, [message.call_id])

    def unmerge(self, message: UnmergeAdapter) -> None:
        """Begin, or join one that is under way, or end a merge that has not begun to write. Raises MergeAborted once it
        has."""
        job = self._job
        if job is not None and job.digest == message.digest and job.message is None:
            job.calls.append(message.call_id)
        elif job is not None and job.digest == message.digest:
            if job.stage is Stage.WRITING:
                raise MergeAborted(f"adapter {message.digest} is being merged; try again", retry_after=RETRY_AFTER)
            self._end(MergeAborted(f"adapter {message.digest} was unmerged before its merge was done"))
            self._outbox.append(CallDone(message.call_id))
        elif self.digest != message.digest:
            self._outbox.append(CallDone(message.call_id))
        else:
            self._job = _Job(message.digest, None, message.drain_seconds, Stage.DRAINING, [message.call_id])
            self._drain(self._job)

    # The step loop goes on

    def load_failed(self, digest: str, error: LorikeetError) -> None:
        """The load that a merge may be waiting for has failed."""
        if self.calls_for_load(digest):
            self._end(error)

    def advance(self) -> None:
        """Go on with the job, if there is one, by one step."""
        job = self._job
        if job is None:
            return
        try:
            if job.stage is Stage.LOADING:
                self._await_load(job)
            if job.stage is Stage.DRAINING:
                self._await_drain(job)
            if job.stage is Stage.WRITING:
                self._write(job)
        except LorikeetError as error:
            self._end(error)

    def _await_load(self, job: _Job) -> None:
        assert job.message is not None, "an unmerge loads nothing"
        if self._adapters.begin_merge(job.digest):
            self._drain(job)
        else:
            self._adapters.load(job.message.adapter)  # it may have come and gone before this looked

    def _drain(self, job: _Job) -> None:
        job.stage = Stage.DRAINING
        job.deadline = self._clock() + job.drain_seconds
        self._scheduler.hold()
        if not self._scheduler.is_drained:
            self._tell(job, 0, 0)

    def _await_drain(self, job: _Job) -> None:
        if not self._scheduler.is_drained:
            if self._clock() > job.deadline:
                raise MergeAborted(
                    f"requests were still running after {job.drain_seconds:g} s; try again, or wait longer",
                    retry_after=RETRY_AFTER,
                )
        elif self._pace.take_turn():
            job.stage = Stage.WRITING
            if job.message is None:
                self._pool.negate(self._adapters.rows(job.digest))
                job.steps = self._merger.unmerge()
            else:
                rows = self._adapters.rows(job.digest)
                probe = job.message.probe[: self._scheduler.max_model_len]
                job.steps = self._merger.merge(rows, probe, job.message.force)

    def _write(self, job: _Job) -> None:
        step = next(job.steps, None)
        if isinstance(step, MergeReport):
            job.report = step
        elif step is not None:
            self._tell(job, *step)
        elif job.message is None:
            self.num_unmerges += 1
            self._scheduler.merged = None
            self._end()
        else:
            self.num_merges += 1
            self._scheduler.merged = job.digest
            self._pool.negate(self._adapters.rows(job.digest))  # what takes it off again
            self._end()

    def _end(self, error: LorikeetError | None = None) -> None:
        """The job is over, done or (`error`) given up: all go on, but for those that are not served now."""
        job, self._job = self._job, None
        assert job is not None, "something is under way"
        if job.stage is Stage.WRITING:
            self._pace.end_turn()
        self._scheduler.let_go()
        if self.digest != job.digest and job.stage is not Stage.LOADING:
            self._adapters.end_merge(job.digest)
        if self._refuses:
            assert self.digest is not None, "it refuses for a merged adapter"
            refusal = ErrorPayload.of(self._base_merged())
            self._outbox += [
                RequestFailed(request_id, refusal) for request_id in self._scheduler.drop_others(self.digest)
            ]
        payload = None if error is None else ErrorPayload.of(error)
        self._outbox += [CallDone(call_id, payload, job.report) for call_id in job.calls]

    @property
    def _refuses(self) -> bool:
        return self.digest is not None and not self._compensates

    def _base_merged(self) -> BaseMerged:
        assert self.digest is not None, "an adapter is merged"
        return BaseMerged(
            f"adapter {self.digest} is merged into the base, and requests for others are refused meanwhile; "
            "unmerge it, or serve with --merged-others compensate",
            merged_adapter_digest=self.digest,
        )

    def _tell(self, job: _Job, done: int, total: int) -> None:
        self._outbox += [CallProgress(call_id, job.stage.value, done, total) for call_id in job.calls]
