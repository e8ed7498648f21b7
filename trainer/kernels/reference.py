"""The kernels' definitions in plain torch, for any device. Arithmetic is in float32; results have the inputs' dtype."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight · x / rms(x) for x [n, h], rounded before the weight as transformers does."""
    return weight * (x.float() * _inverse_rms(x.float(), eps)).to(x.dtype)


def rms_norm_backward(x: Tensor, weight: Tensor, eps: float, grad: Tensor, residual: Tensor | None) -> Tensor:
    """The gradient of `rms_norm` [n, h] for x, given that of its result; plus `residual`, what else x received."""
    scale = _inverse_rms(x.float(), eps)
    normed = x.float() * scale
    weighted = grad.float() * weight.float()
    result = scale * (weighted - normed * (weighted * normed).mean(-1, keepdim=True))
    return (result if residual is None else result + residual.float()).to(x.dtype)


def rope_(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> Tensor:
    """x [n, heads, d] turned by its position, in place: x · cos + (-x₂, x₁) · sin for x = (x₁, x₂). Token t has row
    t % m of cos and sin [m, d]. `inverse` is the gradient's way: the transposed matrix."""
    rows = torch.arange(x.shape[0], device=x.device) % cos.shape[0]
    c, s = cos[rows].float().unsqueeze(1), sin[rows].float().unsqueeze(1)
    low, high = x.float().chunk(2, dim=-1)
    if inverse:
        turned = s * x.float()
        turned = torch.cat([turned.chunk(2, dim=-1)[1], -turned.chunk(2, dim=-1)[0]], dim=-1)
    else:
        turned = s * torch.cat([-high, low], dim=-1)
    return x.copy_(x.float() * c + turned)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, [n, i]."""
    return F.silu(gate.float()).to(gate.dtype) * up


def swiglu_backward_(gate: Tensor, up: Tensor, grad: Tensor) -> None:
    """Given the gradient of `swiglu`'s result: `gate` and `up` become their gradients, `grad` becomes the result."""
    g, u, d = gate.float(), up.float(), grad.float()
    share = torch.sigmoid(g)
    silu = g * share
    d_gate, d_up, result = d * u * (share + silu * (1 - share)), d * silu, silu * u  # all, before one is overwritten
    gate.copy_(d_gate)
    up.copy_(d_up)
    grad.copy_(result)


def cross_entropy_(logits: Tensor, targets: Tensor, scale: float) -> Tensor:
    """sum over i of -log softmax(scale · logits[i])[targets[i]], float32; `logits` [n, words] become their gradient."""
    shares = torch.log_softmax(logits.float() * scale, dim=-1)
    loss = -shares.gather(1, targets.unsqueeze(1)).sum()
    gradient = shares.exp_()
    gradient[torch.arange(len(targets), device=targets.device), targets] -= 1
    logits.copy_(gradient * scale)
    return loss


def dequantize(packed: Tensor, state: Any) -> Tensor:
    """See `kernels.dequantize`."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(packed, state)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
