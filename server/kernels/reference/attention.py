"""Attention over a paged KV cache in plain torch.

A cache is [num_slots, kv_heads, d]: page p holds slots p·page_size … (p+1)·page_size − 1 (Kwon et al., 2023,
arXiv 2309.06180). Query head i reads KV head i // (heads / kv_heads).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def paged_decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, rows: Tensor, mask: Tensor, scale: float
) -> Tensor:
    """One query a sequence: q [n, heads, d] over n sequences of up to t tokens → [n, heads, d].

    `rows` [n, kv_heads, t] are rows of the caches seen as [num_slots · kv_heads, d], from `head_rows`; row i attends
    to its j-th token where mask[i, 0, 0, j] ([n, 1, 1, t], bool) is true.
    """
    n, heads, d = q.shape
    kv_heads = k_cache.shape[1]
    # index_select copies rows; the same by fancy indexing takes ten times as long.
    k = k_cache.view(-1, d).index_select(0, rows.flatten()).view(*rows.shape, d)
    v = v_cache.view(-1, d).index_select(0, rows.flatten()).view(*rows.shape, d)
    # The query heads that share a KV head stand as query positions, so K and V are not repeated.
    grouped = q.view(n, kv_heads, heads // kv_heads, d)
    return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scale).reshape(n, heads, d)


def head_rows(slots: Tensor, kv_heads: int) -> Tensor:
    """Cache slots [n, t] → rows [n, kv_heads, t] of a cache seen as [num_slots · kv_heads, d]."""
    return slots[:, None, :] * kv_heads + torch.arange(kv_heads, device=slots.device)[:, None]


def prefill_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """A run of queries of one sequence: q [n, heads, d] over k, v [t, kv_heads, d] → [n, heads, d].

    Without `mask` the run is the whole sequence (t = n) and attention is causal; with it, mask [n, t] says
    which keys each query sees.
    """
    repeat = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(repeat, dim=1) if repeat > 1 else x for x in (k, v))
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # [1, heads, n or t, d]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    return out.squeeze(0).transpose(0, 1)
