"""Adapters that compete for too little memory all get their turn."""

from pathlib import Path

import torch

from server.engine.adapter_cache import AdapterCache
from server.engine.messages import AdapterRef
from server.lora.pool import PAGE_ROWS, AdapterPool
from server.lora.weights import PackedAdapter
from tests.kernels.test_lora import SPEC, random_adapter

RANK = 2 * PAGE_ROWS


def cache_for(num_adapters: int) -> AdapterCache:
    """Room for so many adapters of RANK, which every directory has."""
    row_bytes = AdapterPool(SPEC, 0, torch.float32, torch.device("cpu")).row_bytes
    pool = AdapterPool(SPEC, num_adapters * RANK * row_bytes, torch.float32, torch.device("cpu"))
    packed = random_adapter(RANK, torch.float32, torch.Generator().manual_seed(0))

    def load(directory: Path) -> PackedAdapter:
        return packed

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
