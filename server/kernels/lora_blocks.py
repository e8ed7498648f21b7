"""Tokens of a step grouped by adapter, as the GPU's low-rank kernels want them.

The tables lie in one int32 buffer of fixed layout: a step fills it on the host and makes one copy to the device,
and a CUDA graph captured over the device's copy serves every batch that fits the same shape.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

Ranges = tuple[tuple[int, int], ...]
Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class LoraBlocks:
    """Block i is tokens token_index[start[i] : start[i] + length[i]], at most `block_tokens`, all of one adapter,
    whose pool rows are row_index[first_row[i] : first_row[i] + rank[i]]. A block of length 0 does nothing.

    A token is in one block or, if it has no adapter, in none of the first `num_blocks`, but perhaps in one of rank 0 of
    the `base_blocks` after them, for what takes every token. Ranks are at most `max_rank`.
    """

    token_index: Tensor  # [tokens] int32
    start: Tensor  # [num_blocks + base_blocks] int32, like the next three
    length: Tensor
    first_row: Tensor
    rank: Tensor
    row_index: Tensor  # [rows] int32
    count: Tensor  # [1] int32: how many blocks come before the first of length 0
    block_tokens: int
    num_blocks: int
    max_rank: int
    base_blocks: int = 0


@dataclass(frozen=True, slots=True)
class LoraBlocksShape:
    """How much a set of tables holds, and where each lies in the packed buffer."""

    tokens: int
    rows: int
    blocks: int
    block_tokens: int
    max_rank: int
    base_blocks: int = 0

    @property
    def all_blocks(self) -> int:
        return self.blocks + self.base_blocks

    @property
    def size(self) -> int:
        """Of the packed buffer, in int32 words."""
        return 4 * self.all_blocks + self.tokens + self.rows + 1

    def view(self, packed: Tensor) -> LoraBlocks:
        """The tables in `packed` [size] int32, on any device, without a copy."""
        assert packed.shape == (self.size,), f"{tuple(packed.shape)} words for tables of {self.size}"
        start, length, first_row, rank, token_index, row_index, count = packed.split(
            [self.all_blocks] * 4 + [self.tokens, self.rows, 1]
        )
        return LoraBlocks(
            token_index,
            start,
            length,
            first_row,
            rank,
            row_index,
            count,
            block_tokens=self.block_tokens,
            num_blocks=self.blocks,
            max_rank=self.max_rank,
            base_blocks=self.base_blocks,
        )

    def fill(self, packed: Int32Array, lengths: Sequence[int], rows: Sequence[Ranges | None]) -> int:
        """Write the tables of a batch into `packed` [size] and return how many blocks they take.

        The batch is `lengths[i]` tokens, one span after another, with the adapter that owns the pool rows `rows[i]`;
        None is the base. Blocks not taken get length 0.
        """
        assert packed.shape == (self.size,), f"{packed.shape} words for tables of {self.size}"
        groups: dict[Ranges, list[tuple[int, int]]] = {}
        base: list[tuple[int, int]] = []
        first = 0
        for length, ranges in zip(lengths, rows, strict=True):
            (base if ranges is None else groups.setdefault(ranges, [])).append((first, length))
            first += length
        token_index, row_index = np.split(packed[4 * self.all_blocks : -1], [self.tokens])
        table: list[tuple[int, int, int, int]] = []
        pool_rows: list[int] = []
        num_tokens = 0
        for ranges, pieces in groups.items():
            first_row = len(pool_rows)
            for begin, end in ranges:
                pool_rows.extend(range(begin, end))
            rank = len(pool_rows) - first_row
            assert rank <= self.max_rank, f"rank {rank} in tables for {self.max_rank}"
            begin = num_tokens
            num_tokens = _write_tokens(token_index, begin, pieces)
            table += self._blocks_of(begin, num_tokens, first_row, rank)
        assert len(pool_rows) <= self.rows, f"{len(pool_rows)} rank rows in tables for {self.rows}"
        row_index[: len(pool_rows)] = pool_rows
        assert len(table) <= self.blocks, f"{len(table)} blocks in tables for {self.blocks}"
        columns = packed[: 4 * self.all_blocks].reshape(4, self.all_blocks)
        columns[1] = 0
        if table:
            columns[:, : len(table)] = np.array(table, dtype=np.int32).T
        packed[-1] = len(table)
        if self.base_blocks:
            rest = self._blocks_of(num_tokens, _write_tokens(token_index, num_tokens, base), 0, 0)
            assert len(rest) <= self.base_blocks, f"{len(rest)} blocks of the base in tables for {self.base_blocks}"
            if rest:
                columns[:, self.blocks : self.blocks + len(rest)] = np.array(rest, dtype=np.int32).T
        return len(table)

    def _blocks_of(self, begin: int, end: int, first_row: int, rank: int) -> list[tuple[int, int, int, int]]:
        """The tokens token_index[begin:end], which share an adapter, as lines of the table."""
        step = self.block_tokens
        return [(start, min(step, end - start), first_row, rank) for start in range(begin, end, step)]


def count_blocks(lengths: Sequence[int], rows: Sequence[Ranges | None], block_tokens: int) -> int:
    """How many blocks `fill` would take for the batch."""
    tokens: dict[Ranges, int] = {}
    for length, ranges in zip(lengths, rows, strict=True):
        if ranges is not None:
            tokens[ranges] = tokens.get(ranges, 0) + length
    return sum(-(-count // block_tokens) for count in tokens.values())


def _write_tokens(token_index: Int32Array, first: int, pieces: Sequence[tuple[int, int]]) -> int:
    """Write the tokens of `pieces` (first token, count) from token_index[first] on; where they end."""
    for token, length in pieces:
        assert first + length <= len(token_index), f"more tokens than the tables' {len(token_index)}"
        if length == 1:
            token_index[first] = token
        else:
            token_index[first : first + length] = np.arange(token, token + length, dtype=np.int32)
        first += length
    return first
