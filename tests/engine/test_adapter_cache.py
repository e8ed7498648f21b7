"""Adapters that compete for too little memory: each rule by itself."""

import random

import pytest

from adapters.errors import AdapterInUse, AdapterTooLarge, InvalidAdapter
from server.engine.adapter_cache import MAX_UNDER_WAY, NUM_WORKERS
from server.engine.loading import Stage
from server.errors import CanaryFailed, PinRefused
from server.lora.pool import PAGE_ROWS
from tests.engine.cache_world import ROW_BYTES, CacheWorld, ref

A, B, C, D = "a:8", "b:8", "c:8", "d:8"  # two pages each


def digest(name: str) -> str:
    return ref(name).digest


def room_for(count: int, host_rows: int = 0, prove: bool = False) -> CacheWorld:
    """Room for so many adapters of rank 8."""
    return CacheWorld(2 * count, host_rows, prove)


# Memory


def test_sixty_four_adapters_of_mixed_rank_take_the_room_of_their_own_sizes() -> None:
    """Ranks 4 to 128 in 5 % more than what their ranks need, and others in the holes that some leave."""
    rng = random.Random(3)
    names = [f"{i}:{rng.randint(4, 128)}" for i in range(64)]
    needed = sum(int(name.split(":")[1]) for name in names)
    world = CacheWorld(int(needed * 1.05) // PAGE_ROWS)
    world.make_resident(*names)
    assert world.cache.evictions["device"] == 0
    assert world.cache.used_bytes["device"] <= 1.05 * needed * ROW_BYTES
    for round_ in range(3):
        rng.shuffle(names)
        for i, name in enumerate(
            names[:32]
        ):  # others of the same ranks, in another order: every hole is of another size
            world.cache.unload(digest(name))
            names[i] = f"{round_}-{i}:{name.split(':')[1]}"
        world.make_resident(*rng.sample(names[:32], 32))
    assert world.cache.evictions["device"] == 0
    for name in names:
        assert world.cache.acquire(digest(name))
        assert world.holds(name)


def test_least_recently_leased_goes_first_and_what_is_held_stays() -> None:
    world = room_for(3)
    world.make_resident(A, B, C)
    assert world.cache.acquire(digest(A))
    assert world.cache.acquire(digest(B))
    world.cache.release(digest(B))
    world.make_resident(D)
    assert [world.cache.is_resident(digest(name)) for name in (A, B, C, D)] == [True, True, False, True]
    assert world.holds(A)


def test_what_never_fits_is_refused() -> None:
    world = room_for(2)
    world.cache.request(ref("huge:17"))
    world.workers.run_all()
    failed = world.poll().failed
    assert isinstance(failed[digest("huge:17")], AdapterTooLarge)
    assert not world.cache.is_loading


# The host's tier


def test_an_evicted_adapter_comes_back_without_its_file() -> None:
    world = room_for(1, host_rows=100)
    world.make_resident(A, B)
    assert world.num_reads == 2
    world.make_resident(A)
    assert world.num_reads == 2
    assert world.cache.acquire(digest(A))
    assert world.holds(A)
    assert world.cache.counters.loads == {"host": 2, "device": 3}
    assert {(entry.digest, entry.tier) for entry in world.cache.snapshot()} == {
        (digest(A), "host"),
        (digest(B), "host"),
        (digest(A), "device"),
    }


def test_the_hosts_tier_keeps_to_its_budget() -> None:
    world = room_for(1, host_rows=17)
    world.make_resident(A, B)
    world.make_resident(A)  # the least recently used is now B
    world.make_resident(C)
    assert world.cache.used_bytes["host"] == 16 * ROW_BYTES
    assert world.cache.evictions["host"] == 1
    world.make_resident(A)
    assert world.num_reads == 3
    world.make_resident(B)
    assert world.num_reads == 4


def test_a_tier_of_nothing_keeps_nothing() -> None:
    world = room_for(1)
    world.make_resident(A, B, A)
    assert world.num_reads == 3
    assert world.cache.used_bytes["host"] == 0


def test_lookups_are_hits_and_misses_by_tier() -> None:
    world = room_for(1, host_rows=100)
    world.cache.count_lookup(digest(A))
    world.make_resident(A, B)
    world.cache.count_lookup(digest(A))
    world.cache.count_lookup(digest(B))
    assert world.cache.counters.hits == {"device": 1, "host": 1}
    assert world.cache.counters.misses == {"device": 2, "host": 1}


# Loads


def test_a_slow_file_does_not_hold_up_others() -> None:
    world = room_for(4)
    for name in (A, B):
        world.cache.request(ref(name))
    assert NUM_WORKERS > 1
    world.workers.run(1)  # the first is still being read
    world.poll()
    world.workers.run(1)
    assert world.poll().loaded == [digest(B)]


def test_no_more_is_read_ahead_than_may_wait_for_rows() -> None:
    world = room_for(1)
    for i in range(20):
        world.cache.request(ref(f"{i}:8"))
    world.workers.run_all()
    world.poll()
    world.workers.run_all()
    assert world.num_reads == MAX_UNDER_WAY


def test_a_broken_adapter_fails_alone_and_may_be_tried_again() -> None:
    world = room_for(2)
    world.broken.add(A)
    for name in (A, B):
        world.cache.request(ref(name))
    world.workers.run_all()
    arrivals = world.poll()
    assert isinstance(arrivals.failed[digest(A)], InvalidAdapter)
    world.broken.clear()
    world.cache.request(ref(A))
    assert set(world.settle()) == {digest(A), digest(B)}


def test_an_adapter_is_proven_once_and_one_that_fails_is_kept_nowhere() -> None:
    world = room_for(1, host_rows=100, prove=True)
    world.corrupt.add(C)
    world.make_resident(A, B, A, B)
    assert world.num_proofs == 2
    world.cache.request(ref(C))
    world.workers.run_all()
    world.poll()
    world.workers.run_all()
    assert isinstance(world.poll().failed[digest(C)], CanaryFailed)
    assert not world.cache.is_resident(digest(C))
    assert all(entry.digest != digest(C) for entry in world.cache.snapshot())
    world.make_resident(A)


# Who gets the rows


def test_what_arrives_stays_until_one_of_its_sequences_has_run() -> None:
    """Three wait for the room of one: each must still be there when the scheduler looks, whatever others ask."""
    world = room_for(1)
    for name in (A, B, C):
        world.cache.request(ref(name))
    for name in (A, B, C):
        assert world.settle() == [digest(name)]
        assert world.settle() == []
        assert world.cache.acquire(digest(name))
        assert world.holds(name)
        world.cache.release(digest(name))


def test_a_cancelled_waiter_gives_its_claim_back() -> None:
    world = room_for(1)
    for name in (A, B):
        world.cache.request(ref(name))
    assert world.settle() == [digest(A)]
    world.cache.forget(digest(A))
    assert world.settle() == [digest(B)]
    world.cache.forget(digest(B))


def test_a_load_that_nobody_waits_for_any_more_takes_no_rows() -> None:
    world = room_for(1)
    world.make_resident(A)
    assert world.cache.acquire(digest(A))
    for name in (B, C):
        world.cache.request(ref(name))
    world.cache.forget(digest(B))
    world.settle()
    world.cache.release(digest(A))
    assert world.settle() == [digest(C)]


def test_busy_adapters_cannot_keep_one_out() -> None:
    """Their sequences overlap, so that one of each always runs: the least recently used must let go."""
    world = room_for(2)
    world.make_resident(A, B)
    assert world.cache.acquire(digest(A))
    assert world.cache.acquire(digest(B))
    world.cache.request(ref(C))
    world.settle()
    assert not world.cache.acquire(digest(A))
    assert world.cache.acquire(digest(B)), "one that need not go is not barred"
    world.cache.release(digest(A))
    assert world.settle() == [digest(C)]
    assert not world.cache.is_resident(digest(A))


def test_a_large_adapter_is_not_passed_for_ever_by_small_ones() -> None:
    world = room_for(2)
    world.make_resident(A, B)
    assert world.cache.acquire(digest(A))
    assert world.cache.acquire(digest(B))
    large = "large:16"
    world.cache.request(ref(large))
    world.settle()
    world.cache.request(ref(C))
    world.cache.release(digest(A))
    assert world.settle() == [], "the rows of the first that left are the large one's"
    world.cache.release(digest(B))
    assert world.settle() == [digest(large)]
    assert world.cache.acquire(digest(large))
    world.cache.release(digest(large))
    assert world.settle() == [digest(C)]


def test_nothing_is_barred_for_one_that_found_room_or_was_given_up() -> None:
    world = room_for(2)
    world.make_resident(A, B)
    assert world.cache.acquire(digest(A))
    assert world.cache.acquire(digest(B))
    world.cache.request(ref(C))
    world.settle()
    assert not world.cache.is_available(digest(A))
    world.cache.release(digest(B))  # not the one that was barred
    assert world.settle() == [digest(C)]
    assert world.cache.is_available(digest(A))
    world.cache.request(ref(D))
    assert world.cache.acquire(digest(C))
    world.settle()
    assert not world.cache.is_available(digest(A))
    world.cache.forget(digest(D))
    world.settle()
    assert world.cache.is_available(digest(A))


# Pins


def test_a_pinned_adapter_is_not_evicted_until_it_is_unpinned() -> None:
    world = room_for(2)
    world.cache.load(ref(A), pin=True)
    world.settle()
    world.make_resident(B, C, D)
    assert world.cache.is_resident(digest(A))
    assert [entry.pinned for entry in world.cache.snapshot()] == [True, False]
    world.cache.unpin(digest(A))
    world.make_resident(B, C)
    assert not world.cache.is_resident(digest(A))


def test_pins_leave_room_for_another_adapter_as_large_as_the_largest() -> None:
    world = room_for(3)
    world.make_resident(B, C)
    assert world.cache.load(ref(B), pin=True)
    assert world.cache.load(ref(C), pin=True)
    world.cache.load(ref(A), pin=True)
    world.workers.run_all()
    world.poll()
    world.workers.run_all()
    arrivals = world.poll()
    assert arrivals.loaded == [digest(A)], "it is loaded, and not pinned"
    assert isinstance(arrivals.unpinned[digest(A)], PinRefused)
    with pytest.raises(PinRefused, match="unpin another"):
        world.cache.load(ref(A), pin=True)
    world.cache.request(ref("large:12"))
    world.workers.run_all()
    assert isinstance(world.poll().failed[digest("large:12")], AdapterTooLarge), "pins will not let it in"


# Unloading


def test_unload_leaves_nothing_in_either_tier() -> None:
    world = room_for(2, host_rows=100)
    world.make_resident(A)
    assert world.cache.unload(digest(A))
    assert world.cache.snapshot() == []
    assert world.cache.unload(digest(A)), "absent is fine"


def test_unload_refuses_what_is_held_or_drains_it() -> None:
    world = room_for(2)
    world.make_resident(A)
    assert world.cache.acquire(digest(A))
    with pytest.raises(AdapterInUse):
        world.cache.unload(digest(A))
    assert world.cache.acquire(digest(A)), "a refused unload changes nothing"
    assert not world.cache.unload(digest(A), drain=True)
    assert not world.cache.acquire(digest(A))
    with pytest.raises(AdapterInUse, match="being unloaded"):
        world.cache.load(ref(A))
    world.cache.release(digest(A))
    assert world.poll().unloaded == []
    assert world.holds(A)
    world.cache.release(digest(A))
    assert world.poll().unloaded == [digest(A)]
    assert world.cache.snapshot() == []


def test_unload_refuses_what_is_on_its_way_to_sequences_and_ends_what_was_only_called_for() -> None:
    world = room_for(2, host_rows=100)
    world.cache.request(ref(A))
    world.cache.load(ref(B))
    with pytest.raises(AdapterInUse, match="being loaded for requests"):
        world.cache.unload(digest(A))
    assert world.cache.unload(digest(B))
    assert world.settle() == [digest(A)]
    assert all(entry.digest == digest(A) for entry in world.cache.snapshot())


@pytest.mark.parametrize("arrives_first", [True, False])
def test_a_drain_lets_a_sequence_that_waited_run(arrives_first: bool) -> None:
    world = room_for(2, host_rows=100)
    world.cache.request(ref(A))
    if arrives_first:
        world.settle()
    assert not world.cache.unload(digest(A), drain=True)
    assert world.settle() == ([] if arrives_first else [digest(A)])
    assert world.cache.acquire(digest(A))
    assert not world.cache.acquire(digest(A)), "whoever comes later waits for it to be loaded anew"
    assert world.holds(A)
    world.cache.release(digest(A))
    assert world.poll().unloaded == [digest(A)]
    assert world.cache.snapshot() == []


def test_a_drain_ends_with_a_load_that_fails_or_that_nobody_waits_for_any_more() -> None:
    world = room_for(2, host_rows=100)
    world.broken.add(A)
    for name in (A, B):
        world.cache.request(ref(name))
        assert not world.cache.unload(digest(name), drain=True)
    world.cache.forget(digest(B))
    world.workers.run_all()
    arrivals = world.poll()
    assert set(arrivals.unloaded) == {digest(A), digest(B)}
    assert arrivals.failed.keys() == {digest(A)}
    assert world.cache.snapshot() == []
    assert not world.cache.is_loading


def test_an_adapter_unloaded_while_it_is_read_may_be_asked_for_again() -> None:
    world = room_for(2)
    world.cache.request(ref(A))
    world.workers.tasks[0][0].set_running_or_notify_cancel()  # too late to stop it
    assert not world.cache.unload(digest(A), drain=True)
    world.cache.forget(digest(A))
    assert world.poll().unloaded == [digest(A)]
    world.cache.load(ref(A))
    future, task = world.workers.tasks.pop()
    future.set_result(task())
    assert world.settle() == [digest(A)]
    world.make_resident(B)
    assert world.cache.is_resident(digest(A))


def test_an_adapter_unloaded_while_it_is_copied_does_not_arrive() -> None:
    world = room_for(2, host_rows=100)
    world.cache.load(ref(A))
    world.workers.run_all()
    world.poll()
    assert world.cache.unload(digest(A))
    assert world.settle() == []
    assert world.cache.snapshot() == []
    assert not world.cache.is_loading


def test_a_call_is_told_each_stage() -> None:
    world = room_for(1, prove=True)
    world.make_resident(B)
    assert world.cache.acquire(digest(B))
    world.cache.load(ref(A))
    told = world.cache.progress(digest(A))
    stages = [(told.stage, told.num_bytes)]
    assert world.poll().progress == []
    world.workers.run_all()
    stages += [(p.stage, p.num_bytes) for p in world.poll().progress]
    world.cache.release(digest(B))
    stages += [(p.stage, p.num_bytes) for p in world.poll().progress]
    size = world.packed(A).num_bytes
    assert stages == [(Stage.READING, 0), (Stage.WAITING, size), (Stage.COPYING, size)]
    world.workers.run_all()
    assert world.poll().loaded == [digest(A)]
