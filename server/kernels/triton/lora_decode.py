"""The low-rank launches of a decode: a program asks for all its weights at once, before the launch ahead of it ends.

A block of one token multiplies elementwise, as its product is bound by the weights it reads; a block of several on
the tensor cores. Both are in one kernel, since a captured launch serves every batch of its size. Programs go over what
there is to do in turn: one that is launched for nothing costs as much as a load.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from server.kernels.lora_blocks import LoraBlocks
from server.kernels.triton.plans import DECODE_BLOCK, RANK_TILE, DecodePlan

MAX_SLICES = 3


def decode_shrink(x: Tensor, a: Tensor, blocks: LoraBlocks, scratch: Tensor, plan: DecodePlan) -> None:
    """scratch [parts, tokens, slices, max_rank] = parts of A x, for tokens in the order of `blocks.token_index`."""
    num_slices, in_features = a.shape[1:]
    parts = plan.parts(in_features)
    assert blocks.block_tokens <= DECODE_BLOCK, f"blocks of {blocks.block_tokens} tokens"
    assert scratch.numel() >= parts * _part_stride(blocks, num_slices), "scratch is too small for the plan"
    _decode_shrink[(min(plan.programs, parts * num_slices * blocks.num_blocks),)](
        x,
        a,
        scratch,
        *_tables(blocks),
        x.stride(0),
        _part_stride(blocks, num_slices),
        blocks.max_rank,
        IN=in_features,
        SLICES=num_slices,
        PARTS=parts,
        BLOCK_M=DECODE_BLOCK,
        BLOCK_K=plan.block_k,
        BLOCK_R=RANK_TILE,
        WIDEN=_widens(x),
        EARLY=plan.early,
        launch_pdl=plan.early,
        num_warps=plan.shrink_warps,
        num_stages=1,
    )


def decode_expand(
    y: Tensor, b: Sequence[Tensor], blocks: LoraBlocks, in_features: int, scratch: Tensor, plan: DecodePlan
) -> None:
    """y += B h, with h the sum of the parts in scratch."""
    assert blocks.max_rank % RANK_TILE == 0, f"h has {blocks.max_rank} places, which tiles do not divide"
    widths = [weight.shape[1] for weight in b]
    parts = plan.parts(in_features)
    missing = MAX_SLICES - len(b)
    block_s = min(plan.dot_n, plan.block_n)
    tiles = sum(triton.cdiv(width, plan.block_n) for width in widths)
    _decode_expand[(min(plan.programs, tiles * (plan.block_n // block_s) * blocks.num_blocks),)](
        y,
        *b,
        *[b[0]] * missing,
        scratch,
        *_tables(blocks),
        y.stride(0),
        _part_stride(blocks, len(b)),
        blocks.max_rank,
        parts,
        *widths,
        *[0] * missing,
        SLICES=len(b),
        TILES=tiles,
        BLOCK_P=triton.next_power_of_2(parts),
        BLOCK_M=DECODE_BLOCK,
        BLOCK_N=plan.block_n,
        BLOCK_S=block_s,
        BLOCK_R=RANK_TILE,
        WIDEN=_widens(y),
        EARLY=plan.early,
        launch_pdl=plan.early,
        num_warps=plan.expand_warps,
        maxnreg=128,  # loads in flight come from many programs on a multiprocessor
        num_stages=1,
    )


def _tables(blocks: LoraBlocks) -> tuple[Tensor, ...]:
    tables = (blocks.token_index, blocks.row_index, blocks.start, blocks.length, blocks.first_row, blocks.rank)
    return (*tables, blocks.count)


def _part_stride(blocks: LoraBlocks, num_slices: int) -> int:
    return blocks.token_index.shape[0] * num_slices * blocks.max_rank


def _widens(x: Tensor) -> bool:
    """Whether products must be given float32: the interpreter keeps bfloat16 as integers, and multiplies those."""
    return x.dtype is torch.bfloat16 and bool(triton.knobs.runtime.interpret)


# Not by alignment: the tables' places in their buffer change with the batch, and each variant is a compilation.
_UNSPECIALIZED = [
    "token_index",
    "row_index",
    "starts",
    "lengths",
    "first_rows",
    "ranks",
    "count",
    "num_parts",  # nor unrolled: that takes registers from the loads
]


@triton.jit(do_not_specialize=_UNSPECIALIZED[:-1])
def _decode_shrink(
    x, a, h, token_index, row_index, starts, lengths, first_rows, ranks, count, x_stride, part_stride, max_rank,
    IN: tl.constexpr, SLICES: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, WIDEN: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A program takes parts of the input features, slices and blocks in turn."""
    if EARLY:
        gdc_launch_dependents()
    for item in range(tl.program_id(0), tl.load(count) * (SLICES * PARTS), tl.num_programs(0)):
        block = item // (SLICES * PARTS)
        length = tl.load(lengths + block)
        start = tl.load(starts + block)
        rows = row_index + tl.load(first_rows + block)
        rank = tl.load(ranks + block)
        part = item % PARTS
        slice = item // PARTS % SLICES
        features = part * BLOCK_K + tl.arange(0, BLOCK_K)
        weights = a + slice * IN
        hidden = h + part * part_stride + (start * SLICES + slice) * max_rank
        tokens = token_index + start
        if length == 1:
            _shrink_token(x, weights, hidden, tokens, rows, rank, x_stride, features,
                          IN, SLICES * IN, BLOCK_R, EARLY)  # fmt: skip
        else:
            _shrink_tokens(x, weights, hidden, tokens, length, rows, rank, x_stride, SLICES * max_rank, features,
                           IN, SLICES * IN, BLOCK_M, BLOCK_R, WIDEN, EARLY)  # fmt: skip
    if EARLY and tl.program_id(0) == 0:
        gdc_wait()  # some program must, also if there is nothing to do: what follows counts on what precedes


@triton.jit
def _shrink_token(
    x, a, h, tokens, rows, rank, x_stride, features,
    IN: tl.constexpr, A_STRIDE: tl.constexpr, BLOCK_R: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    r = tl.arange(0, BLOCK_R)
    weights = _load_rows(a, rows, r, rank, features, A_STRIDE, IN)
    token = tl.load(tokens).to(tl.int64)
    if EARLY:
        gdc_wait()  # for x; the weights were there before
    xs = tl.load(x + token * x_stride + features, mask=features < IN, other=0.0).to(tl.float32)
    for _ in range(0, rank, BLOCK_R):
        tl.store(h + r, tl.sum(weights.to(tl.float32) * xs[None, :], axis=1), mask=r < rank)
        r += BLOCK_R
        weights = _load_rows(a, rows, r, rank, features, A_STRIDE, IN)  # beyond the rank nothing is read


@triton.jit
def _shrink_tokens(
    x, a, h, tokens, length, rows, rank, x_stride, h_stride, features,
    IN: tl.constexpr, A_STRIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, WIDEN: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    r = tl.arange(0, BLOCK_R)
    m = tl.arange(0, BLOCK_M)
    is_token = m < length
    weights = _load_rows(a, rows, r, rank, features, A_STRIDE, IN)
    token = tl.load(tokens + m, mask=is_token, other=0).to(tl.int64)
    if EARLY:
        gdc_wait()
    is_input = is_token[:, None] & (features < IN)[None, :]
    xs = tl.load(x + token[:, None] * x_stride + features[None, :], mask=is_input, other=0.0)
    for _ in range(0, rank, BLOCK_R):
        acc = _dot(xs, tl.trans(weights), WIDEN)
        tl.store(h + m[:, None] * h_stride + r[None, :], acc, mask=is_token[:, None] & (r < rank)[None, :])
        r += BLOCK_R
        weights = _load_rows(a, rows, r, rank, features, A_STRIDE, IN)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _decode_expand(
    y, b0, b1, b2, h, token_index, row_index, starts, lengths, first_rows, ranks, count,
    y_stride, part_stride, max_rank, num_parts,
    W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, SLICES: tl.constexpr, TILES: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr,
    WIDEN: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A program takes column tiles of all slices and blocks in turn; where there are fewer of those than programs,
    several share a tile of a block of several tokens."""
    if EARLY:
        gdc_launch_dependents()
    num_tiles = tl.load(count) * TILES
    num_shares = tl.minimum(tl.num_programs(0) // tl.maximum(num_tiles, 1), BLOCK_N // BLOCK_S)
    num_shares = tl.maximum(num_shares, 1)
    for item in range(tl.program_id(0), num_tiles * num_shares, tl.num_programs(0)):
        share = item % num_shares
        tile = item // num_shares % TILES
        block = item // num_shares // TILES
        length = tl.load(lengths + block)
        start = tl.load(starts + block)
        rows = row_index + tl.load(first_rows + block)
        rank = tl.load(ranks + block)
        tokens = token_index + start
        hidden = h + start * (SLICES * max_rank)
        tiles0: tl.constexpr = (W0 + BLOCK_N - 1) // BLOCK_N
        tiles1: tl.constexpr = (W1 + BLOCK_N - 1) // BLOCK_N
        # A slice's own columns: all that differs between them is a pointer, a width and an offset.
        b, width, first = b0, W0, 0
        if SLICES > 1 and tile >= tiles0:
            tile -= tiles0
            hidden += max_rank
            b, width, first = b1, W1, W0
            if SLICES > 2 and tile >= tiles1:
                tile -= tiles1
                hidden += max_rank
                b, width, first = b2, W2, W0 + W1
        if length == 1:
            if share == 0:
                columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
                _expand_token(y + first, b, hidden, tokens, rows, rank, y_stride, num_parts, part_stride,
                              columns, width, BLOCK_P, BLOCK_N, BLOCK_R, EARLY)  # fmt: skip
        else:
            for column in range(tile * BLOCK_N + share * BLOCK_S, (tile + 1) * BLOCK_N, num_shares * BLOCK_S):
                _expand_tokens(y + first, b, hidden, tokens, length, rows, rank, y_stride, num_parts, part_stride,
                               SLICES * max_rank, column + tl.arange(0, BLOCK_S), width,
                               min(BLOCK_P, 8), BLOCK_M, BLOCK_S, BLOCK_R, WIDEN, EARLY)  # fmt: skip
    if EARLY and tl.program_id(0) == 0:
        gdc_wait()


@triton.jit
def _expand_token(
    y, b, h, tokens, rows, rank, y_stride, num_parts, part_stride, columns, width,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    r = tl.arange(0, BLOCK_R)
    weights = _load_rows(b, rows, r, rank, columns, width, width)
    token = tl.load(tokens).to(tl.int64)
    if EARLY:
        gdc_wait()  # for h, and y; the weights were there before
    out = y + token * y_stride + columns
    before = tl.load(out, mask=columns < width, other=0.0)
    acc = tl.zeros((BLOCK_N,), dtype=tl.float32)
    part = tl.arange(0, BLOCK_P)
    for _ in range(0, rank, BLOCK_R):
        places = h + part[:, None] * part_stride + r[None, :]
        hidden = tl.sum(tl.load(places, mask=(part < num_parts)[:, None], other=0.0), axis=0)
        hidden = tl.where(r < rank, hidden, 0.0).to(weights.dtype).to(tl.float32)  # there may be anything beyond
        acc += tl.sum(weights.to(tl.float32) * hidden[:, None], axis=0)
        r += BLOCK_R
        weights = _load_rows(b, rows, r, rank, columns, width, width)  # beyond the rank nothing is read
    tl.store(out, (before.to(tl.float32) + acc).to(y.dtype.element_ty), mask=columns < width)


@triton.jit
def _expand_tokens(
    y, b, h, tokens, length, rows, rank, y_stride, num_parts, part_stride, h_stride, columns, width,
    BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    WIDEN: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    r = tl.arange(0, BLOCK_R)
    m = tl.arange(0, BLOCK_M)
    is_token = m < length
    weights = _load_rows(b, rows, r, rank, columns, width, width)
    token = tl.load(tokens + m, mask=is_token, other=0).to(tl.int64)
    if EARLY:
        gdc_wait()
    out = y + token[:, None] * y_stride + columns[None, :]
    is_out = is_token[:, None] & (columns < width)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    part = tl.arange(0, BLOCK_P)
    for _ in range(0, rank, BLOCK_R):
        places = h + part[:, None, None] * part_stride + m[None, :, None] * h_stride + r[None, None, :]
        hidden = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        for p in range(0, num_parts, BLOCK_P):
            is_part = (part + p < num_parts)[:, None, None] & is_token[None, :, None]
            hidden += tl.sum(tl.load(places + p * part_stride, mask=is_part, other=0.0), axis=0)
        hidden = tl.where((r < rank)[None, :], hidden, 0.0)
        acc += _dot(hidden.to(weights.dtype), weights, WIDEN)
        r += BLOCK_R
        weights = _load_rows(b, rows, r, rank, columns, width, width)
    before = tl.load(out, mask=is_out, other=0.0)
    tl.store(out, (before.to(tl.float32) + acc).to(y.dtype.element_ty), mask=is_out)


@triton.jit
def _load_rows(weights, rows, r, rank, columns, STRIDE, WIDTH):
    """Rows `r` of an adapter, `columns` of each; zero past its rank and past the width."""
    is_row = r < rank
    row = tl.load(rows + r, mask=is_row, other=0).to(tl.int64)
    inside = is_row[:, None] & (columns < WIDTH)[None, :]
    return tl.load(weights + row[:, None] * STRIDE + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _dot(left, right, WIDEN: tl.constexpr):
    if WIDEN:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, input_precision="ieee")
