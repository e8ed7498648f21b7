"""The low-rank term of a batch: y_i += B_a(i) (A_a(i) x_i), where a(i) is the adapter of row i.

Hu et al., 2021 (arXiv 2106.09685); many adapters in one batch: Chen et al., 2023 (Punica, arXiv 2310.18547) and
Sheng et al., 2023 (S-LoRA, arXiv 2311.03285). A pool holds rank rows: row r of `a` is one row of some adapter's A,
row r of `b` the matching column of its B with the scaling (alpha / rank) multiplied in. An adapter owns as many
rows as its rank, so ranks are ragged and nothing is padded.

    a  [rows, slices, in]     the fused layer's projections (q, k, v) side by side
    b  one [rows, out_s] a slice

Rows of the pool that nobody owns must be finite: they meet a zero, never a NaN.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from server.kernels.lora_blocks import LoraBlocks


class RowRun(NamedTuple):
    """Pool rows [start, stop) and foreign [n, 1, stop − start]: which of them are not of each token's adapter."""

    start: int
    stop: int
    foreign: Tensor


def lora_decode(
    y: Tensor, x: Tensor, a: Tensor, b: Sequence[Tensor], runs: Sequence[RowRun], widths: Sequence[int]
) -> None:
    """Add the low-rank term of tokens with any mix of adapters to y [n, sum(widths)], in place; x is [n, in].

    Semantics, for each token i, slice s and pool row r that its adapter owns:
        y[i, slice s] += (x[i] · a[r, s]) · b[s][r]
    One product over a run of rows serves all its adapters: every weight is read once, and what a token computes
    with rows it does not own is dropped before the second product.
    """
    n, num_slices = x.shape[0], a.shape[1]
    for run in runs:
        rows = run.stop - run.start
        h = (x @ a[run.start : run.stop].reshape(rows * num_slices, -1).t()).view(n, rows, num_slices)
        h = h.transpose(1, 2).masked_fill(run.foreign, 0)  # [n, slices, rows]
        _expand(y, h, [weight[run.start : run.stop] for weight in b], widths)


def lora_segment(
    y: Tensor, x: Tensor, a: Tensor, b: Sequence[Tensor], rows: Sequence[tuple[int, int]], widths: Sequence[int]
) -> None:
    """The same for tokens of one adapter, which owns the pool rows of all ranges in `rows`."""
    num_slices = a.shape[1]
    for start, stop in rows:
        h = (x @ a[start:stop].reshape((stop - start) * num_slices, -1).t()).view(-1, stop - start, num_slices)
        _expand(y, h.transpose(1, 2), [weight[start:stop] for weight in b], widths)


def lora_add(
    y: Tensor, x: Tensor, a: Tensor, b: Sequence[Tensor], blocks: LoraBlocks, widths: Sequence[int], scratch: Tensor
) -> None:
    """The same for tokens grouped in `blocks`, the form that GPUs take: y [n, sum(widths)] in place, x [n, in].

    Semantics, for each block, its tokens t, its adapter's pool rows r and each slice s:
        y[t, slice s] += (x[t] @ a[r, s].T) @ b[s][r]
    `scratch` is for kernels that pass the inner product through memory; it is not used here.
    """
    tables = (table[: blocks.num_blocks] for table in (blocks.start, blocks.length, blocks.first_row, blocks.rank))
    for start, length, first_row, rank in zip(*(table.tolist() for table in tables), strict=True):
        if length == 0:
            continue
        token = blocks.token_index[start : start + length]
        row = blocks.row_index[first_row : first_row + rank]
        part = y[token]
        h = (x[token] @ a[row].flatten(0, 1).t()).view(length, rank, -1)
        _expand(part, h.transpose(1, 2), [weight[row] for weight in b], widths)
        y[token] = part


def _expand(y: Tensor, h: Tensor, b: Sequence[Tensor], widths: Sequence[int]) -> None:
    """y[:, slice s] += h[:, s] b[s] for h [n, slices, rows]."""
    first = 0
    for s, width in enumerate(widths):
        part = y[:, first : first + width]
        part += torch.mm(h[:, s], b[s])
        first += width
