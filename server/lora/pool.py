"""Device memory for adapters, in pages of rank rows.

One rank row is one row of A and the matching column of B of every adapted projection in every layer, so an
adapter of rank r takes r rows (rounded up to a page) and nothing for any other adapter's rank.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from server.base.memory import ADAPTER_PAGE_ROWS, adapter_row_bytes, adapter_rows, num_adapter_rows
from server.base.spec import ModelSpec
from server.kernels import reserve
from server.kernels.lora_rows import LoraRows
from server.lora.weights import LinearGroup, PackedAdapter, linear_groups

PAGE_ROWS = ADAPTER_PAGE_ROWS

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class GroupPool:
    """The rows of one fused product: a [layers, rows, slices, in], b one [layers, rows, out_s] a slice; `layers` are
    views of each layer's."""

    group: LinearGroup
    a: Tensor
    b: tuple[Tensor, ...]
    layers: tuple[LoraRows, ...]

    @classmethod
    def reserve(
        cls, group: LinearGroup, num_layers: int, num_rows: int, dtype: torch.dtype, device: torch.device
    ) -> "GroupPool":
        shape = (num_layers, num_rows)
        a = reserve((*shape, len(group.modules), group.in_features), dtype, device)
        b = tuple(reserve((*shape, width), dtype, device) for width in group.widths)
        layers = zip(a.unbind(), *(weight.unbind() for weight in b), strict=True)
        return cls(group, a, b, tuple(LoraRows.of(first, others) for first, *others in layers))


class AdapterPool:
    """Rank rows on the device. Allocation belongs to the step loop, writing to whoever holds the rows."""

    def __init__(self, spec: ModelSpec, num_bytes: int, dtype: torch.dtype, device: torch.device) -> None:
        groups = linear_groups(spec)
        self.dtype = dtype
        self.is_cuda = device.type == "cuda"
        self.row_bytes = adapter_row_bytes(spec, dtype.itemsize)
        self.num_rows = num_adapter_rows(num_bytes, self.row_bytes)
        self.groups = {
            group.name: GroupPool.reserve(group, spec.num_layers, self.num_rows, dtype, device) for group in groups
        }
        self._free = [True] * (self.num_rows // PAGE_ROWS)
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def num_free_rows(self) -> int:
        return sum(self._free) * PAGE_ROWS

    def rows_for(self, rank: int) -> int:
        """Rows that an adapter of this rank takes."""
        return adapter_rows(rank)

    def allocate(self, rank: int) -> Ranges | None:
        """Row ranges [start, stop) of `rank` rows in all, or None when there is no room.

        The lowest hole that holds them all is taken, as neighbours share one product; failing that, pages
        from several holes.
        """
        pages = self._lowest_hole(-(-rank // PAGE_ROWS))
        if pages is None:
            return None
        for page in pages:
            self._free[page] = False
        return _ranges(pages, rank)

    def free(self, ranges: Ranges) -> None:
        """Give an adapter's rows back. Their values stay until they are written again."""
        for start, stop in ranges:
            for page in range(start // PAGE_ROWS, -(-stop // PAGE_ROWS)):
                assert not self._free[page], f"adapter page {page} freed twice"
                self._free[page] = True

    def negate(self, ranges: Ranges) -> None:
        """Change the sign of what an adapter adds, while nobody reads it; doing it again gives the same bits back. The
        rows are written when this returns."""
        for pool in self.groups.values():
            for b in pool.b:
                for start, stop in ranges:
                    b[:, start:stop].neg_()
        if self.is_cuda:
            torch.cuda.current_stream().synchronize()  # a kernel that is launched early may read ahead

    def write(self, ranges: Ranges, adapter: PackedAdapter) -> None:
        """Copy an adapter into rows that nobody reads yet; may run on another thread than the step loop, and beside
        it: on a GPU in a stream of its own. The rows are written when this returns."""
        with torch.cuda.stream(self._copies):  # None: no stream
            self._copy(ranges, adapter)
        if self._copies is not None:
            self._copies.synchronize()

    def _copy(self, ranges: Ranges, adapter: PackedAdapter) -> None:
        first = 0
        for start, stop in ranges:
            rows = slice(first, first + stop - start)
            for name, pool in self.groups.items():
                pool.a[:, start:stop].copy_(adapter.a[name][:, rows], non_blocking=True)
                for mine, theirs in zip(pool.b, adapter.b[name], strict=True):
                    mine[:, start:stop].copy_(theirs[:, rows], non_blocking=True)
            first = rows.stop
        assert first == adapter.rank, f"{first} rows for an adapter of rank {adapter.rank}"

    def _lowest_hole(self, count: int) -> list[int] | None:
        free = [page for page, is_free in enumerate(self._free) if is_free]
        if len(free) < count:
            return None
        for first in range(len(free) - count + 1):
            if free[first + count - 1] - free[first] == count - 1:
                return free[first : first + count]
        return free[:count]


def _ranges(pages: list[int], rank: int) -> Ranges:
    """Neighbouring pages as one range of rows; the last page may be used in part."""
    ranges: list[tuple[int, int]] = []
    left = rank
    for page in pages:
        start = page * PAGE_ROWS
        stop = start + min(PAGE_ROWS, left)
        left -= stop - start
        if ranges and ranges[-1][1] == start:
            start = ranges.pop()[0]
        ranges.append((start, stop))
    return tuple(ranges)
