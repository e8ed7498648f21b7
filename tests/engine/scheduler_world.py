"""A device and an adapter cache made of dictionaries, to drive the scheduler with and to catch it in a mistake.

The device keeps in each slot of each page the whole history whose KV would be there, and checks at every chunk that
the pages hold exactly the sequence's own. It sees plans when they are launched and computes them when they are
finished, like a real one, so that pages, rows or leases given back too early are noticed.
"""

from collections import Counter, deque
from dataclasses import dataclass, field
from hashlib import blake2b

from server.engine.messages import AdapterRef, Output, SamplingParams, StopParams
from server.engine.pages import PageManager
from server.engine.plan import Plan, Sampled
from server.engine.scheduler import Scheduler
from server.engine.sequence import Sequence

EOS = 0
VOCAB = 9


def next_token(digest: str, history: tuple[int, ...], seed: int) -> int:
    """The model: any function of all that is visible to a token."""
    return blake2b(repr((digest, history, seed)).encode(), digest_size=4).digest()[0] % VOCAB


def alone(seq: Sequence, max_model_len: int) -> tuple[list[int], str]:
    """What the sequence must produce, whatever else runs."""
    history, stops = list(seq.prompt), set(seq.stopping.stop_token_ids)
    if not seq.stopping.ignore_eos:
        stops.add(EOS)
    while True:
        assert seq.sampling.seed is not None
        history.append(next_token(seq.digest, tuple(history), seq.sampling.seed))
        output = history[len(seq.prompt) :]
        if output[-1] in stops:
            return output, "stop"
        if len(output) == seq.stopping.max_tokens or len(history) == max_model_len:
            return output, "length"


class FakeAdapters:
    """Loads when told to; evicts only what has no lease."""

    def __init__(self, resident: set[str] | None = None) -> None:
        self.resident = set(resident or ())
        self.loading: set[str] = set()
        self.leases: Counter[str] = Counter()
        self.requests: list[str] = []

    def request(self, adapter: AdapterRef) -> None:
        self.requests.append(adapter.digest)
        if adapter.digest not in self.resident:
            self.loading.add(adapter.digest)

    def forget(self, digest: str) -> None:
        """A load goes on though none waits for it."""

    def is_available(self, digest: str) -> bool:
        return digest in self.resident

    def acquire(self, digest: str) -> bool:
        if digest not in self.resident:
            return False
        self.leases[digest] += 1
        return True

    def release(self, digest: str) -> None:
        assert self.leases[digest] > 0, "released more often than acquired"
        self.leases[digest] -= 1

    def finish_load(self, digest: str) -> None:
        if digest in self.loading:
            self.loading.remove(digest)
            self.resident.add(digest)

    def evict(self, digest: str) -> None:
        if not self.leases[digest]:
            self.resident.discard(digest)


@dataclass(frozen=True)
class Work:
    """A chunk as the runner captured it at launch."""

    digest: str
    seed: int
    row: int
    pages: tuple[int, ...]
    start: int
    tokens: tuple[int, ...] | None  # None: the row's last token
    stop: int
    samples: bool
    is_new: bool
    output_index: int
    num_prompt: int


@dataclass
class FakeDevice:
    page_size: int
    adapters: FakeAdapters
    slots: dict[tuple[int, int], tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    rows: dict[int, list[int]] = field(default_factory=dict)  # tokens seen or drawn
    launched: deque[list[Work]] = field(default_factory=deque)

    def launch(self, plan: Plan) -> None:
        assert len({chunk.seq for chunk in plan.chunks}) == len(plan.chunks), "a sequence is planned twice in a step"
        work = []
        for index, chunk in enumerate(plan.chunks):
            seq = chunk.seq
            assert seq.row is not None
            is_decode = index < plan.num_decodes
            assert not is_decode or (chunk.length == 1 and chunk.samples)
            tokens = None if is_decode else tuple(seq.tokens(chunk.start, chunk.stop))
            assert tokens is None or len(tokens) == chunk.length, "a prefill has a token that is not known"
            assert seq.sampling.seed is not None
            entry = Work(
                digest=seq.digest,
                seed=seq.sampling.seed,
                row=seq.row,
                pages=tuple(seq.pages),
                start=chunk.start,
                tokens=tokens,
                stop=chunk.stop,
                samples=chunk.samples,
                is_new=seq in plan.admitted,
                output_index=chunk.output_index,
                num_prompt=len(seq.prompt),
            )
            if entry.is_new:  # a cached prefix must be there by now, not when the plan before is done
                self._check_pages(entry, tuple(seq.tokens(0, chunk.start)))
            self._check_undisturbed(entry)
            work.append(entry)
        self.launched.append(work)

    def _check_undisturbed(self, entry: Work) -> None:
        """What this chunk writes must not belong to another row in a plan that is still executing."""
        written = set(entry.pages[entry.start // self.page_size : -(-entry.stop // self.page_size)])
        for other in (work for launched in self.launched for work in launched):
            if other.row == entry.row:
                assert not entry.is_new, "a row is given away while the device uses it"
            else:
                assert not written & set(other.pages), "a page is given away while the device uses it"

    def _check_pages(self, entry: Work, history: tuple[int, ...]) -> None:
        for position in range(len(history)):
            slot = entry.pages[position // self.page_size], position % self.page_size
            assert self.slots.get(slot) == (entry.digest, history[: position + 1]), (
                f"position {position} is not its own"
            )

    def finish(self) -> list[Sampled]:
        sampled = []
        for entry in self.launched.popleft():
            assert not entry.digest or self.adapters.leases[entry.digest], "an adapter runs without a lease"
            if entry.is_new:
                self.rows[entry.row] = []
                if entry.start:
                    last = entry.pages[entry.start // self.page_size - 1], self.page_size - 1
                    self.rows[entry.row] = list(self.slots[last][1])
            row = self.rows[entry.row]
            if entry.tokens is not None:
                row.extend(entry.tokens)
            assert len(row) == entry.stop, "the chunk does not continue where the row stands"
            self._check_pages(entry, tuple(row[: entry.start]))
            for position in range(entry.start, entry.stop):
                slot = entry.pages[position // self.page_size], position % self.page_size
                self.slots[slot] = entry.digest, tuple(row[: position + 1])
            if entry.samples:
                assert entry.output_index == len(row) - entry.num_prompt
                token = next_token(entry.digest, tuple(row), entry.seed)
                row.append(token)
                sampled.append(Sampled(token))
        return sampled


class World:
    """A scheduler on a fake device; every move checks every invariant."""

    def __init__(
        self,
        *,
        num_pages: int = 64,
        page_size: int = 4,
        prefix_caching: bool = True,
        max_num_seqs: int = 4,
        max_batch_tokens: int = 16,
        max_waiting: int = 1000,
        max_model_len: int = 64,
        resident: set[str] | None = None,
    ) -> None:
        self.now = 0.0
        self.max_model_len = max_model_len
        self.adapters = FakeAdapters(resident)
        self.device = FakeDevice(page_size, self.adapters)
        self.pages = PageManager(num_pages, page_size, prefix_caching)
        self.scheduler = Scheduler(
            pages=self.pages,
            adapters=self.adapters,
            max_num_seqs=max_num_seqs,
            max_batch_tokens=max_batch_tokens,
            max_waiting=max_waiting,
            max_model_len=max_model_len,
            eos_token_ids=frozenset({EOS}),
            clock=lambda: self.now,
        )
        self.uncommitted: deque[Plan] = deque()
        self.alive: dict[str, Sequence] = {}
        self.outputs: dict[str, list[Output]] = {}
        self.num_submitted = 0

    def submit(
        self,
        prompt: list[int],
        digest: str = "",
        *,
        max_tokens: int = 4,
        seed: int = 0,
        stop_token_ids: tuple[int, ...] = (),
        ignore_eos: bool = True,
    ) -> Sequence:
        """Raises what the scheduler raises."""
        seq = Sequence(
            request_id=f"r{self.num_submitted}",
            prompt=prompt,
            sampling=SamplingParams(seed=seed),
            stopping=StopParams(max_tokens=max_tokens, stop_token_ids=stop_token_ids, ignore_eos=ignore_eos),
            submitted_at=self.now,
            adapter=AdapterRef(digest, f"/{digest}") if digest else None,
        )
        self.num_submitted += 1
        try:
            self.scheduler.add(seq)
        finally:
            self.check()
        self.alive[seq.request_id] = seq
        self.outputs[seq.request_id] = []
        return seq

    def cancel(self, request_id: str) -> None:
        self.alive.pop(request_id, None)
        self.scheduler.cancel(request_id)
        self.check()

    def fail(self, digest: str) -> list[str]:
        self.adapters.loading.discard(digest)
        dropped = self.scheduler.fail_adapter(digest)
        for request_id in dropped:
            assert self.alive.pop(request_id).digest == digest
        self.check()
        return dropped

    def plan(self) -> Plan | None:
        self.now += 1.0
        plan = self.scheduler.schedule()
        self.check()
        if plan is not None:
            self.device.launch(plan)
            self.uncommitted.append(plan)
        return plan

    def commit(self) -> list[Output]:
        self.now += 1.0
        outputs = self.scheduler.commit(self.uncommitted.popleft(), self.device.finish())
        self.check()
        for output in outputs:
            seq = self.alive[output.request_id]
            received = self.outputs[output.request_id]
            assert (output.num_cached is not None) == (not received)
            assert (output.timings is not None) == (not received or output.finish_reason is not None)
            received.append(output)
            if output.finish_reason is not None:
                del self.alive[output.request_id]
                tokens = [token for each in received for token in each.token_ids]
                assert (tokens, output.finish_reason) == alone(seq, self.max_model_len)
        return outputs

    def step(self, overlap: bool) -> list[Output]:
        """One step of the engine's loop."""
        plan = self.plan()
        if not self.uncommitted or (overlap and plan is not None and len(self.uncommitted) == 1):
            return []
        return self.commit()

    def drain(self, overlap: bool = True, load: bool = True, limit: int = 5000) -> None:
        """Run until nothing is left; nothing may stay behind."""
        for _ in range(limit):
            if not self.scheduler.has_work:
                break
            for digest in sorted(self.adapters.loading) if load else ():
                self.adapters.finish_load(digest)
            self.step(overlap)
        assert not self.scheduler.has_work, "it never ends"
        assert not self.alive
        self.check_idle()

    def check(self) -> None:
        self.scheduler.check_integrity()

    def check_idle(self) -> None:
        """Nothing runs, so nothing is held (check_integrity has counted the rows)."""
        assert self.scheduler.num_running == self.scheduler.num_waiting == self.pages.num_used == 0
        assert not any(self.adapters.leases.values())
