"""The low-rank term of a batch in two launches: shrink, h = A x for all slices, then expand, y += B h.

The kernels here are a prefill's; those of a decode are in `lora_decode`.

After Punica (Chen et al., 2023, arXiv 2310.18547) and S-LoRA (Sheng et al., 2023, arXiv 2311.03285), over blocks of
tokens that share an adapter. Both launches read an adapter's true rank through its row table, in tiles of 16. The
input features of the shrink are split over programs; each writes its part of h to scratch and the expand sums the
parts in order, so that a result does not depend on which program came first. Nothing here waits for the device.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.kernels.lora_blocks import LoraBlocks
from server.kernels.triton.lora_decode import MAX_SLICES, decode_expand, decode_shrink
from server.kernels.triton.plans import AnyPlan, DecodePlan, lora_plan

# Not by alignment or value: the tables' places in their buffer change with the batch, and each variant is a
# compilation of seconds in the midst of serving.
_UNSPECIALIZED = [
    "token_index",
    "row_index",
    "starts",
    "lengths",
    "first_rows",
    "ranks",
    "split_steps",
]


def lora_add(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Sequence[Tensor],
    blocks: LoraBlocks,
    widths: Sequence[int],
    scratch: Tensor,
    plan: AnyPlan | None = None,
) -> None:
    """Add the low-rank term to y [n, sum(widths)] in place, as `reference.lora.lora_add` defines it.

    x [n, in], a [rows, slices, in] and b[s] [rows, widths[s]] have y's dtype; h is rounded to it between the two
    products, which accumulate in float32. `scratch` is float32, of `lora_scratch_size` elements, and may hold anything.
    """
    plan = plan or lora_plan(x.shape[1], widths, blocks.num_blocks, blocks.block_tokens, x.device)
    lora_shrink(x, a, blocks, scratch, plan)
    lora_expand(y, b, blocks, x.shape[1], scratch, plan)


def lora_shrink(x: Tensor, a: Tensor, blocks: LoraBlocks, scratch: Tensor, plan: AnyPlan) -> None:
    """scratch [splits, tokens, slices, max_rank] = parts of A x, for tokens in the order of `blocks.token_index`."""
    assert a.is_contiguous(), "a's rows must follow each other"
    assert x.stride(1) == 1, "x must be contiguous along its features"
    assert a.dtype == x.dtype, f"{a.dtype} weights for {x.dtype} input"
    if isinstance(plan, DecodePlan):
        decode_shrink(x, a, blocks, scratch, plan)
        return
    shrink, (num_slices, in_features) = plan.shrink, a.shape[1:]
    assert scratch.numel() >= shrink.splits * _split_stride(blocks, num_slices), "scratch is too small for the plan"
    steps = triton.cdiv(in_features, shrink.block_k)
    _shrink_kernel[(blocks.num_blocks, shrink.programs, shrink.splits)](
        x,
        a,
        scratch,
        *_tables(blocks),
        x.stride(0),
        _split_stride(blocks, num_slices),
        triton.cdiv(steps, shrink.splits),
        blocks.max_rank,
        IN=in_features,
        SLICES=num_slices,
        BLOCK_M=max(16, blocks.block_tokens),
        BLOCK_K=shrink.block_k,
        BLOCK_R=shrink.block_r,
        PROGRAMS=shrink.programs,
        WIDEN=_widens(x),
        num_warps=shrink.num_warps,
        num_stages=shrink.num_stages,
    )


def lora_expand(
    y: Tensor, b: Sequence[Tensor], blocks: LoraBlocks, in_features: int, scratch: Tensor, plan: AnyPlan
) -> None:
    """y += B h, with h the sum of the parts in scratch, which the shrink made of `in_features`."""
    assert len(b) <= MAX_SLICES, f"{len(b)} slices"
    assert all(weight.is_contiguous() and weight.dtype == y.dtype for weight in b), "b must be contiguous, of y's dtype"
    assert y.stride(1) == 1, "y must be contiguous along its features"
    if isinstance(plan, DecodePlan):
        decode_expand(y, b, blocks, in_features, scratch, plan)
        return
    expand, num_slices, widths = plan.expand, len(b), [weight.shape[1] for weight in b]
    column_tiles = sum(triton.cdiv(width, expand.block_n) for width in widths)
    padded = [*widths, *[0] * (MAX_SLICES - num_slices)]
    _expand_kernel[(column_tiles, blocks.num_blocks)](
        y,
        *b,
        *[b[0]] * (MAX_SLICES - num_slices),
        scratch,
        *_tables(blocks),
        y.stride(0),
        _split_stride(blocks, num_slices),
        blocks.max_rank,
        W0=padded[0],
        W1=padded[1],
        W2=padded[2],
        SLICES=num_slices,
        SPLITS=plan.shrink.splits,
        BLOCK_M=max(16, blocks.block_tokens),
        BLOCK_N=expand.block_n,
        BLOCK_R=expand.block_r,
        WIDEN=_widens(y),
        num_warps=expand.num_warps,
        num_stages=expand.num_stages,
    )


def _tables(blocks: LoraBlocks) -> tuple[Tensor, ...]:
    return blocks.token_index, blocks.row_index, blocks.start, blocks.length, blocks.first_row, blocks.rank


def _split_stride(blocks: LoraBlocks, num_slices: int) -> int:
    return blocks.token_index.shape[0] * num_slices * blocks.max_rank


def _widens(x: Tensor) -> bool:
    """Whether products must be given float32: the interpreter keeps bfloat16 as integers, and multiplies those."""
    return x.dtype is torch.bfloat16 and bool(triton.knobs.runtime.interpret)


@triton.jit
def _dot(left, right, acc, WIDEN: tl.constexpr):
    if WIDEN:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, acc, input_precision="ieee")


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _shrink_kernel(
    x,
    a,
    h,
    token_index,
    row_index,
    starts,
    lengths,
    first_rows,
    ranks,
    x_stride,
    split_stride,
    split_steps,
    max_rank,
    IN: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PROGRAMS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Grid (blocks, PROGRAMS, splits). Rank rows of all slices are counted through: f = row · SLICES + slice."""
    block = tl.program_id(0)
    length = tl.load(lengths + block)
    start = tl.load(starts + block)
    first_row = tl.load(first_rows + block)
    rank = tl.load(ranks + block)
    if length == 0:
        return
    tokens = tl.arange(0, BLOCK_M)
    is_token = tokens < length
    token = tl.load(token_index + start + tokens, mask=is_token, other=0).to(tl.int64)
    split = tl.program_id(2)
    first_step = split * split_steps
    last_step = tl.minimum(first_step + split_steps, (IN + BLOCK_K - 1) // BLOCK_K)
    features = tl.arange(0, BLOCK_K)
    for f0 in range(tl.program_id(1) * BLOCK_R, rank * SLICES, PROGRAMS * BLOCK_R):
        f = f0 + tl.arange(0, BLOCK_R)
        is_row = f < rank * SLICES
        row = tl.load(row_index + first_row + f // SLICES, mask=is_row, other=0).to(tl.int64)
        x_tile = x + token[:, None] * x_stride + features[None, :]
        a_tile = a + (row * SLICES + f % SLICES)[:, None] * IN + features[None, :]
        acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        for step in range(first_step, last_step):
            k = step * BLOCK_K  # a multiple of BLOCK_K, which the compiler must see to make wide loads
            if IN % BLOCK_K == 0:
                xs = tl.load(x_tile + k, mask=is_token[:, None], other=0.0)
                weights = tl.load(a_tile + k, mask=is_row[:, None], other=0.0)
            else:
                is_feature = (features < IN - k)[None, :]
                xs = tl.load(x_tile + k, mask=is_token[:, None] & is_feature, other=0.0)
                weights = tl.load(a_tile + k, mask=is_row[:, None] & is_feature, other=0.0)
            acc = _dot(xs, tl.trans(weights), acc, WIDEN)
        out = h + split * split_stride + (start + tokens)[:, None] * (SLICES * max_rank)
        out += (f % SLICES * max_rank + f // SLICES)[None, :]
        tl.store(out, acc, mask=is_token[:, None] & is_row[None, :])


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _expand_kernel(
    y,
    b0,
    b1,
    b2,
    h,
    token_index,
    row_index,
    starts,
    lengths,
    first_rows,
    ranks,
    y_stride,
    split_stride,
    max_rank,
    W0: tl.constexpr,
    W1: tl.constexpr,
    W2: tl.constexpr,
    SLICES: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Grid (column tiles of all slices, blocks)."""
    block = tl.program_id(1)
    length = tl.load(lengths + block)
    start = tl.load(starts + block)
    first_row = tl.load(first_rows + block)
    rank = tl.load(ranks + block)
    if length == 0:
        return
    tile = tl.program_id(0)
    rows = row_index + first_row
    tokens = token_index + start
    h_stride = SLICES * max_rank
    h += start * h_stride
    tiles0: tl.constexpr = (W0 + BLOCK_N - 1) // BLOCK_N
    tiles1: tl.constexpr = (W1 + BLOCK_N - 1) // BLOCK_N
    if tile < tiles0:
        _expand_tile(y, b0, h, tokens, rows, length, rank, y_stride, split_stride, h_stride, tile,
                     W0, SPLITS, BLOCK_M, BLOCK_N, BLOCK_R, WIDEN)  # fmt: skip
    elif SLICES == 2:
        _expand_tile(y + W0, b1, h + max_rank, tokens, rows, length, rank, y_stride, split_stride, h_stride,
                     tile - tiles0, W1, SPLITS, BLOCK_M, BLOCK_N, BLOCK_R, WIDEN)  # fmt: skip
    elif SLICES == 3:
        if tile < tiles0 + tiles1:
            _expand_tile(y + W0, b1, h + max_rank, tokens, rows, length, rank, y_stride, split_stride, h_stride,
                         tile - tiles0, W1, SPLITS, BLOCK_M, BLOCK_N, BLOCK_R, WIDEN)  # fmt: skip
        else:
            tile -= tiles0 + tiles1
            _expand_tile(y + W0 + W1, b2, h + 2 * max_rank, tokens, rows, length, rank, y_stride, split_stride,
                         h_stride, tile, W2, SPLITS, BLOCK_M, BLOCK_N, BLOCK_R, WIDEN)  # fmt: skip


@triton.jit
def _expand_tile(
    y,
    b,
    h,
    token_index,
    row_index,
    length,
    rank,
    y_stride,
    split_stride,
    h_stride,
    tile,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """BLOCK_N columns of one slice; y, b and h point at the slice's own."""
    tokens = tl.arange(0, BLOCK_M)
    is_token = tokens < length
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.load(token_index + tokens, mask=is_token, other=0).to(tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    r = tl.arange(0, BLOCK_R)
    weights = _load_rows(b, row_index, r, rank, columns, WIDTH)
    out = y + token[:, None] * y_stride + columns[None, :]
    is_out = is_token[:, None] & (columns < WIDTH)[None, :]
    for _ in range(0, rank, BLOCK_R):
        part = h + tokens[:, None] * h_stride + r[None, :]
        is_part = is_token[:, None] & (r < rank)[None, :]
        hidden = tl.load(part, mask=is_part, other=0.0)
        for split in tl.static_range(1, SPLITS):
            hidden += tl.load(part + split * split_stride, mask=is_part, other=0.0)
        acc = _dot(hidden.to(weights.dtype), weights, acc, WIDEN)
        r += BLOCK_R
        weights = _load_rows(b, row_index, r, rank, columns, WIDTH)  # beyond the rank nothing is read
    before = tl.load(out, mask=is_out, other=0.0)
    tl.store(out, (before.to(tl.float32) + acc).to(y.dtype.element_ty), mask=is_out)


@triton.jit
def _load_rows(b, row_index, r, rank, columns, WIDTH: tl.constexpr):
    """Rows `r` of an adapter's columns of B; zero past its rank and past the slice's width."""
    is_row = r < rank
    row = tl.load(row_index + r, mask=is_row, other=0).to(tl.int64)
    is_inside = is_row[:, None] & (columns < WIDTH)[None, :]
    return tl.load(b + row[:, None] * WIDTH + columns[None, :], mask=is_inside, other=0.0)
