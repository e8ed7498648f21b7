"""The low-rank launches of a decode: a program asks for all its weights at once, before the launch ahead of it ends.

A block of one token multiplies elementwise, as its product is bound by the weights it reads; a block of several on
the tensor cores. Both are in one kernel, since a captured launch serves every batch of its size. Programs go over what
there is to do in turn: one that is launched for nothing costs as much as a load.

What follows the product can be done by the expand, which then also takes the tokens without an adapter: it computes
columns in pairs, one from each half of what it writes (ADD), gate and up (SILU), or the halves of a head (ROPE).
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
ADD, SILU, ROPE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


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
    _launch_expand(ADD.value, y, y, b, blocks, in_features, scratch, plan)


def decode_expand_silu_mul(
    y: Tensor, b: Sequence[Tensor], blocks: LoraBlocks, in_features: int, scratch: Tensor, plan: DecodePlan
) -> Tensor:
    """silu(gate) · up of gate_up y [n, 2·i] + B h → [n, i]; y is left as it is. The tables are for n tokens."""
    assert len(b) == 2, f"{len(b)} slices"
    assert b[0].shape == b[1].shape, "gate and up differ in width"
    out = torch.empty(y.shape[0], b[0].shape[1], dtype=y.dtype, device=y.device)
    _launch_expand(SILU.value, y, out, b, blocks, in_features, scratch, plan)
    return out


def decode_expand_rope(
    y: Tensor,
    b: Sequence[Tensor],
    blocks: LoraBlocks,
    in_features: int,
    scratch: Tensor,
    plan: DecodePlan,
    table: tuple[Tensor, Tensor, Tensor],
    cache: tuple[Tensor, Tensor],
) -> Tensor:
    """q [n, heads, d], rotated, of q/k/v y + B h; k, rotated, and v go to their slots of the cache. y is left as it is.
    `table` is cos [n, 1, d], sin [n, 1, d] and slots [n], as `reference.layer.rope_and_store` has them."""
    assert len(b) == 3, f"{len(b)} slices"
    assert all(tensor.is_contiguous() for tensor in (*table, *cache)), "the tables and the cache must be contiguous"
    d = cache[0].shape[2]
    q = torch.empty(y.shape[0], b[0].shape[1] // d, d, dtype=y.dtype, device=y.device)
    _launch_expand(ROPE.value, y, q, b, blocks, in_features, scratch, plan, (*table, *cache))
    return q


def can_rope(plan: DecodePlan, head_dim: int) -> bool:
    """Whether heads divide the plan's tiles."""
    return min(plan.dot_n, plan.block_n) % head_dim == 0


def _launch_expand(
    form: int,
    y: Tensor,
    out: Tensor,
    b: Sequence[Tensor],
    blocks: LoraBlocks,
    in_features: int,
    scratch: Tensor,
    plan: DecodePlan,
    rope: tuple[Tensor, ...] | None = None,
) -> None:
    assert blocks.max_rank % RANK_TILE == 0, f"h has {blocks.max_rank} places, which tiles do not divide"
    num_tokens = blocks.token_index.shape[0]
    assert form == ADD.value or num_tokens == y.shape[0], f"tables for {num_tokens} tokens, {y.shape[0]} rows"
    widths = [weight.shape[1] for weight in b]
    missing = MAX_SLICES - len(b)
    block_s = min(plan.dot_n, plan.block_n)
    tiles = sum(triton.cdiv(width, plan.block_n) for width in widths)
    tiles = triton.cdiv(sum(widths), plan.block_n) if form == SILU.value else tiles
    parts = plan.parts(in_features)
    _decode_expand[(min(plan.programs, tiles * (plan.block_n // block_s) * num_tokens),)](
        y,
        out,
        *b,
        *[b[0]] * missing,
        scratch,
        *_tables(blocks),
        *(rope or (y,) * 5),
        y.stride(0),
        _part_stride(blocks, len(b)),
        blocks.max_rank,
        num_tokens,
        parts,
        *widths,
        *[0] * missing,
        SLICES=len(b),
        FORM=form,
        HALF_HEAD=rope[0].shape[-1] // 2 if rope else 1,
        TILES=tiles,
        BLOCK_P=triton.next_power_of_2(parts),
        BLOCK_M=DECODE_BLOCK,
        HALF_N=plan.block_n // 2,
        HALF_S=block_s // 2,
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
    return (*tables, blocks.counts)


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
    "counts",
    "cos",
    "sin",
    "slots",
    "num_tokens",
    "num_parts",  # nor unrolled: that takes registers from the loads
]


@triton.jit(do_not_specialize=_UNSPECIALIZED[:7])
def _decode_shrink(
    x, a, h, token_index, row_index, starts, lengths, first_rows, ranks, counts, x_stride, part_stride, max_rank,
    IN: tl.constexpr, SLICES: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, WIDEN: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A program takes parts of the input features, slices and blocks in turn."""
    if EARLY:
        gdc_launch_dependents()
    for item in range(tl.program_id(0), tl.load(counts) * (SLICES * PARTS), tl.num_programs(0)):
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
    weights = _load_rows(a, rows, r, rank, features, features < IN, A_STRIDE)
    token = tl.load(tokens).to(tl.int64)
    if EARLY:
        gdc_wait()  # for x; the weights were there before
    xs = tl.load(x + token * x_stride + features, mask=features < IN, other=0.0).to(tl.float32)
    for _ in range(0, rank, BLOCK_R):
        tl.store(h + r, tl.sum(weights.to(tl.float32) * xs[None, :], axis=1), mask=r < rank)
        r += BLOCK_R
        weights = _load_rows(a, rows, r, rank, features, features < IN, A_STRIDE)  # beyond the rank nothing is read


@triton.jit
def _shrink_tokens(
    x, a, h, tokens, length, rows, rank, x_stride, h_stride, features,
    IN: tl.constexpr, A_STRIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, WIDEN: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    r = tl.arange(0, BLOCK_R)
    m = tl.arange(0, BLOCK_M)
    is_token = m < length
    weights = _load_rows(a, rows, r, rank, features, features < IN, A_STRIDE)
    token = tl.load(tokens + m, mask=is_token, other=0).to(tl.int64)
    if EARLY:
        gdc_wait()
    is_input = is_token[:, None] & (features < IN)[None, :]
    xs = tl.load(x + token[:, None] * x_stride + features[None, :], mask=is_input, other=0.0)
    for _ in range(0, rank, BLOCK_R):
        acc = _dot(xs, tl.trans(weights), WIDEN)
        tl.store(h + m[:, None] * h_stride + r[None, :], acc, mask=is_token[:, None] & (r < rank)[None, :])
        r += BLOCK_R
        weights = _load_rows(a, rows, r, rank, features, features < IN, A_STRIDE)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _decode_expand(
    y, out, b0, b1, b2, h, token_index, row_index, starts, lengths, first_rows, ranks, counts,
    cos, sin, slots, k_cache, v_cache, y_stride, part_stride, max_rank, num_tokens, num_parts,
    W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, SLICES: tl.constexpr, FORM: tl.constexpr,
    HALF_HEAD: tl.constexpr, TILES: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr, HALF_N: tl.constexpr,
    HALF_S: tl.constexpr, BLOCK_R: tl.constexpr, WIDEN: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A program takes tiles of HALF_N pairs of columns and blocks in turn; where there are fewer of those than
    programs, several share a tile of a block of several tokens."""
    if EARLY:
        gdc_launch_dependents()
    step: tl.constexpr = HALF_N if FORM == SILU else 2 * HALF_N  # columns of a slice
    step_s: tl.constexpr = HALF_S if FORM == SILU else 2 * HALF_S
    num_blocks = tl.load(counts)
    all_blocks = num_blocks
    if FORM != ADD:
        first_base = tl.load(counts + 1)
        all_blocks += (num_tokens - first_base + BLOCK_M - 1) // BLOCK_M
    num_shares = tl.minimum(tl.num_programs(0) // tl.maximum(all_blocks * TILES, 1), HALF_N // HALF_S)
    num_shares = tl.maximum(num_shares, 1)
    for item in range(tl.program_id(0), all_blocks * TILES * num_shares, tl.num_programs(0)):
        share = item % num_shares
        tile = item // num_shares % TILES
        block = item // num_shares // TILES
        is_adapted = block < num_blocks
        start = tl.load(starts + block, mask=is_adapted, other=0)
        length = tl.load(lengths + block, mask=is_adapted, other=0)
        rank = tl.load(ranks + block, mask=is_adapted, other=0)
        rows = row_index + tl.load(first_rows + block, mask=is_adapted, other=0)
        if FORM != ADD and not is_adapted:
            start = first_base + (block - num_blocks) * BLOCK_M
            length = tl.minimum(num_tokens - start, BLOCK_M)
        # A slice's own columns: all that differs between them is a pointer, a width and an offset.
        hidden = h + start * (SLICES * max_rank)
        b, width, first, slice = b0, W0, 0, 0
        if FORM != SILU:
            tiles0: tl.constexpr = (W0 + 2 * HALF_N - 1) // (2 * HALF_N)
            tiles1: tl.constexpr = (W1 + 2 * HALF_N - 1) // (2 * HALF_N)
            if SLICES > 1 and tile >= tiles0:
                tile -= tiles0
                hidden += max_rank
                b, width, first, slice = b1, W1, W0, 1
                if SLICES > 2 and tile >= tiles1:
                    tile -= tiles1
                    hidden += max_rank
                    b, width, first, slice = b2, W2, W0 + W1, 2
        if length == 1:
            if share == 0:
                _expand_token(
                    y + first, out, b, b1, hidden, max_rank, token_index + start, rows, rank, y_stride,
                    num_parts, part_stride, tile * step, width, slice, cos, sin, slots, k_cache, v_cache,
                    W0, W1, FORM, HALF_HEAD, BLOCK_P, HALF_N, BLOCK_R, EARLY,
                )  # fmt: skip
        else:
            for column in range(tile * step + share * step_s, (tile + 1) * step, num_shares * step_s):
                _expand_tokens(
                    y + first, out, b, b1, hidden, max_rank, token_index + start, length, rows, rank, y_stride,
                    num_parts, part_stride, SLICES * max_rank, column, width, slice, cos, sin, slots, k_cache, v_cache,
                    W0, W1, FORM, HALF_HEAD, min(BLOCK_P, 8), BLOCK_M, HALF_S, BLOCK_R, WIDEN, EARLY,
                )  # fmt: skip
    if EARLY and tl.program_id(0) == 0:
        gdc_wait()


@triton.jit
def _expand_token(
    y, out, b, b1, h, max_rank, tokens, rows, rank, y_stride, num_parts, part_stride, first_column, width, slice,
    cos, sin, slots, k_cache, v_cache, W0: tl.constexpr, W1: tl.constexpr, FORM: tl.constexpr, HALF_HEAD: tl.constexpr,
    BLOCK_P: tl.constexpr, HALF_N: tl.constexpr, BLOCK_R: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """HALF_N pairs of columns of one slice (SILU: of both) for a block of one token, as one tile, whose columns
    each thread sums alone."""
    r = tl.arange(0, BLOCK_R)
    lane = tl.arange(0, 2 * HALF_N)
    is_high = lane >= HALF_N
    columns = first_column + (lane % HALF_N if FORM == SILU else lane)
    source = tl.where(is_high, b1, b) if FORM == SILU else b
    weights = _load_rows(source, rows, r, rank, columns, columns < width, width)
    token = tl.load(tokens).to(tl.int64)
    if EARLY:
        gdc_wait()  # for h, and y; the weights were there before
    place = y + token * y_stride + columns
    if FORM == SILU:
        place += tl.where(is_high, W0, 0)
    before = tl.load(place, mask=columns < width, other=0.0)
    acc = tl.zeros((2 * HALF_N,), dtype=tl.float32)
    part = tl.arange(0, BLOCK_P)[:, None]
    for _ in range(0, rank, BLOCK_R):
        is_part = (part < num_parts) & (r < rank)[None, :]
        places = h + part * part_stride + r[None, :]
        hidden = tl.sum(tl.load(places, mask=is_part, other=0.0), axis=0).to(weights.dtype).to(tl.float32)[:, None]
        if FORM == SILU:
            up = tl.sum(tl.load(places + max_rank, mask=is_part, other=0.0), axis=0).to(weights.dtype).to(tl.float32)
            hidden = tl.where(is_high[None, :], up[:, None], hidden)
        acc += tl.sum(weights.to(tl.float32) * hidden, axis=0)
        r += BLOCK_R
        weights = _load_rows(source, rows, r, rank, columns, columns < width, width)  # beyond the rank nothing is read
    total = (before.to(tl.float32) + acc).to(y.dtype.element_ty)
    if FORM == ADD:
        tl.store(place, total, mask=columns < width)
    else:
        half: tl.constexpr = HALF_HEAD if FORM == ROPE else HALF_N
        low_sum, high_sum = tl.split(tl.permute(tl.reshape(total, (HALF_N // half, 2, half)), (0, 2, 1)))
        low_sum, high_sum = tl.reshape(low_sum, (HALF_N,)), tl.reshape(high_sum, (HALF_N,))
        pairs = tl.arange(0, HALF_N)
        low, apart = _columns(pairs, FORM, HALF_HEAD, HALF_N)
        low += first_column
        high = low + apart
        _finish(
            low_sum, high_sum, y, out, token, y_stride, pairs, low, high, low < width, high < width, True, slice,
            cos, sin, slots, k_cache, v_cache, W0, W1, FORM, HALF_HEAD,
        )  # fmt: skip


@triton.jit
def _expand_tokens(
    y, out, b, b1, h, max_rank, tokens, length, rows, rank, y_stride, num_parts, part_stride, h_stride,
    first_column, width, slice, cos, sin, slots, k_cache, v_cache, W0: tl.constexpr, W1: tl.constexpr,
    FORM: tl.constexpr, HALF_HEAD: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr, HALF_N: tl.constexpr,
    BLOCK_R: tl.constexpr, WIDEN: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """As `_expand_token` for a block of several."""
    r = tl.arange(0, BLOCK_R)
    m = tl.arange(0, BLOCK_M)
    is_token = m < length
    pairs = tl.arange(0, HALF_N)
    low, apart = _columns(pairs, FORM, HALF_HEAD, HALF_N)
    low += first_column
    high = low + apart
    b_high = b1 if FORM == SILU else b
    low_weights = _load_rows(b, rows, r, rank, low, low < width, width)
    high_weights = _load_rows(b_high, rows, r, rank, high, high < width, width)
    token = tl.load(tokens + m, mask=is_token, other=0).to(tl.int64)[:, None]
    if EARLY:
        gdc_wait()
    low_sum = tl.zeros((BLOCK_M, HALF_N), dtype=tl.float32)
    high_sum = tl.zeros((BLOCK_M, HALF_N), dtype=tl.float32)
    for _ in range(0, rank, BLOCK_R):
        is_hidden = is_token[:, None] & (r < rank)[None, :]
        places = h + m[:, None] * h_stride + r[None, :]
        hidden = _hidden(places, is_hidden, num_parts, part_stride, BLOCK_P).to(low_weights.dtype)
        low_sum += _dot(hidden, low_weights, WIDEN)
        if FORM == SILU:
            hidden = _hidden(places + max_rank, is_hidden, num_parts, part_stride, BLOCK_P).to(low_weights.dtype)
        high_sum += _dot(hidden, high_weights, WIDEN)
        r += BLOCK_R
        low_weights = _load_rows(b, rows, r, rank, low, low < width, width)
        high_weights = _load_rows(b_high, rows, r, rank, high, high < width, width)
    place = y + token * y_stride
    is_low = is_token[:, None] & (low < width)[None, :]
    is_high = is_token[:, None] & (high < width)[None, :]
    low_sum += tl.load(place + low[None, :], mask=is_low, other=0.0).to(tl.float32)
    high_sum += tl.load(place + high[None, :] + (W0 if FORM == SILU else 0), mask=is_high, other=0.0).to(tl.float32)
    _finish(
        low_sum.to(y.dtype.element_ty), high_sum.to(y.dtype.element_ty),
        y, out, token, y_stride, pairs[None, :], low[None, :], high[None, :], is_low, is_high, is_token[:, None], slice,
        cos, sin, slots, k_cache, v_cache, W0, W1, FORM, HALF_HEAD,
    )  # fmt: skip


@triton.jit
def _columns(lane, FORM: tl.constexpr, HALF_HEAD: tl.constexpr, HALF_N: tl.constexpr):
    """The low column of pair `lane` of a tile, and how far the high one is from it, in their slice."""
    if FORM == SILU:
        return lane, 0
    elif FORM == ROPE:
        return lane // HALF_HEAD * (2 * HALF_HEAD) + lane % HALF_HEAD, HALF_HEAD
    else:
        return lane, HALF_N


@triton.jit
def _finish(
    low_sum, high_sum, y, out, token, y_stride, pairs, low, high, is_low, is_high, is_token, slice,
    cos, sin, slots, k_cache, v_cache, W0: tl.constexpr, W1: tl.constexpr, FORM: tl.constexpr, HALF_HEAD: tl.constexpr,
):  # fmt: skip
    """Write pairs of columns: where they were, or with what follows the product done."""
    dtype = y.dtype.element_ty
    if FORM == ADD:
        tl.store(y + token * y_stride + low, low_sum, mask=is_low)
        tl.store(y + token * y_stride + high, high_sum, mask=is_high)
    elif FORM == SILU:
        gate = low_sum.to(tl.float32)
        silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
        tl.store(out + token * W0 + low, (silu * high_sum.to(tl.float32)).to(dtype), mask=is_low)
    else:
        target, row = out, token * W0
        if slice > 0:
            row = tl.load(slots + token, mask=is_token, other=0).to(tl.int64) * W1
            target = k_cache if slice == 1 else v_cache
        if slice < 2:
            # cos repeats its first half in the second; sin of the second half is the plain sine.
            angle = token * (2 * HALF_HEAD) + pairs % HALF_HEAD
            c = tl.load(cos + angle, mask=is_low, other=0.0).to(tl.float32)
            s = tl.load(sin + angle + HALF_HEAD, mask=is_low, other=0.0).to(tl.float32)
            left, right = low_sum.to(tl.float32), high_sum.to(tl.float32)
            low_sum = (left * c - right * s).to(dtype)
            high_sum = (right * c + left * s).to(dtype)
        tl.store(target + row + low, low_sum, mask=is_low)
        tl.store(target + row + high, high_sum, mask=is_high)


@triton.jit
def _hidden(places, is_hidden, num_parts, part_stride, BLOCK_P: tl.constexpr):
    """h [tokens, ranks], the sum of its parts in their order."""
    part = tl.arange(0, BLOCK_P)[:, None, None]
    total = tl.zeros(places.shape, dtype=tl.float32)
    for p in range(0, num_parts, BLOCK_P):
        is_part = (part + p < num_parts) & is_hidden[None, :, :]
        total += tl.sum(tl.load(places[None, :, :] + (part + p) * part_stride, mask=is_part, other=0.0), axis=0)
    return total


@triton.jit
def _load_rows(weights, rows, r, rank, columns, is_column, STRIDE):
    """Rows `r` of an adapter, `columns` of each; zero past its rank and outside the columns."""
    is_row = r < rank
    row = tl.load(rows + r, mask=is_row, other=0).to(tl.int64)
    inside = is_row[:, None] & is_column[None, :]
    return tl.load((weights + columns)[None, :] + row[:, None] * STRIDE, mask=inside, other=0.0)


@triton.jit
def _dot(left, right, WIDEN: tl.constexpr):
    if WIDEN:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, input_precision="ieee")
