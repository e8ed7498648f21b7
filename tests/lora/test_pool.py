"""Rank rows are given out and taken back without loss, overlap or padding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.lora.pool import PAGE_ROWS, AdapterPool
from tests.kernels.test_lora import SPEC, random_adapter


def make_pool(pages: int) -> AdapterPool:
    row_bytes = AdapterPool(SPEC, 0, torch.float32, torch.device("cpu")).row_bytes
    return AdapterPool(SPEC, pages * PAGE_ROWS * row_bytes, torch.float32, torch.device("cpu"))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.one_of(st.integers(1, 40), st.sampled_from(["free"])), max_size=60), st.randoms(use_true_random=False)
)
def test_rows_are_disjoint_and_none_is_lost(actions: list[int | str], rng: object) -> None:
    pool = make_pool(30)
    held: list[tuple[tuple[int, int], ...]] = []
    for action in actions:
        if isinstance(action, str):
            if held:
                pool.free(held.pop(rng.randrange(len(held))))  # type: ignore[attr-defined]
            continue
        free_before = pool.num_free_rows
        ranges = pool.allocate(action)
        assert (ranges is None) == (free_before < pool.rows_for(action))
        if ranges is not None:
            assert sum(stop - start for start, stop in ranges) == action
            held.append(ranges)
        rows = [row for ranges in held for start, stop in ranges for row in range(start, stop)]
        assert len(rows) == len(set(rows))
        assert all(0 <= row < pool.num_rows for row in rows)
    for ranges in held:
        pool.free(ranges)
    assert pool.num_free_rows == pool.num_rows


def test_memory_is_the_tensors() -> None:
    pool = make_pool(5)
    tensors = [tensor for group in pool.groups.values() for tensor in (group.a, *group.b)]
    assert sum(t.numel() * t.element_size() for t in tensors) == pool.num_rows * pool.row_bytes


def test_freeing_twice_is_caught() -> None:
    pool = make_pool(2)
    ranges = pool.allocate(3)
    assert ranges is not None
    pool.free(ranges)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(ranges)


def test_a_write_touches_its_rows_only() -> None:
    pool = make_pool(4)
    first, second = pool.allocate(5), pool.allocate(6)
    assert first is not None
    assert second is not None
    pool.write(second, random_adapter(6, torch.float32, torch.Generator().manual_seed(0)))
    for group in pool.groups.values():
        for tensor in (group.a, *group.b):
            written = tensor.flatten(2).abs().sum(dim=(0, 2)) > 0
            assert written.tolist() == [second[0][0] <= row < second[0][1] for row in range(pool.num_rows)]
