"""The low-rank launches of a prefill: over blocks of tokens that share an adapter, on the tensor cores.

Both launches read an adapter's true rank through its row table. The input features of the shrink are split over
programs; each writes its part of h to scratch and the expand sums the parts in order, so that a result does not depend
on which program came first. A program of the expand goes over a run of column tiles, each asked for while those before
it are worked on: it is bound by what it changes.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.kernels.lora_blocks import LoraBlocks
from server.kernels.triton.lora_decode import MAX_SLICES
from server.kernels.triton.plans import EXPAND_ROWS, ExpandPlan, LoraPlan

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
    "splits",
    "run",
]


def prefill_shrink(x: Tensor, a: Tensor, blocks: LoraBlocks, scratch: Tensor, plan: LoraPlan) -> None:
    """scratch [splits, tokens, slices, max_rank] = parts of A x, for tokens in the order of `blocks.token_index`."""
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


def prefill_expand(y: Tensor, b: Sequence[Tensor], blocks: LoraBlocks, scratch: Tensor, plan: LoraPlan) -> None:
    """y += B h, with h the sum of the parts in scratch."""
    num_slices, widths = len(b), [weight.shape[1] for weight in b]
    tiles = [triton.cdiv(width, _columns(y, plan.expand)) for width in widths]
    run = plan.expand.tiles_a_program(sum(tiles) * blocks.num_blocks)
    padded = [*widths, *[0] * (MAX_SLICES - num_slices)]
    _expand_kernel[(sum(triton.cdiv(count, run) for count in tiles), blocks.num_blocks)](
        y,
        *b,
        *[b[0]] * (MAX_SLICES - num_slices),
        scratch,
        *_tables(blocks),
        y.stride(0),
        _split_stride(blocks, num_slices),
        plan.shrink.splits,
        blocks.max_rank,
        run,
        W0=padded[0],
        W1=padded[1],
        W2=padded[2],
        SLICES=num_slices,
        **_meta(y, blocks, plan.expand),
    )


def prefill_silu_mul(y: Tensor, b: Sequence[Tensor], blocks: LoraBlocks, scratch: Tensor, plan: LoraPlan) -> Tensor:
    """silu(gate) · up [n, i] of y + B h, y [n, 2·i], for every token; those of no adapter are in `blocks`, too."""
    gate, up = b
    width = gate.shape[1]
    num_blocks = blocks.num_blocks + blocks.base_blocks
    tiles = triton.cdiv(width, _columns(y, plan.gate))
    run = plan.gate.tiles_a_program(tiles * num_blocks)
    out = torch.empty(len(y), width, dtype=y.dtype, device=y.device)
    _silu_mul_kernel[(triton.cdiv(tiles, run), num_blocks)](
        y,
        gate,
        up,
        scratch,
        *_tables(blocks),
        out,
        y.stride(0),
        _split_stride(blocks, 2),
        plan.shrink.splits,
        blocks.max_rank,
        run,
        WIDTH=width,
        **_meta(y, blocks, plan.gate),
    )
    return out


def _columns(y: Tensor, plan: ExpandPlan) -> int:
    """Of a tile: plans are of 16 bits, and tiles of float32 are to have no more bytes."""
    return max(16, plan.block_n * 2 // y.element_size())


def _meta(y: Tensor, blocks: LoraBlocks, plan: ExpandPlan) -> dict[str, int | bool]:
    rows = next((rows for rows in EXPAND_ROWS if blocks.max_rank <= rows), EXPAND_ROWS[-1])
    return {
        "BLOCK_M": max(16, blocks.block_tokens),
        "BLOCK_N": _columns(y, plan),
        "BLOCK_R": rows,
        "MORE": blocks.max_rank > rows,
        "STAGES": plan.num_stages,
        "WIDEN": _widens(y),
        "num_warps": plan.num_warps,
    }


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
    x, a, h, token_index, row_index, starts, lengths, first_rows, ranks, x_stride, split_stride, split_steps, max_rank,
    IN: tl.constexpr, SLICES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    PROGRAMS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
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
    y, b0, b1, b2, h, token_index, row_index, starts, lengths, first_rows, ranks, y_stride, split_stride, splits,
    max_rank, run, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, SLICES: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, MORE: tl.constexpr, STAGES: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Grid (runs of column tiles, those of all slices counted, blocks)."""
    block = tl.program_id(1)
    length = tl.load(lengths + block)
    start = tl.load(starts + block)
    rank = tl.load(ranks + block)
    rows = row_index + tl.load(first_rows + block)
    if length == 0:
        return
    tokens = token_index + start
    h_stride = SLICES * max_rank
    h += start * h_stride
    index = tl.program_id(0)
    runs0 = tl.cdiv((W0 + BLOCK_N - 1) // BLOCK_N, run)
    runs1 = tl.cdiv((W1 + BLOCK_N - 1) // BLOCK_N, run)
    if index < runs0:
        _expand_run(y, b0, h, tokens, rows, length, rank, y_stride, split_stride, splits, h_stride, index * run, run,
                    W0, BLOCK_M, BLOCK_N, BLOCK_R, MORE, STAGES, WIDEN)  # fmt: skip
    elif SLICES >= 2:
        index -= runs0
        if index < runs1:
            _expand_run(y + W0, b1, h + max_rank, tokens, rows, length, rank, y_stride, split_stride, splits, h_stride,
                        index * run, run, W1, BLOCK_M, BLOCK_N, BLOCK_R, MORE, STAGES, WIDEN)  # fmt: skip
        elif SLICES == 3:
            index -= runs1
            _expand_run(y + W0 + W1, b2, h + 2 * max_rank, tokens, rows, length, rank, y_stride, split_stride, splits,
                        h_stride, index * run, run, W2, BLOCK_M, BLOCK_N, BLOCK_R, MORE, STAGES, WIDEN)  # fmt: skip


@triton.jit
def _expand_run(
    y, b, h, token_index, row_index, length, rank, y_stride, split_stride, splits, h_stride, first, run,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, MORE: tl.constexpr,
    STAGES: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """`run` column tiles of one slice from tile `first` on; y, b and h point at the slice's own."""
    tokens = tl.arange(0, BLOCK_M)
    is_token = tokens < length
    token = tl.load(token_index + tokens, mask=is_token, other=0).to(tl.int64)
    r = tl.arange(0, BLOCK_R)
    is_rank = r < rank
    row = tl.load(row_index + r, mask=is_rank, other=0).to(tl.int64)
    hidden = _sum_parts(h, tokens, is_token, r, rank, h_stride, split_stride, splits).to(b.dtype.element_ty)
    lane = tl.arange(0, BLOCK_N)
    out = y + token[:, None] * y_stride + lane[None, :]
    weight = b + row[:, None] * WIDTH + lane[None, :]
    for tile in tl.range(first, tl.minimum(first + run, (WIDTH + BLOCK_N - 1) // BLOCK_N), num_stages=STAGES):
        at = tile * BLOCK_N
        is_out = _inside(is_token, lane, at, WIDTH, BLOCK_N)
        before = tl.load(out + at, mask=is_out, other=0.0)
        weights = tl.load(weight + at, mask=_inside(is_rank, lane, at, WIDTH, BLOCK_N), other=0.0)
        acc = _dot(hidden, weights, tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32), WIDEN)
        if MORE:
            acc = _add_more(acc, b, h, row_index, tokens, is_token, rank, h_stride, split_stride, splits, lane, at,
                            WIDTH, BLOCK_N, BLOCK_R, WIDEN)  # fmt: skip
        tl.store(out + at, (before.to(tl.float32) + acc).to(y.dtype.element_ty), mask=is_out)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _silu_mul_kernel(
    y, gate, up, h, token_index, row_index, starts, lengths, first_rows, ranks, out, y_stride, split_stride, splits,
    max_rank, run, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    MORE: tl.constexpr, STAGES: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Grid (runs of gate's column tiles, blocks). Sums are rounded as the expand stores them, then as SiLU · up is."""
    block = tl.program_id(1)
    length = tl.load(lengths + block)
    start = tl.load(starts + block)
    rank = tl.load(ranks + block)
    rows = row_index + tl.load(first_rows + block)
    if length == 0:
        return
    dtype: tl.constexpr = y.dtype.element_ty
    h_stride = 2 * max_rank
    h += start * h_stride
    tokens = tl.arange(0, BLOCK_M)
    is_token = tokens < length
    token = tl.load(token_index + start + tokens, mask=is_token, other=0).to(tl.int64)
    r = tl.arange(0, BLOCK_R)
    is_rank = r < rank
    row = tl.load(rows + r, mask=is_rank, other=0).to(tl.int64)
    gate_hidden = _sum_parts(h, tokens, is_token, r, rank, h_stride, split_stride, splits).to(dtype)
    up_hidden = _sum_parts(h + max_rank, tokens, is_token, r, rank, h_stride, split_stride, splits).to(dtype)
    lane = tl.arange(0, BLOCK_N)
    source = y + token[:, None] * y_stride + lane[None, :]
    target = out + token[:, None] * WIDTH + lane[None, :]
    weight = row[:, None] * WIDTH + lane[None, :]
    first = tl.program_id(0) * run
    for tile in tl.range(first, tl.minimum(first + run, (WIDTH + BLOCK_N - 1) // BLOCK_N), num_stages=STAGES):
        at = tile * BLOCK_N
        is_out = _inside(is_token, lane, at, WIDTH, BLOCK_N)
        is_weight = _inside(is_rank, lane, at, WIDTH, BLOCK_N)
        gates = tl.load(source + at, mask=is_out, other=0.0)
        ups = tl.load(source + WIDTH + at, mask=is_out, other=0.0)
        gate_rows = tl.load(gate + weight + at, mask=is_weight, other=0.0)
        up_rows = tl.load(up + weight + at, mask=is_weight, other=0.0)
        gate_term = _dot(gate_hidden, gate_rows, tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32), WIDEN)
        up_term = _dot(up_hidden, up_rows, tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32), WIDEN)
        if MORE:
            gate_term = _add_more(gate_term, gate, h, rows, tokens, is_token, rank, h_stride, split_stride, splits,
                                  lane, at, WIDTH, BLOCK_N, BLOCK_R, WIDEN)  # fmt: skip
            up_term = _add_more(up_term, up, h + max_rank, rows, tokens, is_token, rank, h_stride, split_stride, splits,
                                lane, at, WIDTH, BLOCK_N, BLOCK_R, WIDEN)  # fmt: skip
        x = (gates.to(tl.float32) + gate_term).to(dtype).to(tl.float32)
        ups = (ups.to(tl.float32) + up_term).to(dtype).to(tl.float32)
        silu = (x / (1.0 + tl.exp(-x))).to(dtype).to(tl.float32)
        tl.store(target + at, (silu * ups).to(dtype), mask=is_out)


@triton.jit
def _add_more(
    acc, b, h, row_index, tokens, is_token, rank, h_stride, split_stride, splits, lane, at,
    WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """acc and the product of a tile's columns with the rank rows from BLOCK_R on."""
    for first in range(BLOCK_R, rank, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        is_rank = r < rank
        row = tl.load(row_index + r, mask=is_rank, other=0).to(tl.int64)
        is_weight = _inside(is_rank, lane, at, WIDTH, BLOCK_N)
        weights = tl.load(b + row[:, None] * WIDTH + (at + lane)[None, :], mask=is_weight, other=0.0)
        hidden = _sum_parts(h, tokens, is_token, r, rank, h_stride, split_stride, splits)
        acc = _dot(hidden.to(weights.dtype), weights, acc, WIDEN)
    return acc


@triton.jit
def _inside(is_row, lane, at, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which places of a tile are there; where tiles divide the width, only rows are masked."""
    inside = is_row[:, None]
    if WIDTH % BLOCK_N != 0:
        inside &= (lane < WIDTH - at)[None, :]
    return inside


@triton.jit
def _sum_parts(h, tokens, is_token, r, rank, h_stride, split_stride, splits):
    """[tokens, r] of h, its parts summed in order; zero past the rank."""
    part = h + tokens[:, None] * h_stride + r[None, :]
    is_part = is_token[:, None] & (r < rank)[None, :]
    hidden = tl.load(part, mask=is_part, other=0.0)
    for split in range(1, splits):
        hidden += tl.load(part + split * split_stride, mask=is_part, other=0.0)
    return hidden
