"""Adapters that compete for too little memory all get their turn."""

import time
from collections.abc import Callable
from pathlib import Path

import torch

from server.engine.adapter_cache import AdapterCache
from server.engine.messages import AdapterRef
from server.lora.pool import PAGE_ROWS, AdapterPool
from server.lora.weights import PackedAdapter
from tests.kernels.test_lora import SPEC, random_adapter

RANK = 2 * PAGE_ROWS
LARGE = "large"  # the directory of one of twice the RANK; all others have RANK


def cache_for(num_adapters: int) -> AdapterCache:
    """Room for so many adapters of RANK."""
    row_bytes = AdapterPool(SPEC, 0, torch.float32, torch.device("cpu")).row_bytes
    pool = AdapterPool(SPEC, num_adapters * RANK * row_bytes, torch.float32, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    packed = random_adapter(RANK, torch.float32, generator)
    large = random_adapter(2 * RANK, torch.float32, generator)

    def load(directory: Path) -> PackedAdapter:
        return large if directory.name == LARGE else packed

    return AdapterCache(pool, load)


def test_what_arrives_can_be_leased_before_another_takes_its_rows() -> None:
    """Three wait for the room of one: each that arrives must still be there when the scheduler looks."""
    cache = cache_for(1)
    refs = [AdapterRef(f"sha256:{i}", f"adapter-{i}") for i in range(3)]
    leased: dict[str, int] = {ref.digest: 0 for ref in refs}
    num_arrivals = 0
    while num_arrivals < 300:
        for ref in refs:
            cache.request(ref)
        for digest in cache.poll().loaded:
            num_arrivals += 1
            assert cache.acquire(digest), "it was evicted before anyone could use it"
            cache.release(digest)
            leased[digest] += 1
        cache.check_integrity()
    assert min(leased.values()) > 50
    cache.close()


def ref(name: str) -> AdapterRef:
    return AdapterRef(f"sha256:{name}", name)


def poll_until(cache: AdapterCache, happened: Callable[[list[str]], bool]) -> None:
    """Poll, as the step loop does, until `happened` says so of what arrived."""
    deadline = time.monotonic() + 30
    while not happened(cache.poll().loaded):
        assert time.monotonic() < deadline
        cache.check_integrity()


def make_resident(cache: AdapterCache, *names: str) -> None:
    for name in names:
        cache.request(ref(name))
        poll_until(cache, lambda loaded, name=name: ref(name).digest in loaded)


def make_busy(cache: AdapterCache, *names: str) -> None:
    """Each is resident and held by one sequence; the first is the least recently used."""
    make_resident(cache, *names)
    for name in names:
        assert cache.acquire(ref(name).digest)


def can_be_leased(cache: AdapterCache, *names: str) -> list[str]:
    """Those that a new sequence could lease now. Leaves the order of use as it was if `names` are in that order."""
    leased = [name for name in names if cache.acquire(ref(name).digest)]
    for name in leased:
        cache.release(ref(name).digest)
    return leased


def test_busy_adapters_cannot_keep_one_out() -> None:
    """Their sequences overlap, so that one of each always runs: the least recently used must let go."""
    cache = cache_for(2)
    make_busy(cache, "a", "b")
    cache.request(ref("c"))
    poll_until(cache, lambda _: can_be_leased(cache, "a", "b") == ["b"])
    cache.release("sha256:a")
    poll_until(cache, lambda loaded: loaded == ["sha256:c"])
    assert can_be_leased(cache, "a", "b", "c") == ["b", "c"]
    cache.close()


def test_a_large_adapter_is_not_passed_for_ever_by_small_ones() -> None:
    cache = cache_for(2)
    make_busy(cache, "a", "b")
    cache.request(ref(LARGE))
    poll_until(cache, lambda _: can_be_leased(cache, "a", "b") == [])
    cache.request(ref("c"))
    cache.release("sha256:a")
    for _ in range(100):
        assert cache.poll().loaded == [], "the rows that come free are the large one's"
    cache.release("sha256:b")
    poll_until(cache, lambda loaded: loaded == [ref(LARGE).digest])
    cache.forget(ref(LARGE).digest)
    poll_until(cache, lambda loaded: loaded == ["sha256:c"])
    cache.close()


def test_nothing_drains_for_one_that_found_room() -> None:
    cache = cache_for(2)
    make_busy(cache, "a", "b")
    cache.request(ref("c"))
    poll_until(cache, lambda _: can_be_leased(cache, "a", "b") == ["b"])
    cache.release("sha256:b")  # not the one that was drained
    poll_until(cache, lambda loaded: loaded == ["sha256:c"])
    assert can_be_leased(cache, "a", "b", "c") == ["a", "c"]
    cache.close()
