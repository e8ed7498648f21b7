"""Products of a few dozen rows with a 16-bit weight, as fast as the weight is read."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from server.kernels.cuda.module import INT, LONG, POINTER, Kernel, load, tensor_map
from server.kernels.cuda.skinny_plans import ROWS, SkinnyPlan


def macros(plan: SkinnyPlan, dtype: torch.dtype) -> dict[str, int]:
    """What the source is compiled with."""
    names = {"MW": plan.feature_tiles, "GROUPS": plan.groups, "KB": plan.columns}
    return names | {"STAGES": plan.stages, "SPLITS": plan.splits, "BF16": int(dtype is torch.bfloat16)}


@cache
def _kernel(plan: SkinnyPlan, dtype: torch.dtype, device: torch.device) -> Kernel:
    return load("skinny.cu", "skinny", macros(plan, dtype), plan.shared_bytes, device)


@cache
def _map(address: int, shape: tuple[int, int], dtype: torch.dtype, width: int) -> Any:
    """Of a weight [out, in] at `address`: it says where and how large, and nothing of what is there."""
    return tensor_map(address, shape, shape[1], (width, 64), dtype)


_TYPES: Sequence[type | None] = (None, POINTER, POINTER, INT, INT, INT, LONG, LONG)


def skinny_linear(x: Tensor, weight: Tensor, plan: SkinnyPlan) -> Tensor:
    """x [n, in], weight [out, in] of bfloat16 or float16 → x Wᵀ [n, out], accumulated in float32, summed in an order
    that depends on the shapes and the plan only."""
    (n, features), out = x.shape, weight.shape[0]
    assert features == weight.shape[1], f"{features} inputs for {weight.shape[1]}"
    assert features % (plan.columns * 64) == 0, f"{features} inputs are no multiple of {plan.columns * 64}"
    assert plan.splits * plan.columns * 64 <= features, f"{plan.splits} parts of {features} inputs"
    assert out % 4 == 0, f"{out} outputs are no multiple of 4"
    assert weight.is_contiguous(), "the weight must be contiguous"
    assert x.stride(1) == 1, "x must be contiguous along its features"
    assert x.data_ptr() % 16 == 0, "x must start at a multiple of 16 bytes"
    assert x.stride(0) % 8 == 0, "and so must its rows"
    y = torch.empty(n, out, dtype=x.dtype, device=x.device)
    of = _map(weight.data_ptr(), (out, features), x.dtype, plan.width)
    grid = (-(-out // plan.width), -(-n // ROWS), plan.splits)
    arguments = (of, x, y, n, out, features // 64, x.stride(0), out)
    _kernel(plan, x.dtype, x.device).launch(grid, plan.groups * 128, arguments, _TYPES, plan.early)
    return y
