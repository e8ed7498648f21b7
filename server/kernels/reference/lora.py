"""The low-rank term of a batch: y_i += B_a(i) (A_a(i) x_i), where a(i) is the adapter of row i.

Hu et al., 2021 (arXiv 2106.09685); many adapters in one batch: Chen et al., 2023 (Punica, arXiv 2310.18547) and
Sheng et al., 2023 (S-LoRA, arXiv 2311.03285). A pool holds rank rows: row r of `a` is one row of some adapter's A,
row r of `b` the matching column of its B with the scaling (alpha / rank) multiplied in. An adapter owns as many
rows as its rank, so ranks are ragged and nothing is padded.

    a  [rows, slices, in]     the fused layer's projections (q, k, v) side by side
    b  one [rows, out_s] a slice
"""

from collections.abc import Sequence

from torch import Tensor

from server.kernels.lora_blocks import LoraBlocks


def lora_segment(
    y: Tensor, x: Tensor, a: Tensor, b: Sequence[Tensor], rows: Sequence[tuple[int, int]], widths: Sequence[int]
) -> None:
    """Add the low-rank term of tokens of one adapter to y [n, sum(widths)], in place; x is [n, in]. The adapter owns
    the pool rows of all ranges in `rows`.

    Semantics, for each slice s and pool row r of the adapter:
        y[:, slice s] += (x @ a[r, s]) · b[s][r]
    """
    num_slices = a.shape[1]
    for start, stop in rows:
        h = (x @ a[start:stop].view((stop - start) * num_slices, -1).t()).view(-1, stop - start, num_slices)
        first = 0
        for s, width in enumerate(widths):
            y[:, first : first + width].addmm_(h[:, :, s], b[s][start:stop])
            first += width


def lora_add(
    y: Tensor, x: Tensor, a: Tensor, b: Sequence[Tensor], blocks: LoraBlocks, widths: Sequence[int], scratch: Tensor
) -> None:
    """The same for tokens grouped in `blocks`, of any mix of adapters: y [n, sum(widths)] in place, x [n, in].

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
        lora_segment(part, x[token], a[row], [weight[row] for weight in b], ((0, rank),), widths)
        y[token] = part
