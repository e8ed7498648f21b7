"""Whose turn it is."""

import pytest

from server.engine.fairness import OUTPUT_WEIGHT, FairQueue
from server.engine.messages import AdapterRef, SamplingParams, StopParams
from server.engine.sequence import Sequence
from tests.engine.scheduler_world import World


def sequence(name: str, digest: str = "", at: float = 0.0) -> Sequence:
    adapter = AdapterRef(digest, "/") if digest else None
    return Sequence(name, [1], SamplingParams(seed=0), StopParams(max_tokens=1), at, adapter)


def serve(queue: FairQueue, limit: int, cost: float = 10.0) -> list[str]:
    served: list[str] = []
    for seq in queue.turns():
        if len(served) == limit:
            break
        queue.remove(seq)
        queue.charge(seq.digest, cost)
        served.append(seq.request_id)
    return served


def test_within_an_adapter_first_come_first_served() -> None:
    queue = FairQueue()
    for index in range(4):
        queue.push(sequence(f"r{index}", "a", at=index))
    assert serve(queue, 4) == ["r0", "r1", "r2", "r3"]
    assert len(queue) == 0


def test_the_adapter_served_least_goes_next() -> None:
    queue = FairQueue()
    for index in range(3):
        queue.push(sequence(f"a{index}", "a", at=index))
    for index in range(3):
        queue.push(sequence(f"b{index}", "", at=10 + index))
    assert serve(queue, 6) == ["a0", "b0", "a1", "b1", "a2", "b2"]


def test_equal_adapters_go_in_order_of_arrival() -> None:
    queue = FairQueue()
    queue.push(sequence("late", "a", at=2.0))
    queue.push(sequence("early", "b", at=1.0))
    assert serve(queue, 2) == ["early", "late"]


def test_idleness_earns_no_credit() -> None:
    queue = FairQueue()
    for index in range(10):
        queue.push(sequence(f"a{index}", "a"))
    serve(queue, 5)
    queue.push(sequence("b0", "b", at=9.0))
    assert queue.counter("b") == queue.counter("a") == 50
    queue.charge("c", 7)
    serve(queue, 10)
    queue.push(sequence("c0", "c"))
    assert queue.counter("c") == max(queue.counter("a"), queue.counter("b"))


def test_service_before_counts_against_a_returning_adapter() -> None:
    queue = FairQueue()
    queue.charge("a", 100)
    queue.push(sequence("b", "b", at=5.0))
    queue.push(sequence("a", "a", at=1.0))
    assert serve(queue, 2) == ["b", "a"]


def test_a_parked_adapter_is_passed_over_and_earns_no_credit_meanwhile() -> None:
    queue = FairQueue()
    queue.push(sequence("p", "parked"))
    queue.park("parked")
    for index in range(4):
        queue.push(sequence(f"a{index}", "a", at=1.0 + index))
    assert serve(queue, 3) == ["a0", "a1", "a2"]
    queue.unpark("parked")
    assert queue.counter("parked") == queue.counter("a") == 30
    assert serve(queue, 2) == ["p", "a3"]
    queue.check_integrity()


def test_a_parked_adapter_does_not_hold_the_level_down() -> None:
    queue = FairQueue()
    queue.push(sequence("p", "parked"))
    queue.park("parked")
    queue.push(sequence("a", "a"))
    queue.charge("a", 50)
    queue.push(sequence("b", "b"))
    assert queue.counter("b") == 50


def test_a_preempted_sequence_goes_before_its_adapters_others() -> None:
    queue = FairQueue()
    queue.push(sequence("new", "a", at=2.0))
    queue.requeue(sequence("old", "a", at=1.0))
    assert serve(queue, 2) == ["old", "new"]


def test_counters_of_long_gone_adapters_are_forgotten() -> None:
    queue = FairQueue()
    for index in range(5000):
        queue.push(sequence("r", f"adapter{index}"))
        serve(queue, 1, cost=1.0)
    assert len(queue._counters) < 2000
    queue.push(sequence("again", "adapter0"))
    queue.push(sequence("fresh", "adapter-new"))
    assert queue.counter("adapter0") == queue.counter("adapter-new") == 5000.0


@pytest.mark.parametrize("overlap", [False, True])
def test_a_busy_adapter_delays_another_by_no_more_than_what_runs(overlap: bool) -> None:
    """100 requests wait; another adapter's first starts as soon as one running ends: within max_tokens decodes."""
    world = World(resident={"a", "b"}, num_pages=200)
    for index in range(104):
        world.submit([index % 7 + 1] * 6, "a", max_tokens=10)
    for _ in range(7):
        world.step(overlap)
    seq = world.submit([3, 1], "b", max_tokens=2)
    steps = 0
    while not world.outputs[seq.request_id]:
        world.step(overlap)
        steps += 1
    assert steps <= 10 + 4
    world.drain(overlap)


def test_backlogged_adapters_get_equal_service_whatever_they_ask_for() -> None:
    """The bound of the paper's theorem: while both wait, their service differs by a constant, not with time."""
    world = World(resident={"a", "b"}, num_pages=200)
    for _ in range(150):
        world.submit([1] * 12, "a", max_tokens=2)
    for _ in range(300):
        world.submit([2] * 3, "b", max_tokens=6)
    service = {"a": 0.0, "b": 0.0}
    seen: dict[str, float] = {}
    widest = 0.0
    while len(world.scheduler._waiting.waiting("a")) > 5 and len(world.scheduler._waiting.waiting("b")) > 5:
        running = dict(world.alive)
        world.step(overlap=True)
        for request_id, seq in running.items():
            if seq.scheduled_at is not None:
                done = len(seq.prompt) - seq.num_cached + OUTPUT_WEIGHT * len(seq.output)
                service[seq.digest] += done - seen.get(request_id, 0)
                seen[request_id] = done
        widest = max(widest, abs(service["a"] - service["b"]))
    assert min(service.values()) > 600
    assert widest <= 2 * max(12, OUTPUT_WEIGHT * 4 * 6)
