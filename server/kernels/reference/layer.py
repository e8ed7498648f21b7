"""Norms, rotary embedding and activation in plain torch, with the rounding that transformers has."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., h] / rms(x) · weight [h]; the mean square is taken in float32.

    Zhang and Sennrich, 2019 (arXiv 1910.07467).
    """
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual), both [n, h]; `residual` is updated in place."""
    residual += x
    return rms_norm(residual, weight, eps), residual


def rope_table(
    head_dim: int,
    max_position: int,
    theta: float,
    scaling: tuple[float, float, float, int] | None,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """cos and signed sin, each [max_position, head_dim], so that rope(x) = x · cos + roll(x, d/2) · sin.

    `scaling` is Llama 3's (factor, low_freq_factor, high_freq_factor, original_max_position): wavelengths
    beyond original/low are stretched by `factor`, below original/high kept, and blended between.
    """
    inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if scaling is not None:
        factor, low, high, original = scaling
        wavelength = 2 * math.pi / inverse
        blend = ((original / wavelength - low) / (high - low)).clamp(0, 1)
        inverse = inverse / factor * (1 - blend) + inverse * blend
    angles = torch.outer(torch.arange(max_position, dtype=torch.float32), inverse)  # [max_position, d/2]
    cos, sin = angles.cos(), angles.sin()
    return (
        torch.cat([cos, cos], dim=-1).to(device, dtype),
        torch.cat([-sin, sin], dim=-1).to(device, dtype),
    )


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [n, heads, d] by its rows' angles: cos, sin [n, 1, d] from `rope_table`.

    Su et al., 2021 (arXiv 2104.09864), in the half-split layout of Llama checkpoints.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) · up for gate_up [n, 2·i] → [n, i] (SwiGLU, Shazeer 2020, arXiv 2002.05202)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


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
    """Rotate queries and keys of qkv [n, (heads + 2 · kv_heads) · d], store K and V, return q [n, heads, d].

    The caches are [num_slots, kv_heads, d]; token i goes to slots[i]. cos, sin [n, 1, d] are its rows of `rope_table`.
    `norms` are the RMSNorm weights [d] of each query and key head before the rotation (Qwen 3), or None.
    """
    kv_heads, d = k_cache.shape[1:]
    states = qkv.view(qkv.shape[0], -1, d)
    heads = states.shape[1] - 2 * kv_heads
    qk, v = states[:, : heads + kv_heads], states[:, heads + kv_heads :]
    if norms is not None:
        queries, keys = qk.split([heads, kv_heads], dim=1)
        qk = torch.cat([rms_norm(queries, norms[0], eps), rms_norm(keys, norms[1], eps)], dim=1)
    rotated = apply_rope(qk, cos, sin)
    q, k = rotated[:, :heads], rotated[:, heads:]
    k_cache.index_copy_(0, slots, k)
    v_cache.index_copy_(0, slots, v)
    return q
