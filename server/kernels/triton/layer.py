"""Fused elementwise work of a decoder layer. Arithmetic is in float32, rounded where the reference rounds.

Each kernel is launched early where the device can (see `kernels.triton.pdl`).
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from server.kernels.triton.pdl import launches_early

_FEW_TOKENS = 256  # up to these, rope has a program a head, as many as there can be; beyond, one of several heads
_MAX_GROUP = 8


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
    GROUP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program a token and GROUP heads of one kind: first the query heads, then key, then value heads."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * GROUP
    member = tl.arange(0, GROUP)[:, None]
    lane = tl.arange(0, HALF)[None, :]
    inside = (lane < D // 2) & (member >= 0)
    at = member * D + lane
    source = qkv + (token * (HEADS + 2 * KV_HEADS) + head) * D
    low = tl.load(source + at, inside, 0.0)
    high = tl.load(source + D // 2 + at, inside, 0.0)
    slot = tl.load(slots + token)
    if head < HEADS:
        target = q_out + (token * HEADS + head) * D
    elif head < HEADS + KV_HEADS:
        target = k_cache + (slot * KV_HEADS + head - HEADS) * D
    else:
        target = v_cache + (slot * KV_HEADS + head - HEADS - KV_HEADS) * D
    if head < HEADS + KV_HEADS:
        x, y = low.to(tl.float32), high.to(tl.float32)
        is_lane = lane < D // 2
        if NORMED:
            norm = q_norm if head < HEADS else k_norm
            squares = tl.sum(x * x, axis=1) + tl.sum(y * y, axis=1)
            scale = tl.rsqrt(squares / D + eps)[:, None]
            x = (x * scale * tl.load(norm + lane, is_lane, 0.0).to(tl.float32)).to(low.dtype).to(tl.float32)
            y = (y * scale * tl.load(norm + D // 2 + lane, is_lane, 0.0).to(tl.float32)).to(low.dtype).to(tl.float32)
        # cos repeats its first half in the second; sin of the second half is the plain sine.
        c = tl.load(cos + token * D + lane, is_lane, 0.0).to(tl.float32)
        s = tl.load(sin + token * D + D // 2 + lane, is_lane, 0.0).to(tl.float32)
        low = (x * c - y * s).to(low.dtype)
        high = (y * c + x * s).to(high.dtype)
    tl.store(target + at, low, inside)
    tl.store(target + D // 2 + at, high, inside)


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
    group = 1 if n <= _FEW_TOKENS else math.gcd(heads, kv_heads, _MAX_GROUP)
    if n:
        _rope_and_store[(n, (heads + 2 * kv_heads) // group)](
            qkv, q_norm, k_norm, eps, cos, sin, slots, q, k_cache, v_cache,
            HEADS=heads, KV_HEADS=kv_heads, D=d, HALF=triton.next_power_of_2(d // 2), NORMED=norms is not None,
            GROUP=group, EARLY=early, launch_pdl=early, num_warps=max(1, group // 4),
        )  # fmt: skip
    return q
