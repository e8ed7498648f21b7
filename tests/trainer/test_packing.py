"""Bins: everything once, nothing too full, and as few as the lengths allow, near enough."""

from hypothesis import given
from hypothesis import strategies as st

from trainer.packing import pack


@given(st.lists(st.integers(1, 64), max_size=200))
def test_every_row_is_in_one_bin_and_no_bin_overflows(lengths: list[int]) -> None:
    bins = pack(lengths, 64)
    assert sorted(index for part in bins for index in part) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in part) <= 64 for part in bins)
    assert len(bins) <= 11 / 9 * -(-sum(lengths) // 64) * 2 + 1  # far within what best fit can need
    assert sum(sum(lengths[i] for i in part) <= 32 for part in bins) <= 1  # two half-empty bins would be one


def test_the_best_fit_is_taken_and_the_count_needs_only_lengths() -> None:
    assert pack([5, 7, 3, 5], 10) == [[1, 2], [0, 3]]
    assert len(pack([4, 6, 5, 5, 1, 9], 10)) == len(pack([9, 1, 5, 6, 5, 4], 10)) == 3
