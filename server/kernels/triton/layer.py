"""Fused elementwise work of a decoder layer. Arithmetic is in float32, rounded where the reference rounds.

Each kernel is launched early where the device can (see `kernels.triton.pdl`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from server.kernels.triton.pdl import launches_early


@triton.jit
def _add_rms_norm(x, residual, weight, out, hidden, eps, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * hidden
    cols = tl.arange(0, BLOCK)
    inside = cols < hidden
    if EARLY:
        gdc_launch_dependents()
    weights = tl.load(weight + cols, inside, 0.0).to(tl.float32)
    if EARLY:
        gdc_wait()
    before = tl.load(residual + row + cols, inside, 0.0)
    total = (before.to(tl.float32) + tl.load(x + row + cols, inside, 0.0).to(tl.float32)).to(before.dtype)
    tl.store(residual + row + cols, total, inside)
    total = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(total * total) / hidden + eps)
    tl.store(out + row + cols, total * scale * weights, inside)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual), both [n, h] and contiguous; `residual` is updated in place."""
    n, hidden = x.shape
    out = torch.empty_like(x)
    block = triton.next_power_of_2(hidden)
    early = launches_early(x.device, n)
    if n:
        _add_rms_norm[(n,)](
            x, residual, weight, out, hidden, eps,
            BLOCK=block, EARLY=early, launch_pdl=early, num_warps=min(max(block // 512, 1), 16),
        )  # fmt: skip
    return out, residual


@triton.jit
def _silu_mul(gate_up, out, width, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < width
    gate = tl.load(gate_up + row * 2 * width + cols, inside, 0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + cols, inside, 0.0)
    silu = (gate / (1.0 + tl.exp(-gate))).to(up.dtype).to(tl.float32)
    tl.store(out + row * width + cols, silu * up.to(tl.float32), inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) · up for gate_up [n, 2·i], contiguous → [n, i]."""
    n, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(n, width, dtype=gate_up.dtype, device=gate_up.device)
    early = launches_early(gate_up.device, n)
    if n:
        _silu_mul[(n, triton.cdiv(width, 1024))](
            gate_up, out, width, BLOCK=1024, EARLY=early, launch_pdl=early, num_warps=4
        )
    return out


@triton.jit
def _rope_and_store(
    qkv, q_norm, k_norm, eps, cos, sin, slots, q_out, k_cache, v_cache,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, NORMED: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """One program a token and head: first the query heads, then key, then value heads."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    source = qkv + (token * (HEADS + 2 * KV_HEADS) + head) * D
    lane = tl.arange(0, HALF)
    inside = lane < D // 2
    low = tl.load(source + lane, inside, 0.0)
    high = tl.load(source + D // 2 + lane, inside, 0.0)
    slot = tl.load(slots + token)
    if head < HEADS:
        target = q_out + (token * HEADS + head) * D
    elif head < HEADS + KV_HEADS:
        target = k_cache + (slot * KV_HEADS + head - HEADS) * D
    else:
        target = v_cache + (slot * KV_HEADS + head - HEADS - KV_HEADS) * D
    if head < HEADS + KV_HEADS:
        x, y = low.to(tl.float32), high.to(tl.float32)
        if NORMED:
            norm = q_norm if head < HEADS else k_norm
            scale = tl.rsqrt((tl.sum(x * x) + tl.sum(y * y)) / D + eps)
            x = (x * scale * tl.load(norm + lane, inside, 0.0).to(tl.float32)).to(low.dtype).to(tl.float32)
            y = (y * scale * tl.load(norm + D // 2 + lane, inside, 0.0).to(tl.float32)).to(low.dtype).to(tl.float32)
        # cos repeats its first half in the second; sin of the second half is the plain sine.
        c = tl.load(cos + token * D + lane, inside, 0.0).to(tl.float32)
        s = tl.load(sin + token * D + D // 2 + lane, inside, 0.0).to(tl.float32)
        low = (x * c - y * s).to(low.dtype)
        high = (y * c + x * s).to(high.dtype)
    tl.store(target + lane, low, inside)
    tl.store(target + D // 2 + lane, high, inside)


def rope_and_store(
    qkv: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
) -> Tensor:
    """See `reference.layer.rope_and_store`; one launch. All tensors contiguous."""
    kv_heads, d = k_cache.shape[1:]
    n = qkv.shape[0]
    heads = qkv.shape[1] // d - 2 * kv_heads
    q = torch.empty(n, heads, d, dtype=qkv.dtype, device=qkv.device)
    q_norm, k_norm = norms if norms is not None else (qkv, qkv)
    early = launches_early(qkv.device, n)
    if n:
        _rope_and_store[(n, heads + 2 * kv_heads)](
            qkv, q_norm, k_norm, eps, cos, sin, slots, q, k_cache, v_cache,
            HEADS=heads, KV_HEADS=kv_heads, D=d, HALF=triton.next_power_of_2(d // 2), NORMED=norms is not None,
            EARLY=early, launch_pdl=early, num_warps=1,
        )  # fmt: skip
    return q
