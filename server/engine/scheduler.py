"""Which sequences run in the next step, and what becomes of the tokens they drew. Touches no tensor.

A step is `schedule` → execute → `commit`. With overlap, `schedule` makes the next plan while one is still executing;
then decodes are planned on tokens that only the device knows yet. Three rules keep that safe:

- A sequence that certainly ends with its pending token is not planned again.
- When a commit reveals an end (a stop token), what the next plan draws for that sequence is discarded.
- Pages, row and lease go back only when no uncommitted plan uses them; until then the sequence is *draining*.

Each step plans decodes first, so that none waits for a prefill, then running prefills, then admissions in the order
of `FairQueue`. Admission takes a row, a lease on the adapter and the pages of all known tokens, or nothing at all:
a waiting sequence holds nothing, so nobody waits for what a waiting one holds. Only decodes take pages later. When
none is left, the newest-admitted sequence is preempted: it gives everything back and will compute its KV again
(mostly from the prefix cache). The oldest is thus never preempted by others and fits by itself: somebody always ends.
"""

import time
from collections import Counter, deque
from collections.abc import Callable

from server.engine.fairness import INPUT_WEIGHT, OUTPUT_WEIGHT, FairQueue
from server.engine.messages import Output, Serving
from server.engine.pages import PageManager
from server.engine.plan import Chunk, Plan, Sampled
from server.engine.residency import AdapterResidency, MissingAdapters
from server.engine.sequence import Sequence, State
from server.errors import InvalidRequest, ServerBusy


class Scheduler:
    """Continuous batching with chunked prefill over a fixed number of rows, pages and tokens a step.

    `max_waiting` bounds the sequences that are waiting beyond those that rows are free for. `preemptions`,
    `prefix_query_tokens` (prompt tokens admitted), `prefix_hit_tokens` (those found cached) and `served` (admitted
    sequences by Serving) only grow.
    """

    def __init__(
        self,
        *,
        pages: PageManager,
        adapters: AdapterResidency,
        max_num_seqs: int,
        max_batch_tokens: int,
        max_waiting: int,
        max_model_len: int,
        eos_token_ids: frozenset[int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert max_batch_tokens >= max_num_seqs > 0, "a step must have room for a token of every running sequence"
        self._pages = pages
        self._adapters = adapters
        self._max_num_seqs = max_num_seqs
        self._max_batch_tokens = max_batch_tokens
        self._max_waiting = max_waiting
        self._max_model_len = max_model_len
        self._eos_token_ids = eos_token_ids
        self._clock = clock
        self._by_id: dict[str, Sequence] = {}  # neither ended nor cancelled
        self._waiting = FairQueue()
        self._running: list[Sequence] = []  # oldest admission first
        self._draining: set[Sequence] = set()
        self._uncommitted: deque[Plan] = deque()
        self._held_back: list[Sequence] | None = None  # came since `hold`; None: nobody is held back
        self._missing = MissingAdapters(adapters, self._waiting)
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))
        self._run_seconds = 1.0  # from admission to end: a guess, then a moving average
        self.merged: str | None = None  # what is in the base's weights, by digest; changes only while drained
        self.served: Counter[str] = Counter()
        self.preemptions = 0
        self.prefix_query_tokens = 0
        self.prefix_hit_tokens = 0

    @property
    def max_model_len(self) -> int:
        """Tokens that a sequence can have."""
        return self._max_model_len

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + len(self._held_back or ())

    @property
    def waiting_by_adapter(self) -> dict[str, int]:
        """Waiting sequences by digest, without the base's."""
        return dict(Counter(seq.digest for seq in (*self._waiting, *(self._held_back or ())) if seq.digest))

    @property
    def has_work(self) -> bool:
        """Whether anything is left to schedule or commit, though it may be waiting for an adapter now."""
        return bool(self._by_id or self._uncommitted)

    # Sequences come and go

    def add(self, seq: Sequence) -> None:
        """Queue a sequence. Raises ServerBusy, or InvalidRequest for one that could never run."""
        self._check_limits(seq)
        if len(self._by_id) >= self._max_num_seqs + self._max_waiting:
            raise ServerBusy(
                f"{self.num_waiting} requests are waiting, at most {self._max_waiting} may; try again later",
                retry_after=self.retry_after,
            )
        self._by_id[seq.request_id] = seq
        if self._held_back is None:
            self._enqueue(seq)
        else:
            self._held_back.append(seq)

    def cancel(self, request_id: str) -> None:
        """End a sequence without an output; unknown ids are fine. The id may be used again at once."""
        seq = self._by_id.pop(request_id, None)
        if seq is not None:
            self._end(seq)

    def fail_adapter(self, digest: str) -> list[str]:
        """Drop the sequences that wait for an adapter that would not load; their ids, in order of arrival."""
        dropped = [seq.request_id for seq in self._waiting.waiting(digest)]
        for request_id in dropped:
            self.cancel(request_id)
        self._missing.forget(digest)
        return dropped

    def hold(self) -> None:
        """Admit none but those that are here already, until `let_go`. Those that come wait, and ask for no adapter: it
        would keep its rows for them from those that are here."""
        assert self._held_back is None, "held once"
        self._held_back = []

    def let_go(self) -> None:
        """Admit all again; fine where nobody was held back."""
        held_back, self._held_back = self._held_back or [], None
        for seq in held_back:
            self._enqueue(seq)

    @property
    def is_drained(self) -> bool:
        """Whether, held, all that may run has ended and no plan is uncommitted."""
        return not (self._waiting or self._running or self._draining or self._uncommitted)

    def drop_others(self, digest: str) -> list[str]:
        """End the waiting sequences of all adapters but one; their ids."""
        dropped = [seq.request_id for seq in self._waiting if seq.digest != digest]
        for request_id in dropped:
            self.cancel(request_id)
        return dropped

    def _enqueue(self, seq: Sequence) -> None:
        self._waiting.push(seq)
        self._missing.notice(seq, self._clock())

    def _check_limits(self, seq: Sequence) -> None:
        num_prompt, max_tokens, max_len = len(seq.prompt), seq.stopping.max_tokens, self._max_model_len
        if not num_prompt:
            raise InvalidRequest("prompt", "has no tokens")
        if max_tokens < 1:
            raise InvalidRequest("max_tokens", f"is {max_tokens}, must be at least 1")
        if num_prompt >= max_len:
            raise InvalidRequest("prompt", f"has {num_prompt} tokens, the model's context of {max_len} leaves no room")
        if seq.request_id in self._by_id:
            raise InvalidRequest("request_id", f"{seq.request_id!r} is in use by a running request")
        capacity = self._pages.num_pages * self._pages.page_size
        if num_prompt > capacity:
            raise InvalidRequest("prompt", f"has {num_prompt} tokens, the KV cache holds {capacity}")
        # The last token drawn needs no KV.
        if min(num_prompt + max_tokens, max_len) - 1 > capacity:
            most = capacity + 1 - num_prompt
            raise InvalidRequest(
                "max_tokens",
                f"is {max_tokens} after {num_prompt} of prompt, the KV cache holds {capacity}: ask for at most {most}",
            )

    @property
    def retry_after(self) -> float:
        """Seconds until about half of the queue is served, from how long sequences run; 1 to 60."""
        return min(max(self._run_seconds * self.num_waiting / (2 * self._max_num_seqs), 1.0), 60.0)

    # A step is planned

    def schedule(self) -> Plan | None:
        """The next step, or None if nothing can run now. At most one earlier plan may be uncommitted."""
        assert len(self._uncommitted) <= 1, "schedule() is at most one plan ahead of commit()"
        now = self._clock()
        self._missing.refresh(now)
        chunks: list[Chunk] = []
        self._plan_decodes(chunks)
        num_decodes = len(chunks)
        budget = self._plan_prefills(chunks, self._max_batch_tokens - num_decodes)
        admitted = self._plan_admissions(chunks, budget, now)
        if not chunks:
            return None
        plan = Plan(tuple(chunks), num_decodes, tuple(admitted))
        self._uncommitted.append(plan)
        return plan

    def _plan_decodes(self, chunks: list[Chunk]) -> None:
        """Plan a token for each decoding sequence, oldest first, as far as there are pages."""
        index = 0
        while index < len(self._running):  # preempting takes from the end
            seq = self._running[index]
            index += 1
            if not seq.is_decoding or seq.ends_with_pending(self._max_model_len):
                continue
            if self._pages.extend(seq, seq.num_tokens) or self._preempt_for(seq):
                chunks.append(self._plan_chunk(seq, 1))

    def _plan_prefills(self, chunks: list[Chunk], budget: int) -> int:
        """Plan what the budget allows of the running prefills, oldest first; the budget left."""
        for seq in self._running:
            if budget and not seq.is_decoding:
                length = min(seq.num_tokens - seq.num_computed, budget)
                chunks.append(self._plan_chunk(seq, length))
                budget -= length
        return budget

    def _plan_admissions(self, chunks: list[Chunk], budget: int, now: float) -> list[Sequence]:
        """Admit in order of fairness until rows, budget or pages run out. One that lacks pages holds up the rest,
        or short ones would pass it for ever; one that lacks its adapter does not."""
        admitted: list[Sequence] = []
        if not self._waiting or not budget or not self._free_rows:
            return admitted
        for seq in self._waiting.turns():
            if seq.adapter is not None and not self._adapters.is_available(seq.digest):
                self._missing.add(seq.adapter, now)
                continue
            seq.merged = self.merged
            # Each running sequence will soon want a page: leave it one, rather than preempt right away.
            num_cached = self._pages.allocate(seq, headroom=len(self._running))
            if num_cached is None:
                break
            if seq.adapter is not None:
                leased = self._adapters.acquire(seq.digest)
                assert leased, f"adapter {seq.digest} was available"
            self._admit(seq, num_cached, now)
            admitted.append(seq)
            length = min(seq.num_tokens - seq.num_computed, budget)
            chunks.append(self._plan_chunk(seq, length))
            budget -= length
            if not budget or not self._free_rows:
                break
        return admitted

    def _admit(self, seq: Sequence, num_cached: int, now: float) -> None:
        self._waiting.remove(seq)
        self._running.append(seq)
        seq.state = State.RUNNING
        seq.row = self._free_rows.pop()
        seq.num_computed = num_cached
        seq.is_decoding = False
        if seq.scheduled_at is None:  # not when it comes back from preemption
            seq.scheduled_at = now
            seq.num_cached = num_cached
            self.served[seq.serving] += 1
            self.prefix_query_tokens += len(seq.prompt)
            self.prefix_hit_tokens += num_cached
            self._waiting.charge(seq.digest, INPUT_WEIGHT * (len(seq.prompt) - num_cached))

    def _plan_chunk(self, seq: Sequence, length: int) -> Chunk:
        start = seq.num_computed
        samples = start + length == seq.num_tokens
        seq.num_computed += length
        seq.in_flight += 1
        if samples:
            seq.num_pending += 1
            seq.is_decoding = True
        return Chunk(seq, start, length, samples)

    # Pages run out

    def _preempt_for(self, seq: Sequence) -> bool:
        """Preempt the newest-admitted until `seq` has a page; False if it must wait, or was the newest itself."""
        while not self._draining:  # pages on their way back are waited for: one step at most
            victim = self._running.pop()
            victim.state = State.PREEMPTED
            self._drain(victim)
            if victim is seq:
                return False
            if self._pages.extend(seq, seq.num_tokens):
                return True
        return False

    def _drain(self, seq: Sequence) -> None:
        self._draining.add(seq)
        self._release_if_idle(seq)

    def _release_if_idle(self, seq: Sequence) -> None:
        """Take back all that a draining sequence holds, if no plan uses it; a preempted one waits again."""
        if seq.in_flight:
            return
        self._draining.discard(seq)
        self._pages.free(seq)
        assert seq.row is not None, f"{seq.request_id} has no row to give back"
        self._free_rows.append(seq.row)
        seq.row = None
        seq.num_computed = 0
        if seq.adapter is not None:
            self._adapters.release(seq.digest)
        if seq.state is State.PREEMPTED:
            self.preemptions += 1
            seq.state = State.WAITING
            self._waiting.requeue(seq)

    # A step is done

    def commit(self, plan: Plan, sampled: list[Sampled]) -> list[Output]:
        """Take the tokens of the oldest uncommitted plan: one for each chunk that samples, in order."""
        assert next(iter(self._uncommitted), None) is plan, "plans are committed in the order they were made"
        self._uncommitted.popleft()
        now = self._clock()
        outputs: list[Output] = []
        draws = iter(sampled)
        for chunk in plan.chunks:
            seq = chunk.seq
            seq.in_flight -= 1
            draw = next(draws) if chunk.samples else None
            if seq.state is not State.ENDED:
                self._pages.publish(seq, chunk.stop)
                if draw is not None:
                    outputs.append(self._append(seq, draw, now))
            if seq in self._draining:
                self._release_if_idle(seq)
        assert next(draws, None) is None, "more tokens than chunks that sample"
        return outputs

    def _append(self, seq: Sequence, draw: Sampled, now: float) -> Output:
        seq.output.append(draw.token)
        seq.num_pending -= 1
        self._waiting.charge(seq.digest, OUTPUT_WEIGHT)
        num_cached, timings = None, None
        if seq.first_token_at is None:
            seq.first_token_at = now
            num_cached, timings = seq.num_cached, seq.timings(now)
        finish_reason = seq.finish_reason(self._eos_token_ids, self._max_model_len)
        if finish_reason is not None:
            timings = seq.timings(now)
            run_seconds = timings.prefill + timings.decode
            self._run_seconds += 0.1 * (run_seconds - self._run_seconds)
            del self._by_id[seq.request_id]
            self._end(seq)
        return Output(
            request_id=seq.request_id,
            token_ids=[draw.token],
            logprobs=None if draw.logprob is None else [draw.logprob],
            finish_reason=finish_reason,
            num_cached=num_cached,
            timings=timings,
            serving=Serving.UNMERGED if timings is None else seq.serving,
        )

    def _end(self, seq: Sequence) -> None:
        """Take a sequence out of where it stands; what it holds goes back once no plan uses it."""
        state, seq.state = seq.state, State.ENDED
        if state is State.WAITING and self._held_back is not None and seq in self._held_back:
            self._held_back.remove(seq)
        elif state is State.WAITING:
            self._waiting.remove(seq)
        elif state is State.RUNNING:
            self._running.remove(seq)
            self._drain(seq)

    def check_integrity(self) -> None:
        """Assert that rows, pages, leases and plans agree with the sequences."""
        self._waiting.check_integrity()
        holders = [*self._running, *self._draining]
        self._pages.check_integrity(holders)
        rows = [seq.row for seq in holders] + self._free_rows
        assert sorted(rows, key=str) == sorted(range(self._max_num_seqs), key=str), f"rows are lost or shared: {rows}"
        planned = Counter(chunk.seq for plan in self._uncommitted for chunk in plan.chunks)
        assert planned.keys() <= set(holders), "an uncommitted plan uses a sequence that holds nothing"
        for seq in holders:
            assert seq.in_flight == planned[seq], f"{seq.request_id}: in {planned[seq]} plans, counts {seq.in_flight}"
            held = len(seq.pages) * self._pages.page_size
            assert held >= seq.num_computed, f"{seq.request_id}: {seq.num_computed} tokens in {held} slots"
            assert seq.num_computed <= seq.num_tokens, f"{seq.request_id}: computed beyond its tokens"
        assert all(seq.state is State.RUNNING for seq in self._running), "a running sequence has another state"
        for seq in self._draining:
            assert seq.in_flight, f"{seq.request_id} drains for ever"
            assert seq.state in (State.PREEMPTED, State.ENDED), f"{seq.request_id} drains while {seq.state}"
        waiting = [*self._waiting, *(self._held_back or ())]
        for seq in waiting:
            assert seq.state is State.WAITING, f"{seq.request_id} waits while {seq.state}"
            assert (seq.row, seq.pages) == (None, []), f"{seq.request_id} waits and holds something"
        alive = {*waiting, *self._running, *(seq for seq in self._draining if seq.state is State.PREEMPTED)}
        assert alive == set(self._by_id.values()), "sequences are lost"
