"""Which tokens of a step have which adapter, as the kernels want it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from server.kernels import RowRun, lora_decode, lora_segment, silu_mul
from server.lora.pool import PAGE_ROWS, AdapterPool, Ranges

# A run of tokens × rank rows up to this size is cheaper as one masked product than adapter by adapter.
MASKED_LIMIT = 1 << 16

# Weights of one product that are read in the time that one more run of rows takes to begin: some tens of microseconds
# on a CPU. A smaller hole between the batch's adapters is cheaper to pass over, masked, than to leave out.
HOLE_BYTES = 1 << 19


class TokenSpan(NamedTuple):
    """`length` tokens that follow each other in the batch and share an adapter; `rows` None is the base."""

    length: int
    rows: Ranges | None

    @property
    def rank(self) -> int:
        """Rank rows of the adapter; 0 for the base."""
        return sum(stop - start for start, stop in self.rows or ())


class LowRankTerm(Protocol):
    """What the adapters of a batch add to its linear layers."""

    def add(self, y: Tensor, x: Tensor, group: str, layer: int) -> None:
        """y [n, out] += the low-rank term of x [n, in], in place, for one fused product of one layer."""
        ...

    def silu_mul(self, y: Tensor, x: Tensor, layer: int) -> Tensor:
        """silu(gate) · up [n, i] of y [n, 2 · i], one layer's gate and up products of x [n, in], with their low-rank
        terms; y is used up."""
        ...


class _Segment(NamedTuple):
    start: int
    stop: int
    rows: Ranges


@dataclass(frozen=True, slots=True)
class LoraBatch:
    """The low-rank term of one step: tokens [0, mixed) by masked products over row runs, the rest by segments."""

    pool: AdapterPool
    mixed: int
    runs: tuple[RowRun, ...]
    segments: tuple[_Segment, ...]

    def add(self, y: Tensor, x: Tensor, group: str, layer: int) -> None:
        """y [n, out] += the low-rank term of x [n, in], in place, for one fused product of one layer."""
        pool = self.pool.groups[group]
        a, b, widths = pool.a[layer], [weight[layer] for weight in pool.b], pool.group.widths
        if self.runs:
            lora_decode(y[: self.mixed], x[: self.mixed], a, b, self.runs, widths)
        for start, stop, rows in self.segments:
            lora_segment(y[start:stop], x[start:stop], a, b, rows, widths)

    def silu_mul(self, y: Tensor, x: Tensor, layer: int) -> Tensor:
        """See `LowRankTerm`."""
        self.add(y, x, "gate_up", layer)
        return silu_mul(y)


def build_lora_batch(
    pool: AdapterPool, decodes: Sequence[TokenSpan], prefills: Sequence[TokenSpan]
) -> LowRankTerm | None:
    """None when no token has an adapter. Decodes come first in the batch and have length 1."""
    spans = [*decodes, *prefills]
    if pool.is_cuda:
        from server.lora.gpu_batch import build_gpu_lora_batch

        return build_gpu_lora_batch(pool, spans)
    distinct = {span.rows for span in spans if span.rows is not None}
    if not distinct:
        return None
    num_tokens = sum(span.length for span in spans)
    num_rows = sum(stop - start for rows in distinct for start, stop in rows)
    if len(distinct) == 1 and len({span.rows for span in spans}) == 1:
        return LoraBatch(pool, 0, (), (_Segment(0, num_tokens, distinct.pop()),))
    mixed_spans = spans if num_tokens * num_rows <= MASKED_LIMIT else list(decodes)
    mixed = sum(span.length for span in mixed_spans)
    device = next(iter(pool.groups.values())).a.device
    return LoraBatch(
        pool, mixed, _runs(mixed_spans, device, _hole_rows(pool)), _segments(spans[len(mixed_spans) :], mixed)
    )


def _hole_rows(pool: AdapterPool) -> int:
    """The rows whose weights, in one product, are HOLE_BYTES on average; at least the unused end of a page."""
    num_products = sum(group.a.shape[0] for group in pool.groups.values())
    return max(PAGE_ROWS, HOLE_BYTES * num_products // pool.row_bytes)


def _runs(spans: Sequence[TokenSpan], device: torch.device, hole: int) -> tuple[RowRun, ...]:
    """Rows of the spans' adapters, neighbours joined; a hole of `hole` rows or more, others' or free, splits a run."""
    ranges = sorted({piece for span in spans if span.rows is not None for piece in span.rows})
    if not ranges:
        return ()
    joined: list[tuple[int, int]] = []
    for start, stop in ranges:
        if joined and start - joined[-1][1] < hole:
            start = joined.pop()[0]
        joined.append((start, stop))
    foreign_to = {rows: _foreign(rows, joined) for rows in {span.rows for span in spans}}
    foreign = torch.cat([foreign_to[span.rows].expand(span.length, -1) for span in spans]).to(device)
    runs: list[RowRun] = []
    first = 0
    for start, stop in joined:
        runs.append(RowRun(start, stop, foreign[:, None, first : first + stop - start]))
        first += stop - start
    return tuple(runs)


def _foreign(rows: Ranges | None, joined: Sequence[tuple[int, int]]) -> Tensor:
    """[1, all rows of the runs] bool: those not in `rows`."""
    index = torch.cat([torch.arange(start, stop) for start, stop in joined])
    foreign = torch.ones(1, len(index), dtype=torch.bool)
    for start, stop in rows or ():
        foreign[0] &= (index < start) | (index >= stop)
    return foreign


def _segments(spans: Sequence[TokenSpan], first: int) -> tuple[_Segment, ...]:
    segments: list[_Segment] = []
    for span in spans:
        if span.rows is not None:
            if segments and segments[-1].rows == span.rows and segments[-1].stop == first:
                segments[-1] = segments[-1]._replace(stop=first + span.length)
            else:
                segments.append(_Segment(first, first + span.length, span.rows))
        first += span.length
    return tuple(segments)
