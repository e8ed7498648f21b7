"""Causal attention of rows, or of the examples packed into them."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor

from trainer.batches import Segments


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, segments: Segments | None) -> Tensor:
    """q [rows, length, heads, d], k and v [rows, length, kv heads, d] → [rows, length, heads, d]. Differentiable."""
    if segments is None or isinstance(q, FakeTensor):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True).transpose(1, 2)
    if q.is_cuda and q.element_size() == 2:
        flat = (t.flatten(0, 1) for t in (q, k, v))
        bounds, longest = segments.bounds, segments.longest
        out: Tensor = torch.ops.aten._flash_attention_forward(
            *flat, bounds, bounds, longest, longest, 0.0, True, False, scale=scale
        )[0]
        return out.view(q.shape)
    shape = q.shape
    mask = _mask(segments.bounds, shape[0] * shape[1])
    q, k, v = (t.flatten(0, 1).transpose(0, 1).unsqueeze(0) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return out.squeeze(0).transpose(0, 1).reshape(shape)


def _mask(bounds: Tensor, n: int) -> Tensor:
    """Who sees whom, [n, n]: the same example, and no one later."""
    index = torch.arange(n, device=bounds.device)
    example = torch.bucketize(index, bounds, right=True)
    return (example[:, None] == example[None, :]) & (index[:, None] >= index[None, :])
