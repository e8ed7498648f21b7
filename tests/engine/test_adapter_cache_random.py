"""Random moves of sequences, calls and workers over a cache and its pool; then, under load, that nobody starves."""

import contextlib
import random
from collections import Counter, deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from adapters.errors import AdapterInUse
from server.engine.loading import Arrivals
from server.engine.messages import AdapterRef, SamplingParams, StopParams
from server.engine.pages import PageManager
from server.engine.plan import Sampled
from server.engine.scheduler import Scheduler
from server.engine.sequence import Sequence
from server.errors import PinRefused
from server.lora.pool import PAGE_ROWS
from tests.engine.cache_world import CacheWorld, ref

NAMES = [f"{name}:{rank}" for name, rank in zip("abcdefgh", (4, 4, 8, 3, 12, 5, 16, 8), strict=True)]
names = st.sampled_from(NAMES)


def digest(name: str) -> str:
    return ref(name).digest


class CacheMachine(RuleBasedStateMachine):
    """Eight adapters of ranks 3 to 16 in 28 rows, two of which may break or not prove right."""

    def __init__(self) -> None:
        super().__init__()
        self.world = CacheWorld(7, host_rows=20, prove=True)
        self.leases: Counter[str] = Counter()
        self.waited_for: set[str] = set()
        self.claimed: set[str] = set()  # arrived for sequences, none has run
        self.pinned: set[str] = set()
        self.loads: set[str] = set()  # calls not yet answered
        self.pins: set[str] = set()  # of those, the ones that are to pin
        self.unloads: set[str] = set()

    # Sequences

    @rule(name=names)
    def wait_for(self, name: str) -> None:
        if not self.world.cache.is_available(digest(name)):
            self.world.cache.request(ref(name))
            self.waited_for.add(name)

    @precondition(lambda self: self.waited_for)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.waited_for)))
        self.waited_for.discard(name)
        self.claimed.discard(name)
        self.world.cache.forget(digest(name))

    @rule(name=names)
    def acquire(self, name: str) -> None:
        available = self.world.cache.is_available(digest(name))
        assert self.world.cache.acquire(digest(name)) == available
        if available:
            self.leases[name] += 1
            self.waited_for.discard(name)
            self.claimed.discard(name)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.leases)))
        self.world.cache.release(digest(name))
        self.leases -= Counter([name])

    # Calls

    @rule(name=names, pin=st.booleans())
    def load(self, name: str, pin: bool) -> None:
        with contextlib.suppress(PinRefused, AdapterInUse):
            if not self.world.cache.load(ref(name), pin):
                self.loads.add(name)
                if pin:
                    self.pins.add(name)
            elif pin:
                self.pinned.add(name)

    @rule(name=names)
    def unpin(self, name: str) -> None:
        self.world.cache.unpin(digest(name))
        self.pinned.discard(name)
        self.pins.discard(name)

    @rule(name=names, drain=st.booleans())
    def unload(self, name: str, drain: bool) -> None:
        is_coming = name in self.waited_for and not self.world.cache.is_resident(digest(name))
        held = self.leases[name] > 0 or name in self.claimed or is_coming
        try:
            gone = self.world.cache.unload(digest(name), drain)
        except AdapterInUse:
            assert held, "nobody wants it"
            assert not drain
            return
        assert gone == (not held)
        self.loads.discard(name)
        self.pins.discard(name)
        self.pinned.discard(name)
        if gone:  # for those who drain it, too
            self.unloads.discard(name)
        else:
            self.unloads.add(name)

    # Workers and the loop

    @rule(name=st.sampled_from(NAMES[:2]), to=st.sampled_from(["broken", "corrupt"]))
    def toggle(self, name: str, to: str) -> None:
        bad = self.world.broken if to == "broken" else self.world.corrupt
        bad.symmetric_difference_update({name})

    @precondition(lambda self: self.world.workers.tasks)
    @rule(data=st.data())
    def work(self, data: st.DataObject) -> None:
        self.world.workers.run(data.draw(st.integers(0, len(self.world.workers.tasks) - 1)))

    @rule()
    def poll(self) -> None:
        self.take(self.world.poll())

    def take(self, arrivals: Arrivals) -> None:
        for name in NAMES:
            if digest(name) in arrivals.loaded:
                self.loads.discard(name)
                if name in self.waited_for:
                    self.claimed.add(name)
                if name in self.pins and digest(name) not in arrivals.unpinned:
                    self.pinned.add(name)
                self.pins.discard(name)
            if digest(name) in arrivals.failed:
                assert name in self.waited_for or name in self.loads, "a load that nobody wants is told to nobody"
                for wanting in (self.waited_for, self.loads, self.pins):
                    wanting.discard(name)
            if digest(name) in arrivals.unloaded:
                self.unloads.discard(name)

    @invariant()
    def nothing_is_lost(self) -> None:
        self.world.cache.check_integrity()
        for name in self.leases:
            assert self.world.holds(name), f"{name} was overwritten while it was leased"
        for name in self.claimed | self.pinned:
            assert self.world.cache.is_resident(digest(name)), f"{name} was evicted"
        assert sum(entry.leases for entry in self.world.cache.snapshot()) == self.leases.total()

    def teardown(self) -> None:
        """Every lease ends and whoever arrives has its turn: then all that is wanted comes or fails."""
        for name in sorted(self.pinned):
            self.unpin(name)
        for name in list(self.leases.elements()):
            self.world.cache.release(digest(name))
        self.leases.clear()
        for _ in range(12 * len(NAMES)):
            self.world.workers.run_all()
            self.take(self.world.poll())
            for name in sorted(self.waited_for):
                if self.world.cache.acquire(digest(name)):
                    assert self.world.holds(name)
                    self.world.cache.release(digest(name))
                    self.waited_for.discard(name)
                    self.claimed.discard(name)
                else:
                    self.world.cache.request(ref(name))
            for name in sorted(self.pinned):
                self.unpin(name)
        assert not self.waited_for, "sequences wait for ever"
        assert not self.loads, "calls wait for ever"
        assert not self.unloads, "unloads wait for ever"
        assert not self.world.cache.is_loading


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)


class Traffic:
    """The real scheduler over the real cache, with workers that take time; one adapter a request, by Zipf's law."""

    def __init__(self, room: int, max_num_seqs: int, seed: int) -> None:
        self.rng = random.Random(seed)
        self.world = CacheWorld(room)  # every adapter has the rank of one page
        self.scheduler = Scheduler(
            pages=PageManager(8 * max_num_seqs, 4, True),
            adapters=self.world.cache,
            max_num_seqs=max_num_seqs,
            max_batch_tokens=4 * max_num_seqs,
            max_waiting=1000,
            max_model_len=64,
            eos_token_ids=frozenset(),
            clock=lambda: float(self.now),
        )
        self.now = 0
        self.submitted: dict[str, int] = {}
        self.waits: list[int] = []  # steps to the first token
        self.num_requests = 0

    def submit(self, adapter: str, max_tokens: int) -> None:
        request_id = f"r{self.num_requests}"
        self.num_requests += 1
        self.submitted[request_id] = self.now
        self.scheduler.add(
            Sequence(
                request_id=request_id,
                prompt=[1] * self.rng.randint(1, 8),
                sampling=SamplingParams(seed=0),
                stopping=StopParams(max_tokens=max_tokens, ignore_eos=True),
                submitted_at=float(self.now),
                adapter=AdapterRef(f"sha256:{adapter}", adapter),
            )
        )

    def step(self) -> int:
        """One step of the loop, in which two workers end a piece of work each; how many requests ended."""
        self.now += 1
        for _ in range(min(2, len(self.world.workers.tasks))):
            self.world.workers.run(0)
        self.world.poll()
        plan = self.scheduler.schedule()
        self.scheduler.check_integrity()
        if plan is None:
            return 0
        outputs = self.scheduler.commit(plan, [Sampled(7, None) for chunk in plan.chunks if chunk.samples])
        for output in outputs:
            if output.num_cached is not None:
                self.waits.append(self.now - self.submitted.pop(output.request_id))
        return sum(output.finish_reason is not None for output in outputs)

    def longest_wait(self) -> int:
        return max([*self.waits, *(self.now - since for since in self.submitted.values())])


@pytest.mark.parametrize(("exponent", "seed"), [(1.0, 0), (0.6, 1), (1.4, 2)])
def test_waits_are_bounded_with_a_thousand_adapters_and_room_for_32(exponent: float, seed: int) -> None:
    """96 requests at a time. Of a waiting request's 95 others each may hold it up for one load (two steps on a
    worker, two of which work) and one run (at most 12 tokens and 2 steps of prefill) of a row: that bounds the wait."""
    at_once, max_tokens, num_rows = 96, 12, 48
    traffic = Traffic(32, num_rows, seed)
    weights = [1 / (i + 1) ** exponent for i in range(1000)]
    for adapter in traffic.rng.choices(range(1000), weights, k=at_once):
        traffic.submit(f"{adapter}:{PAGE_ROWS}", traffic.rng.randint(1, max_tokens))
    for _ in range(1500):
        for adapter in traffic.rng.choices(range(1000), weights, k=traffic.step()):
            traffic.submit(f"{adapter}:{PAGE_ROWS}", traffic.rng.randint(1, max_tokens))
    assert len(traffic.waits) > 1500
    assert traffic.world.cache.evictions["device"] > 100, "the room is enough: nothing is shown"
    assert traffic.longest_wait() <= at_once * 2 + (at_once // 32 + 1) * (max_tokens + 2)


def test_a_rare_adapter_is_served_though_popular_ones_never_pause() -> None:
    """Every row of the pool is leased at all times by sequences that follow one another without end."""
    traffic = Traffic(4, 16, 0)
    popular = [f"popular{i}:{PAGE_ROWS}" for i in range(4)]
    backlog = deque(popular * 40)
    waits: list[int] = []
    for step in range(1200):
        while traffic.scheduler.num_waiting < 8:
            traffic.submit(backlog[0], 9)
            backlog.rotate(-1)
        if step % 60 == 30:
            traffic.submit(f"rare{step}:{traffic.rng.choice((4, 8, 12))}", 3)
        traffic.step()
    waits = traffic.waits
    assert len(waits) > 1500
    assert traffic.longest_wait() <= 4 * (9 + 2) + 10


def test_who_is_held_back_takes_no_rows_from_who_is_let_through() -> None:
    """Both wait for an adapter, there is room for one of them, and the later one's is read first."""
    traffic = Traffic(1, 4, 0)
    traffic.submit(f"early:{PAGE_ROWS}", 3)
    traffic.scheduler.hold()
    traffic.submit(f"late:{PAGE_ROWS}", 3)
    traffic.world.workers.run(-1)
    traffic.world.poll()
    for _ in range(20):
        traffic.step()
    assert traffic.scheduler.is_drained
    assert traffic.scheduler.num_waiting == 1
    traffic.scheduler.let_go()
    assert sum(traffic.step() for _ in range(20)) == 1
    assert traffic.scheduler.num_waiting == 0
