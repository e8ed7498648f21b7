"""Which captured decode batches attend by `paged_decode` rather than FlashInfer, and with which plan."""

import torch

from server.kernels.triton.attention import DecodePlan

# Sequences up to → plan, from an H200 in bf16 with 32 query and 8 KV heads of 128 and pages of 16. µs beside
# FlashInfer's, with runs cut on the device: 1 × 600 keys 7.1, 10.9; 1 × 4000 12.5, 14.4; 16 × 600 18.3, 21.7;
# 64 × 600 47.5, 54.0; 64 mixed 53.6, 71.0.
_HOPPER = (
    (2, DecodePlan(32, 4, 2, early=True, prefetch=1, merged=16)),
    (16, DecodePlan(64, 4, 2, early=True, prefetch=1)),
    (128, DecodePlan(64, 4, 2, early=True)),
)
_CAPABILITY = (9, 0)
_KV_HEADS, _HEAD_DIM, _PAGE = 8, 128, 16
_MAX_GROUP = 4


def decode_plan(
    batch: int, heads: int, kv_heads: int, head_dim: int, page_size: int, dtype: torch.dtype, device: torch.device
) -> DecodePlan | None:
    """The plan of a batch of this many sequences; None: by FlashInfer."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != _CAPABILITY or dtype.itemsize != 2:
        return None
    if (kv_heads, head_dim, page_size) != (_KV_HEADS, _HEAD_DIM, _PAGE) or heads > _MAX_GROUP * kv_heads:
        return None
    return next((plan for limit, plan in _HOPPER if batch <= limit), None)
