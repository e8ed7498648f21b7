"""Products with 4-bit weights, repacked once for tensor cores."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from server.base.weights import HOPPER_COUNTERS, HOPPER_GROUP, fits_hopper
from server.kernels.cuda.module import FLOAT, INT, LONG, POINTER, Kernel, load, tensor_map
from server.kernels.cuda.plans import TABLE_BYTES, Plan, RowsPlan, WarpgroupPlan
from server.kernels.reference.four_bit import CODES

GROUP = HOPPER_GROUP
COUNTERS = HOPPER_COUNTERS  # of blocks of outputs, where several blocks of threads share one


@dataclass(frozen=True, slots=True)
class RepackedWeight:
    """W [out, in] in the order that the kernels read: tiles of 16 outputs by 64 inputs, of which lane 4 g + t of a warp
    holds what it needs as the left operand of four products of depth 16: for outputs g and g + 8 and each product,
    inputs 2 t, 2 t + 1, 2 t + 8 and 2 t + 9."""

    codes: Tensor  # uint8 [out / 16, in / 64, 32 lanes, 16]
    absmax: Tensor  # float32 [out / 16, in / 256, 16 outputs, 4]
    arrivals: Tensor  # int32, zeros between launches
    quant_type: str
    out_features: int
    in_features: int


def repack(packed: Tensor, scales: Tensor, quant_type: str, shape: tuple[int, int]) -> RepackedWeight:
    """packed uint8 [out · in / 2], the first code of a byte in its high nibble, and scales float32 [out · in / 64]."""
    (out, features), device = shape, packed.device
    assert fits_hopper(out, features, packed.numel() * 2 // scales.numel()), f"{shape} cannot be repacked"
    codes = packed.view(out // 16, 2, 8, features // 64, 4, 2, 4)  # tile, half, g, column of tiles, product, half, t
    codes = codes.permute(0, 3, 2, 6, 1, 4, 5).reshape(out // 16, features // 64, 32, 16)
    absmax = scales.view(out // 16, 16, features // GROUP, 4).transpose(1, 2).contiguous()
    arrivals = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
    return RepackedWeight(codes.contiguous(), absmax, arrivals, quant_type, out, features)


def code_pairs(quant_type: str, dtype: torch.dtype) -> tuple[Tensor, float]:
    """int32 [256], for each byte its two codes times a constant, rounded to `dtype`, the first in the low half; and by
    what a product with them has to be multiplied. The constant is the one that makes the codes' rounding least: their
    mean error is then half that of weights rounded one by one (NF4 in bfloat16: 0.8e-3 for 1.65e-3; FP4: none)."""
    codes = torch.tensor(CODES[quant_type], dtype=torch.float64)
    factors = 1 + torch.arange(4096, dtype=torch.float64)[:, None] / 4096
    error = ((codes * factors).to(dtype).double() / factors - codes).square().sum(1)
    factor = float(factors[error.argmin()])
    rounded = (codes * factor).to(dtype).view(torch.int16).int() & 0xFFFF
    byte = torch.arange(256)
    return rounded[byte >> 4] | (rounded[byte & 15] << 16), 1 / factor


def _check_rows(x: Tensor, weight: RepackedWeight) -> None:
    assert x.shape[1] == weight.in_features, f"{x.shape[1]} inputs for {weight.in_features}"
    assert x.stride(1) == 1, "x must be contiguous along its features"
    assert x.data_ptr() % 16 == 0, "x must start at a multiple of 16 bytes"
    assert x.stride(0) % 8 == 0, "and so must its rows"


def multiply(x: Tensor, weight: RepackedWeight, plan: Plan) -> Tensor:
    """x [n, in] of bfloat16 or float16 → x Wᵀ [n, out], accumulated in float32, by the kernel that the plan is for."""
    if isinstance(plan, RowsPlan):
        return four_bit_rows(x, weight, plan)
    return four_bit_warpgroup(x, weight, plan)


@cache
def _pairs_on(quant_type: str, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, float]:
    pairs, scale = code_pairs(quant_type, dtype)
    return pairs.to(device), scale


@cache
def _loaded(name: str, macros: tuple[tuple[str, int], ...], shared_bytes: int, device: torch.device) -> Kernel:
    return load(f"{name}.cu", name, dict(macros), shared_bytes, device)


def rows_macros(plan: RowsPlan, dtype: torch.dtype) -> dict[str, int]:
    """What the source of `four_bit_rows` is compiled with."""
    names = {"NT": plan.row_tiles, "MT": plan.feature_tiles, "WARPS": plan.warps, "DEPTH": plan.depth}
    return names | {"STAGES": plan.stages, "RESIDENT": plan.resident, "BF16": int(dtype is torch.bfloat16)}


def _rows_kernel(plan: RowsPlan, dtype: torch.dtype, device: torch.device) -> Kernel:
    shared = TABLE_BYTES + plan.stages * plan.row_tiles * 8 * (2 * GROUP + 16)
    return _loaded("four_bit_rows", tuple(rows_macros(plan, dtype).items()), shared, device)


_ROWS_TYPES: Sequence[type] = (*[POINTER] * 7, *[INT] * 3, *[LONG] * 2, FLOAT)


def four_bit_rows(x: Tensor, weight: RepackedWeight, plan: RowsPlan) -> Tensor:
    """x [n, in] of bfloat16 or float16 → y [n, out] = x Wᵀ, accumulated in float32, summed in an order that depends on
    the shapes and the plan only."""
    n, out = x.shape[0], weight.out_features
    _check_rows(x, weight)
    pairs, scale = _pairs_on(weight.quant_type, x.dtype, x.device)
    y = torch.empty(n, out, dtype=x.dtype, device=x.device)
    width, rows = plan.warps * plan.feature_tiles * 16, plan.row_tiles * 8
    grid = (-(-n // rows), -(-out // width), plan.splits)
    blocks = grid[0] * grid[1]
    assert plan.splits == 1 or blocks <= COUNTERS, "more blocks than counters"
    assert plan.splits <= weight.in_features // GROUP, f"{plan.splits} parts of {weight.in_features} inputs"
    partial = torch.empty(blocks * plan.splits * rows * width if plan.splits > 1 else 0, device=x.device)
    arguments = (weight.codes, weight.absmax, pairs, x, y, partial, weight.arrivals, n, out // 16)
    strides = (weight.in_features // GROUP, x.stride(0), out, scale)
    kernel = _rows_kernel(plan, x.dtype, x.device)
    kernel.launch(grid, plan.warps * 32, (*arguments, *strides), _ROWS_TYPES, plan.early)
    return y


def warpgroup_macros(plan: WarpgroupPlan, dtype: torch.dtype) -> dict[str, int]:
    """What the source of `four_bit_warpgroup` is compiled with."""
    names = {"NC": plan.row_chunks, "CHUNK": plan.chunk, "GROUPS": plan.groups, "KB": plan.columns}
    more = {"STAGES": plan.stages, "RESIDENT": plan.resident, "SPLITS": plan.splits, "SHARED_OUT": int(plan.shared_out)}
    return names | more | {"BF16": int(dtype is torch.bfloat16)}


def _warpgroup_kernel(plan: WarpgroupPlan, dtype: torch.dtype, device: torch.device) -> Kernel:
    return _loaded("four_bit_warpgroup", tuple(warpgroup_macros(plan, dtype).items()), plan.shared_bytes, device)


@lru_cache(maxsize=4096)
def _map(address: int, shape: tuple[int, int], stride: int, dtype: torch.dtype, rows: int) -> Any:
    """Of x at `address`: it says where and how large, and nothing of what is there."""
    return tensor_map(address, shape, stride, (rows, 64), dtype)


_WARPGROUP_TYPES: Sequence[type | None] = (None, *[POINTER] * 6, *[INT] * 3, FLOAT)


def four_bit_warpgroup(x: Tensor, weight: RepackedWeight, plan: WarpgroupPlan) -> Tensor:
    """As `four_bit_rows`. Where tiles are shared out, blocks wait for each other: one such product at a time."""
    n, out = x.shape[0], weight.out_features
    _check_rows(x, weight)
    assert plan.splits * plan.columns * 64 <= weight.in_features, f"{plan.splits} parts of {weight.in_features} inputs"
    pairs, scale = _pairs_on(weight.quant_type, x.dtype, x.device)
    y = torch.empty(n, out, dtype=x.dtype, device=x.device)
    grid = (-(-n // plan.rows), -(-out // plan.width), plan.splits)
    if plan.shared_out:
        multiprocessors = torch.cuda.get_device_properties(x.device).multi_processor_count
        shares = grid[0] * grid[1] * (weight.in_features // 64 // plan.columns)
        grid = (multiprocessors * plan.resident, 1, 1)
        assert shares >= grid[0], "a block without a share would be waited for in vain"
        assert shares * grid[0] < 2**32, "a block's share is counted in 32 bits"
    partial = torch.empty(grid[0] * plan.rows * plan.width if plan.shared_out else 0, device=x.device)
    of = _map(x.data_ptr(), (n, weight.in_features), x.stride(0), x.dtype, plan.rows)
    buffers = (of, weight.codes, weight.absmax, pairs, y, partial, weight.arrivals)
    kernel = _warpgroup_kernel(plan, x.dtype, x.device)
    arguments = (*buffers, n, out // 16, weight.in_features // 64, scale)
    kernel.launch(grid, plan.groups * 128, arguments, _WARPGROUP_TYPES, plan.early)
    return y


@cache
def _exact_pairs_on(quant_type: str, device: torch.device) -> Tensor:
    """float32 [256, 2]: each byte's codes."""
    codes, byte = torch.tensor(CODES[quant_type], dtype=torch.float32), torch.arange(256)
    return torch.stack([codes[byte >> 4], codes[byte & 15]], dim=1).to(device)


def _dense_kernel(dtype: torch.dtype, device: torch.device) -> Kernel:
    shared = TABLE_BYTES + 8 * 16 * (128 + 16)
    return _loaded("four_bit_dense", (("BF16", int(dtype is torch.bfloat16)),), shared, device)


_DENSE_TYPES: Sequence[type] = (*[POINTER] * 4, *[INT] * 2)


def four_bit_dense(weight: RepackedWeight, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The weight [out, in] in 16 bits: code times absmax in float32, rounded once, as bitsandbytes has it."""
    device = weight.codes.device
    if out is None:
        out = torch.empty(weight.out_features, weight.in_features, dtype=dtype, device=device)
    tiles, columns = weight.out_features // 16, weight.in_features // 64
    blocks = min(-(-tiles * columns // 8), 4 * torch.cuda.get_device_properties(device).multi_processor_count)
    arguments = (weight.codes, weight.absmax, _exact_pairs_on(weight.quant_type, device), out, tiles, columns)
    _dense_kernel(dtype, device).launch((blocks, 1, 1), 256, arguments, _DENSE_TYPES, False)
    return out
