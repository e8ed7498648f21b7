"""The kernels on a GPU: one pass over memory each. Arithmetic is in float32."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_ELEMENTS = 2048  # of a program of an elementwise kernel
_WORDS = 4096  # logits at once
_BYTES = 1024  # of packed weights, of a program


@triton.jit
def _rms_norm(x, weight, out, hidden, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * hidden
    cols = tl.arange(0, BLOCK)
    inside = cols < hidden
    raw = tl.load(x + row + cols, inside, 0.0)
    value = raw.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value) / hidden + eps)
    normed = (value * scale).to(raw.dtype).to(tl.float32)
    tl.store(out + row + cols, normed * tl.load(weight + cols, inside, 0.0).to(tl.float32), inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `reference.rms_norm`; x contiguous."""
    n, hidden = x.shape
    out = torch.empty_like(x)
    block = triton.next_power_of_2(hidden)
    if n:
        _rms_norm[(n,)](x, weight, out, hidden, eps, BLOCK=block, num_warps=_warps(block))
    return out


@triton.jit
def _rms_norm_backward(x, weight, grad, residual, out, hidden, eps, BLOCK: tl.constexpr, ADDS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * hidden
    cols = tl.arange(0, BLOCK)
    inside = cols < hidden
    value = tl.load(x + row + cols, inside, 0.0).to(tl.float32)
    weighted = tl.load(grad + row + cols, inside, 0.0).to(tl.float32)
    weighted *= tl.load(weight + cols, inside, 0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value) / hidden + eps)
    normed = value * scale
    result = scale * (weighted - normed * (tl.sum(weighted * normed) / hidden))
    if ADDS:
        result += tl.load(residual + row + cols, inside, 0.0).to(tl.float32)
    tl.store(out + row + cols, result, inside)


def rms_norm_backward(x: Tensor, weight: Tensor, eps: float, grad: Tensor, residual: Tensor | None) -> Tensor:
    """See `reference.rms_norm_backward`; all contiguous."""
    n, hidden = x.shape
    out = torch.empty_like(x)
    block = triton.next_power_of_2(hidden)
    if n:
        _rms_norm_backward[(n,)](
            x, weight, grad, x if residual is None else residual, out, hidden, eps,
            BLOCK=block, ADDS=residual is not None, num_warps=_warps(block),
        )  # fmt: skip
    return out


@triton.jit
def _rope(
    x, cos, sin, rows, heads,
    HEADS: tl.constexpr, HALF: tl.constexpr, D: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """One program a token, all its heads."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    lane = tl.arange(0, HALF)[None, :]
    angles = (token % rows) * D + lane
    in_half = lane < D // 2
    c_low = tl.load(cos + angles, in_half, 0.0).to(tl.float32)
    c_high = tl.load(cos + angles + D // 2, in_half, 0.0).to(tl.float32)
    s_low = tl.load(sin + angles, in_half, 0.0).to(tl.float32)
    s_high = tl.load(sin + angles + D // 2, in_half, 0.0).to(tl.float32)
    inside = (head < heads) & in_half
    place = x + (token * heads + head) * D + lane
    low = tl.load(place, inside, 0.0).to(tl.float32)
    high = tl.load(place + D // 2, inside, 0.0).to(tl.float32)
    if INVERSE:
        new_low = low * c_low + high * s_high
        new_high = high * c_high - low * s_low
    else:
        new_low = low * c_low - high * s_low
        new_high = high * c_high + low * s_high
    tl.store(place, new_low, inside)
    tl.store(place + D // 2, new_high, inside)


def rope_(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> Tensor:
    """See `reference.rope_`; all contiguous."""
    n, heads, d = x.shape
    assert x.is_contiguous(), "x must be contiguous"
    if n:
        _rope[(n,)](
            x, cos, sin, cos.shape[0], heads,
            HEADS=triton.next_power_of_2(heads), HALF=triton.next_power_of_2(d // 2), D=d, INVERSE=inverse,
            num_warps=4,
        )  # fmt: skip
    return x


@triton.jit
def _swiglu(gate, up, out, size, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    g = tl.load(gate + index, inside, 0.0).to(tl.float32)
    u = tl.load(up + index, inside, 0.0)
    silu = (g / (1.0 + tl.exp(-g))).to(u.dtype).to(tl.float32)
    tl.store(out + index, silu * u.to(tl.float32), inside)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See `reference.swiglu`; contiguous."""
    out = torch.empty_like(gate)
    if size := gate.numel():
        _swiglu[(triton.cdiv(size, _ELEMENTS),)](gate, up, out, size, BLOCK=_ELEMENTS, num_warps=8)
    return out


@triton.jit
def _swiglu_backward(gate, up, grad, size, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    g = tl.load(gate + index, inside, 0.0).to(tl.float32)
    u = tl.load(up + index, inside, 0.0).to(tl.float32)
    d = tl.load(grad + index, inside, 0.0).to(tl.float32)
    share = 1.0 / (1.0 + tl.exp(-g))
    silu = g * share
    tl.store(grad + index, silu * u, inside)
    tl.store(up + index, d * silu, inside)
    tl.store(gate + index, d * u * (share + silu * (1.0 - share)), inside)


def swiglu_backward_(gate: Tensor, up: Tensor, grad: Tensor) -> None:
    """See `reference.swiglu_backward_`; contiguous."""
    if size := gate.numel():
        _swiglu_backward[(triton.cdiv(size, _ELEMENTS),)](gate, up, grad, size, BLOCK=_ELEMENTS, num_warps=8)


@triton.jit
def _cross_entropy(logits, targets, losses, words, scale, BLOCK: tl.constexpr):
    """One program a row: the largest and the sum of exponentials together, then the gradient over the logits."""
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * words
    target = tl.load(targets + row)
    said = tl.load(start + target).to(tl.float32) * scale
    lane = tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, words, BLOCK):
        cols = first + lane
        value = tl.load(start + cols, cols < words, -float("inf")).to(tl.float32) * scale
        higher = tl.maximum(largest, value)
        known = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp(largest - known) + tl.exp(value - known)
        largest = higher
    peak = tl.max(largest)
    log_total = peak + tl.log(tl.sum(total * tl.exp(largest - peak)))
    for first in range(0, words, BLOCK):
        cols = first + lane
        value = tl.load(start + cols, cols < words, -float("inf")).to(tl.float32) * scale
        share = tl.exp(value - log_total) - (cols == target).to(tl.float32)
        tl.store(start + cols, share * scale, cols < words)
    tl.store(losses + row, log_total - said)


def cross_entropy_(logits: Tensor, targets: Tensor, scale: float) -> Tensor:
    """See `reference.cross_entropy_`; contiguous."""
    n, words = logits.shape
    assert logits.is_contiguous(), "logits must be contiguous"
    losses = torch.empty(n, dtype=torch.float32, device=logits.device)
    if n:
        _cross_entropy[(n,)](logits, targets, losses, words, scale, BLOCK=_WORDS, num_warps=16)
    return losses.sum()


@triton.jit
def _dequantize(
    packed, absmax, nested, table, offset, code, out, size, block_size, nested_size,
    BLOCK: tl.constexpr, NESTED: tl.constexpr,
):  # fmt: skip
    """One program BLOCK bytes, two weights each: the first in the high nibble."""
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = byte < size
    both = tl.load(packed + byte, inside, 0).to(tl.int32)
    block = byte // (block_size // 2)
    scale = tl.load(absmax + block, inside, 0)
    if NESTED:
        outer = tl.load(nested + block // nested_size, inside, 0.0)
        scale = tl.load(table + scale.to(tl.int32), inside, 0.0) * outer + tl.load(offset)
    first = tl.load(code + (both >> 4)) * scale
    second = tl.load(code + (both & 15)) * scale
    values = tl.interleave(first, second)
    index = tl.program_id(0).to(tl.int64) * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
    tl.store(out + index, values, index < 2 * size)


def dequantize(packed: Tensor, state: Any) -> Tensor:
    """See `kernels.dequantize`; one launch, the scales' own quantization undone on the way."""
    out = torch.empty(state.shape, dtype=state.dtype, device=packed.device)
    size = packed.numel()
    nested = state.state2 if state.nested else None
    absmax, table, offset = (nested.absmax, nested.code, state.offset) if nested else (state.absmax,) * 3
    _dequantize[(triton.cdiv(size, _BYTES),)](
        packed, state.absmax, absmax, table, offset, state.code, out,
        size, state.blocksize, nested.blocksize if nested else 1,
        BLOCK=_BYTES, NESTED=nested is not None, num_warps=4,
    )  # fmt: skip
    return out


def _warps(block: int) -> int:
    return min(max(block // 512, 1), 16)
