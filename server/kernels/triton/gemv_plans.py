"""Which products of a few rows run on `gemv` rather than cuBLAS, and how they are cut into programs. No triton here."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch

MAX_ROWS = 4


@dataclass(frozen=True, slots=True)
class GemvPlan:
    """A program takes `block_n` rows of the weight in steps of `block_k` features.

    Best no fewer than 256 features a warp: then each thread's part of x lies as its part of the weight does, and none
    moves between threads. `early`: the kernel is launched before the one ahead of it ends (programmatic dependent
    launch), and reads its first tile meanwhile.
    """

    block_n: int
    block_k: int
    num_warps: int
    early: bool = False


# Measured on an H200 in bf16, µs beside cuBLAS's: (rows up to, input features, output columns, gated) → plan. What is
# not here is cuBLAS's; of four rows it is as fast.
_HOPPER: Mapping[tuple[int, int, int, bool], GemvPlan] = {
    (1, 4096, 4096, False): GemvPlan(8, 2048, 4, early=True),  # 8.9, 13.5
    (1, 4096, 6144, False): GemvPlan(4, 2048, 4, early=True),  # 12.5, 15.2
    (1, 4096, 28672, True): GemvPlan(4, 2048, 4, early=True),  # 52.7, 61.3 with SiLU × up
    (1, 4096, 28672, False): GemvPlan(4, 2048, 4, early=True),  # as with SiLU × up, which adds nothing; 56.6
    (1, 14336, 4096, False): GemvPlan(4, 2048, 8, early=True),  # 28.2, 32.1
    (1, 4096, 128256, False): GemvPlan(4, 4096, 4, early=True),  # 232.6, 284.3
    (2, 4096, 4096, False): GemvPlan(2, 2048, 4, early=True),  # 9.4, 13.4
    (2, 4096, 6144, False): GemvPlan(2, 2048, 4, early=True),  # 13.7, 15.6
}
_HOPPER_CAPABILITY = (9, 0)
_ROWS = (1, 2, 4)


def gemv_plan(rows: int, weight: torch.Tensor, gated: bool = False) -> GemvPlan | None:
    """The plan of a product of `rows` rows with weight [out, in] (`gated`: SiLU × up fused); None: not by `gemv`."""
    if not 0 < rows <= MAX_ROWS or weight.element_size() != 2:
        return None
    return _gemv_plan(rows, weight.shape[1], weight.shape[0], gated, weight.device)


@cache
def _gemv_plan(rows: int, features: int, width: int, gated: bool, device: torch.device) -> GemvPlan | None:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != _HOPPER_CAPABILITY:
        return None
    return _HOPPER.get((next(limit for limit in _ROWS if rows <= limit), features, width, gated))
