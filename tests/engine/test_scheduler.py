"""Each rule of the scheduler by itself, then all of them at once against random traffic."""

import contextlib

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule
from msgspec.structs import replace

from server.engine.messages import TokenLogprob
from server.engine.plan import Plan, Sampled
from server.engine.sequence import Sequence, State
from server.errors import InvalidRequest, ServerBusy
from tests.engine.scheduler_world import EOS, World, alone

BOTH = pytest.mark.parametrize("overlap", [False, True])


def shape(plan: Plan | None) -> list[tuple[str, int, int]]:
    return [] if plan is None else [(chunk.seq.request_id, chunk.start, chunk.length) for chunk in plan.chunks]


def has_row(seq: Sequence) -> bool:
    return seq.row is not None


# What a step is made of


@BOTH
def test_one_sequence_makes_the_tokens_it_makes_alone(overlap: bool) -> None:
    world = World()
    world.submit([1, 2, 3], max_tokens=7)
    world.drain(overlap)
    assert len(world.outputs["r0"]) == 7


def test_decodes_come_first_then_running_prefills_then_admissions() -> None:
    world = World(max_batch_tokens=8, max_num_seqs=4)
    world.submit([1] * 4, max_tokens=9)
    world.step(overlap=False)
    world.submit([2] * 12, max_tokens=9)
    world.submit([3] * 3, max_tokens=9)
    plan = world.plan()
    assert shape(plan) == [("r0", 4, 1), ("r1", 0, 7)]
    assert plan is not None
    assert plan.num_decodes == 1
    assert [seq.request_id for seq in plan.admitted] == ["r1"]
    assert [chunk.samples for chunk in plan.chunks] == [True, False]
    world.commit()
    plan = world.plan()
    assert shape(plan) == [("r0", 5, 1), ("r1", 7, 5), ("r2", 0, 2)]
    assert plan is not None
    assert [chunk.samples for chunk in plan.chunks] == [True, True, False]


def test_a_long_prefill_never_keeps_a_decode_waiting() -> None:
    world = World(max_batch_tokens=4, max_num_seqs=4, max_model_len=64)
    world.submit([1], max_tokens=20)
    world.step(overlap=False)
    world.submit([2] * 60, max_tokens=2)
    for produced in range(2, 12):
        world.step(overlap=False)
        assert len(world.outputs["r0"]) == produced


def test_overlap_plans_a_decode_on_a_token_not_yet_known() -> None:
    world = World()
    seq = world.submit([1, 2], max_tokens=3)
    world.plan()
    assert shape(world.plan()) == [("r0", 2, 1)]
    assert seq.output == []
    world.commit()
    assert len(seq.output) == 1


@pytest.mark.parametrize(("max_tokens", "max_model_len"), [(1, 64), (9, 4)])
def test_what_certainly_ends_with_its_pending_token_is_not_planned_again(max_tokens: int, max_model_len: int) -> None:
    world = World(max_model_len=max_model_len)
    world.submit([1, 2, 3], max_tokens=max_tokens)
    world.plan()
    assert world.plan() is None
    [output] = world.commit()
    assert output.finish_reason == "length"
    world.check_idle()


def test_no_step_takes_more_tokens_than_the_budget() -> None:
    world = World(max_batch_tokens=5, max_num_seqs=5)
    for index in range(9):
        world.submit([index % 5 + 1] * (3 + index), max_tokens=5)
    while world.scheduler.has_work:
        plan = world.plan()
        assert plan is not None
        assert plan.num_tokens <= 5
        world.commit()


# How sequences end


def find_stop(world: World, prompt: list[int], at: int) -> int:
    """A seed with which the first stop token is the output number `at`, among sixteen."""
    for seed in range(10_000):
        probe = World().submit(prompt, max_tokens=16, seed=seed, ignore_eos=False)
        if len(alone(probe, world.max_model_len)[0]) == at:
            return seed
    raise AssertionError("no seed found")


@BOTH
def test_eos_ends_with_stop_and_is_the_last_token(overlap: bool) -> None:
    world = World()
    world.submit([1, 2], max_tokens=16, seed=find_stop(world, [1, 2], 3), ignore_eos=False)
    world.drain(overlap)
    assert [out.token_ids for out in world.outputs["r0"]][-1] == [EOS]
    assert [out.finish_reason for out in world.outputs["r0"]] == [None, None, "stop"]


def test_eos_is_a_token_like_others_when_ignored() -> None:
    world = World()
    world.submit([1, 2], max_tokens=16, seed=find_stop(world, [1, 2], 3), ignore_eos=True)
    world.drain()
    assert len(world.outputs["r0"]) == 16


def test_stop_token_ids_hold_even_when_eos_is_ignored() -> None:
    world = World()
    probe = World().submit([5], max_tokens=16)
    tokens, _ = alone(probe, 64)
    world.submit([5], max_tokens=16, stop_token_ids=(tokens[3],))
    world.drain()
    assert world.outputs["r0"][-1].finish_reason == "stop"
    assert world.outputs["r0"][-1].token_ids == [tokens[3]]
    assert len(world.outputs["r0"]) == tokens.index(tokens[3]) + 1


def test_the_token_planned_after_an_unforeseen_end_is_discarded_and_its_pages_kept_until_then() -> None:
    world = World()
    seq = world.submit([1, 2], max_tokens=16, seed=find_stop(world, [1, 2], 1), ignore_eos=False)
    world.plan()
    world.plan()
    assert [output.finish_reason for output in world.commit()] == ["stop"]
    assert seq.pages
    assert world.pages.num_used == 1
    assert world.commit() == []
    world.check_idle()
    assert seq.output == [EOS]


def test_logprobs_travel_with_their_token() -> None:
    world = World()
    world.submit([1], max_tokens=1)
    plan = world.plan()
    assert plan is not None
    [output] = world.scheduler.commit(plan, [Sampled(3, TokenLogprob(-0.5, [(3, -0.5)]))])
    assert output.logprobs == [TokenLogprob(-0.5, [(3, -0.5)])]


def test_timings_split_queue_load_prefill_and_decode() -> None:
    world = World(max_batch_tokens=4, max_num_seqs=1)
    world.submit([1] * 8, "a", max_tokens=3)
    for _ in range(4):
        assert world.plan() is None  # the clock goes on by one each
    world.adapters.finish_load("a")
    for _ in range(4):
        world.plan()
        world.now += 9.0
        world.commit()
    timings = world.outputs["r0"][-1].timings
    assert timings is not None
    assert (timings.queue, timings.load) == (5.0, 5.0)
    assert (timings.prefill, timings.decode) == (21.0, 22.0)


def test_the_first_output_has_the_timings_up_to_it() -> None:
    world = World(max_num_seqs=1)
    world.submit([1] * 8, max_tokens=3)
    world.drain(overlap=False)
    first, *between, last = [output.timings for output in world.outputs["r0"]]
    assert first is not None
    assert last is not None
    assert between == [None]
    assert first == replace(last, decode=0.0)
    assert last.decode > 0


def test_load_is_counted_from_each_sequences_own_arrival() -> None:
    world = World()
    world.submit([1], "a", max_tokens=1)
    world.plan()
    world.plan()
    world.submit([2], "a", max_tokens=1)
    world.plan()
    world.adapters.finish_load("a")
    world.drain(overlap=False)
    loads = []
    for request_id in ("r0", "r1"):
        timings = world.outputs[request_id][-1].timings
        assert timings is not None
        loads.append(timings.load)
    assert loads == [4.0, 2.0]


def test_load_is_only_the_part_of_the_queue_that_waited_for_the_adapter() -> None:
    world = World(max_num_seqs=1)
    world.submit([1], max_tokens=6)
    world.submit([1], "a", max_tokens=1)
    world.step(overlap=False)
    world.adapters.finish_load("a")
    world.drain(overlap=False)
    timings = world.outputs["r1"][-1].timings
    assert timings is not None
    assert timings.load == 3.0
    assert timings.queue > 10.0


# What is refused


def test_a_full_queue_refuses_at_once_and_says_when_to_return() -> None:
    world = World(max_num_seqs=2, max_waiting=3)
    for _ in range(5):
        world.submit([1])
    with pytest.raises(ServerBusy, match="at most 3") as caught:
        world.submit([1])
    assert caught.value.retry_after is not None
    assert caught.value.retry_after >= 1.0
    world.step(overlap=False)
    with pytest.raises(ServerBusy):
        world.submit([1])
    world.cancel("r0")
    world.submit([1])
    world.drain()


def test_retry_after_grows_with_how_long_sequences_run() -> None:
    waits = []
    for seconds in (15.0, 60.0):
        world = World(max_num_seqs=1, max_waiting=4)
        world.submit([1], max_tokens=1)
        world.plan()
        world.now += seconds
        world.commit()
        for _ in range(5):
            world.submit([1])
        with pytest.raises(ServerBusy) as caught:
            world.submit([1])
        assert caught.value.retry_after is not None
        waits.append(caught.value.retry_after)
    assert waits[0] < waits[1]


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "field", "says"),
    [
        ([], 1, "prompt", "no tokens"),
        ([1], 0, "max_tokens", "at least 1"),
        ([1] * 40, 1, "prompt", "context of 40"),
        ([1] * 33, 1, "prompt", "holds 32"),
        ([1] * 30, 9, "max_tokens", "at most 3"),
    ],
)
def test_what_could_never_run_is_refused(prompt: list[int], max_tokens: int, field: str, says: str) -> None:
    world = World(num_pages=8, page_size=4, max_model_len=40)
    with pytest.raises(InvalidRequest, match=says) as caught:
        world.submit(prompt, max_tokens=max_tokens)
    assert caught.value.field == field
    assert not world.scheduler.has_work


def test_what_just_fits_the_whole_pool_runs() -> None:
    world = World(num_pages=8, page_size=4, max_model_len=40)
    world.submit([1] * 30, max_tokens=3)
    world.submit([1] * 32, max_tokens=1)
    world.drain()


def test_a_request_id_in_use_is_refused() -> None:
    world = World()
    world.submit([1])
    world.num_submitted = 0
    with pytest.raises(InvalidRequest, match="r0"):
        world.submit([1])


# Cancelling


def test_a_waiting_sequence_is_cancelled() -> None:
    world = World(max_num_seqs=1)
    world.submit([1])
    world.submit([2])
    world.step(overlap=False)
    world.cancel("r1")
    assert world.scheduler.num_waiting == 0
    world.drain()
    world.cancel("r0")
    world.cancel("unheard of")


def test_cancelling_frees_at_once_what_no_plan_uses() -> None:
    world = World(resident={"a"})
    world.submit([1] * 9, "a", max_tokens=9)
    world.step(overlap=False)
    world.cancel("r0")
    world.check_idle()
    assert not world.scheduler.has_work


def test_cancelling_under_way_frees_with_the_plan_that_uses_it() -> None:
    world = World(resident={"a"})
    world.submit([1] * 9, "a", max_tokens=9)
    world.plan()
    world.plan()
    world.cancel("r0")
    assert world.commit() == []
    assert world.pages.num_used == 3
    assert world.plan() is None
    assert world.commit() == []
    world.check_idle()


def test_a_cancelled_id_may_be_used_again_while_it_drains() -> None:
    world = World()
    world.submit([1], max_tokens=9)
    world.plan()
    world.cancel("r0")
    world.num_submitted = 0
    world.submit([2], max_tokens=2)
    world.drain()
    assert len(world.outputs["r0"]) == 2


# Adapters


def test_who_waits_for_an_adapter_holds_nothing_and_is_overtaken() -> None:
    world = World()
    late = world.submit([1] * 9, "a")
    world.submit([2])
    assert shape(world.plan()) == [("r1", 0, 1)]
    assert late.row is None
    assert not late.pages
    world.adapters.finish_load("a")
    assert shape(world.plan())[-1] == ("r0", 0, 9)
    world.commit()
    world.drain()


def test_an_adapter_is_requested_on_arrival_and_again_when_evicted_before_its_turn() -> None:
    world = World(max_num_seqs=1)
    world.submit([1], max_tokens=3)
    world.step(overlap=False)
    world.submit([2], "a")
    assert world.adapters.requests == ["a"]
    world.adapters.finish_load("a")
    world.step(overlap=False)
    world.adapters.evict("a")
    world.adapters.requests.clear()
    world.step(overlap=False)
    world.step(overlap=False)
    assert "a" in world.adapters.requests
    world.drain()


def test_an_adapter_evicted_before_it_is_noticed_is_requested_again() -> None:
    world = World()
    world.submit([1], "a")
    world.plan()
    world.adapters.finish_load("a")
    world.adapters.evict("a")
    assert world.plan() is None
    assert world.adapters.loading == {"a"}
    world.drain()


def test_an_adapter_that_would_not_load_drops_its_waiting_sequences_only() -> None:
    world = World(resident={"b"})
    world.submit([1], "a")
    world.submit([2], "b")
    world.submit([3], "a")
    assert world.fail("a") == ["r0", "r2"]
    world.drain(load=False)
    assert world.outputs["r1"][-1].finish_reason == "length"
    world.submit([1], "a")
    world.drain()


def test_a_lease_is_held_from_admission_to_end() -> None:
    world = World(resident={"a"})
    world.submit([1] * 3, "a", max_tokens=2)
    assert world.adapters.leases["a"] == 0
    world.plan()
    assert world.adapters.leases["a"] == 1
    world.drain()
    assert world.adapters.leases["a"] == 0


# Prefixes and preemption


def test_num_cached_is_reported_with_the_first_output() -> None:
    world = World(page_size=4)
    world.submit([1] * 9)
    world.drain()
    world.submit([1] * 9)
    world.submit([1] * 9, "a")
    world.drain()
    assert [world.outputs[r][0].num_cached for r in ("r0", "r1", "r2")] == [0, 8, 0]
    assert world.scheduler.prefix_hit_tokens == 8
    assert world.scheduler.prefix_query_tokens == 27


def test_an_answer_is_reused_as_the_next_turns_prefix() -> None:
    world = World(page_size=4)
    seq = world.submit([1] * 4, max_tokens=9)
    world.drain()
    world.submit(seq.prompt + seq.output + [5, 5])
    world.drain()
    assert world.outputs["r1"][0].num_cached == 12


def test_a_page_is_not_shared_before_it_is_computed() -> None:
    world = World(page_size=4, max_batch_tokens=8)
    world.submit([1] * 12)
    world.step(overlap=False)  # two of its three pages
    other = world.submit([1] * 13)
    world.plan()
    assert other.num_cached == 8
    world.drain()


def test_a_running_sequences_pages_are_shared_once_computed() -> None:
    world = World(page_size=4, max_batch_tokens=8)
    first = world.submit([1] * 12, max_tokens=9)
    world.plan()  # two pages, not yet computed
    second = world.submit([1] * 12, max_tokens=9)
    world.plan()
    assert second.num_cached == 0
    world.commit()
    third = world.submit([1] * 12, max_tokens=9)
    world.step(overlap=True)
    world.plan()
    assert third.pages[:2] == first.pages[:2]
    world.commit()
    world.drain()


@BOTH
def test_when_pages_run_out_the_newest_is_preempted_and_resumes(overlap: bool) -> None:
    world = World(num_pages=8, page_size=2, max_num_seqs=4, max_batch_tokens=16)
    for index in range(3):
        world.submit([index + 1] * 3, max_tokens=12)
    finished = []
    while world.scheduler.has_work:
        finished += [out.request_id for out in world.step(overlap) if out.finish_reason]
    assert world.scheduler.preemptions > 0
    assert finished == ["r0", "r1", "r2"]
    world.check_idle()


def test_a_preempted_sequence_keeps_its_drawn_token_and_gives_back_its_lease() -> None:
    world = World(num_pages=4, page_size=2, resident={"a"}, prefix_caching=False)
    world.submit([1, 1], max_tokens=6)
    victim = world.submit([2, 2], "a", max_tokens=6)
    while world.scheduler.num_running != 1 or not has_row(victim):
        world.plan()
        if len(world.uncommitted) == 2 and world.scheduler.num_running == 2:
            world.commit()
    drawn = len(victim.output)
    while has_row(victim):
        assert world.adapters.leases["a"] == 1
        world.commit()
    assert world.scheduler.num_waiting == 1
    assert len(victim.output) == drawn + 1
    assert world.adapters.leases["a"] == 0
    world.drain()


def test_admission_leaves_a_page_to_each_that_runs() -> None:
    world = World(num_pages=4, page_size=4)
    world.submit([1] * 3, max_tokens=8)
    world.step(overlap=False)
    world.submit([2] * 9, max_tokens=1)  # three pages, and three are free
    assert shape(world.plan()) == [("r0", 3, 1)]
    world.commit()
    world.drain()
    assert world.scheduler.preemptions == 0


@BOTH
def test_recomputing_is_chunked_like_any_prefill(overlap: bool) -> None:
    world = World(num_pages=8, page_size=2, max_num_seqs=3, max_batch_tokens=3, prefix_caching=False)
    for index in range(3):
        world.submit([index + 1] * 3, max_tokens=10)
    world.drain(overlap)
    assert world.scheduler.preemptions > 0


@BOTH
def test_a_stream_of_short_ones_does_not_starve_a_long_one(overlap: bool) -> None:
    """The long one needs most of the pool; short ones keep coming, from its own adapter and from another."""
    world = World(num_pages=10, page_size=4, max_num_seqs=4, resident={"a"})
    for index in range(4):  # one ends at every step from now on
        world.submit([1, 2], "a", max_tokens=3 + index)
    world.step(overlap)
    long = world.submit([3] * 30, max_tokens=8)
    for _ in range(100):
        world.submit([4], "a", max_tokens=3)
        world.submit([5], max_tokens=3)
        world.step(overlap)
        if long.state is State.ENDED:
            return
    raise AssertionError("starved")


# Everything at once

DIGESTS = ["", "", "a", "b", "c"]


class Traffic(RuleBasedStateMachine):
    """Any order of arrivals, cancels, loads, evictions, refusals and half steps, in a pool that is too small."""

    sequences = Bundle("sequences")
    held = False
    ahead: frozenset[str] = frozenset()

    @initialize(
        capacity=st.integers(8, 28),
        page_size=st.sampled_from([1, 2, 4]),
        max_num_seqs=st.integers(1, 5),
        spare_tokens=st.integers(0, 8),
        prefix_caching=st.booleans(),
        max_model_len=st.sampled_from([6, 24, 24]),
    )
    def start(
        self,
        capacity: int,
        page_size: int,
        max_num_seqs: int,
        spare_tokens: int,
        prefix_caching: bool,
        max_model_len: int,
    ) -> None:
        self.world = World(
            num_pages=capacity // page_size,
            page_size=page_size,
            max_num_seqs=max_num_seqs,
            max_batch_tokens=max_num_seqs + spare_tokens,
            prefix_caching=prefix_caching,
            max_waiting=12,
            max_model_len=min(max_model_len, capacity // page_size * page_size + 1),
            resident={"a"},
        )

    @rule(
        target=sequences,
        prompt=st.lists(st.integers(1, 2), min_size=1, max_size=9),
        digest=st.sampled_from(DIGESTS),
        max_tokens=st.integers(1, 16),
        seed=st.integers(0, 3),
        ignore_eos=st.booleans(),
        stop_token_ids=st.sampled_from([(), (4,)]),
    )
    def submit(
        self,
        prompt: list[int],
        digest: str,
        max_tokens: int,
        seed: int,
        ignore_eos: bool,
        stop_token_ids: tuple[int, ...],
    ) -> Sequence | None:
        try:
            return self.world.submit(
                prompt,
                digest,
                max_tokens=max_tokens,
                seed=seed,
                ignore_eos=ignore_eos,
                stop_token_ids=stop_token_ids,
            )
        except (ServerBusy, InvalidRequest):
            return None

    @rule(
        requests=st.lists(
            st.tuples(
                st.lists(st.integers(1, 2), min_size=1, max_size=7),
                st.sampled_from(["", "", "a", "a", "b"]),
                st.integers(4, 16),
                st.integers(0, 3),
            ),
            min_size=3,
            max_size=6,
        )
    )
    def burst(self, requests: list[tuple[list[int], str, int, int]]) -> None:
        """Long answers that the pool cannot hold together."""
        for prompt, digest, max_tokens, seed in requests:
            with contextlib.suppress(ServerBusy, InvalidRequest):
                self.world.submit(prompt, digest, max_tokens=max_tokens, seed=seed)

    @rule(seq=sequences)
    def cancel(self, seq: Sequence | None) -> None:
        if seq is not None:
            self.world.cancel(seq.request_id)

    @rule()
    def plan(self) -> None:
        if len(self.world.uncommitted) < 2:
            self.world.plan()

    @rule()
    def commit(self) -> None:
        if self.world.uncommitted:
            self.world.commit()

    @rule(overlap=st.booleans(), count=st.integers(1, 6))
    def steps(self, overlap: bool, count: int) -> None:
        for _ in range(count):
            if len(self.world.uncommitted) == 2:
                self.world.commit()
            self.world.step(overlap)

    @rule()
    def hold(self) -> None:
        if not self.held:
            self.held = True
            self.ahead = frozenset(self.world.alive)
            self.world.scheduler.hold()
            self.world.check()

    @rule()
    def let_go(self) -> None:
        self.held = False
        self.world.scheduler.let_go()
        self.world.check()

    @invariant()
    def who_is_held_back_has_not_begun(self) -> None:
        if self.held:
            came_since = self.world.alive.keys() - self.ahead
            assert all(self.world.alive[request_id].scheduled_at is None for request_id in came_since)
            assert self.world.scheduler.is_drained == (
                self.world.alive.keys() == came_since and not self.world.uncommitted
            )

    @rule(digest=st.sampled_from(DIGESTS[2:]))
    def load(self, digest: str) -> None:
        self.world.adapters.finish_load(digest)

    @rule(digest=st.sampled_from(DIGESTS[2:]))
    def evict(self, digest: str) -> None:
        self.world.adapters.evict(digest)

    @rule(digest=st.sampled_from(DIGESTS[2:]))
    def fail(self, digest: str) -> None:
        if digest in self.world.adapters.loading:
            self.world.fail(digest)

    def teardown(self) -> None:
        if hasattr(self, "world"):
            if len(self.world.uncommitted) == 2:
                self.world.commit()
            self.world.scheduler.let_go()
            self.world.drain()


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
