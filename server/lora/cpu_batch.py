"""The low-rank term of a step on a CPU: few tokens by one call of a kernel, many of one adapter by matrix products."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from server.kernels import lora_segment, silu_mul
from server.kernels.cpu.lora import BlockTables, compiled, lora_add
from server.kernels.lora_blocks import LoraBlocksShape, count_blocks
from server.lora.batch import TokenSpan
from server.lora.pool import AdapterPool, Ranges

# Neighbouring tokens of an adapter × its rank, from which on matrix products are faster than the kernel, whose work
# grows with it from next to nothing.
PRODUCT_SIZE = 1024

BLOCK_TOKENS = 64


class Segment(NamedTuple):
    """Tokens [start, stop) of a batch and the rows of their adapter."""

    start: int
    stop: int
    rows: Ranges


@dataclass(frozen=True, slots=True)
class CpuLoraBatch:
    """The term of one step: tokens of `tables` by the kernel, the others that have an adapter by segments."""

    pool: AdapterPool
    tables: BlockTables | None
    segments: tuple[Segment, ...]

    def add(self, y: Tensor, x: Tensor, group: str, layer: int) -> None:
        """y [n, out] += the low-rank term of x [n, in], in place, for one fused product of one layer."""
        entry = self.pool.groups[group]
        layer_rows = entry.layers[layer]
        if self.tables is not None:
            lora_add(y, x, layer_rows, self.tables)
        for start, stop, rows in self.segments:
            lora_segment(y[start:stop], x[start:stop], layer_rows.a, layer_rows.b, rows, entry.group.widths)

    def silu_mul(self, y: Tensor, x: Tensor, layer: int) -> Tensor:
        """See `LowRankTerm`."""
        self.add(y, x, "gate_up", layer)
        return silu_mul(y)


def build_cpu_lora_batch(pool: AdapterPool, spans: Sequence[TokenSpan]) -> CpuLoraBatch:
    """The term of a step in which some token has an adapter."""
    few: list[TokenSpan] = []
    segments: list[Segment] = []
    first = 0
    for span in _joined(spans):
        if span.rows is not None and span.length * span.rank >= PRODUCT_SIZE:
            segments.append(Segment(first, first + span.length, span.rows))
            span = span._replace(rows=None)
        few.append(span)
        first += span.length
    return CpuLoraBatch(pool, _tables(few), tuple(segments))


def warm_up(pool: AdapterPool) -> None:
    """Compile the kernel, or load it, before requests wait for it."""
    compiled(pool.dtype)


def _joined(spans: Sequence[TokenSpan]) -> list[TokenSpan]:
    """Neighbours of one adapter as one span."""
    joined: list[TokenSpan] = []
    for span in spans:
        if joined and joined[-1].rows == span.rows:
            span = span._replace(length=joined.pop().length + span.length)
        joined.append(span)
    return joined


def _tables(spans: Sequence[TokenSpan]) -> BlockTables | None:
    if all(span.rows is None for span in spans):
        return None
    lengths, rows = [span.length for span in spans], [span.rows for span in spans]
    ranks = {span.rows: span.rank for span in spans}
    shape = LoraBlocksShape(
        tokens=sum(lengths),
        rows=sum(ranks.values()),
        blocks=count_blocks(lengths, rows, BLOCK_TOKENS),
        block_tokens=BLOCK_TOKENS,
        max_rank=max(ranks.values()),
    )
    packed = torch.zeros(shape.size, dtype=torch.int32)
    shape.fill(packed.numpy(), lengths, rows)
    return BlockTables.of(shape.view(packed))
