"""Which rows share a sequence."""

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indexes of `lengths` in bins of at most `capacity` tokens: best fit, longest first (Ding et al. 2024,
    arXiv 2404.10830). Equal lengths go in the order given. How many bins there are depends on the lengths alone.

    No length may exceed `capacity`.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, bin), rising
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        assert length <= capacity, f"row {index} has {length} tokens, a bin {capacity}"
        best = bisect_left(room, (length, -1))
        if best == len(room):
            bins.append([index])
            insort(room, (capacity - length, len(bins) - 1))
        else:
            free, number = room.pop(best)
            bins[number].append(index)
            insort(room, (free - length, number))
    return bins
