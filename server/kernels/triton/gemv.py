"""Products of a few rows: y = x Wᵀ, where reading W once at the memory's speed is all that matters.

A program takes `block_n` rows of W over all input features. Its first tile is asked for before the kernel ahead has
ended, so that the memory is busy while small kernels run. Sums are in float32 and in one order: no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from server.kernels.triton.gemv_plans import MAX_ROWS, GemvPlan

_VECTOR = 8  # 16-bit values in one load of 16 bytes


def gemv(x: Tensor, weight: Tensor, bias: Tensor | None, plan: GemvPlan) -> Tensor:
    """x [n, in] · weight [out, in]ᵀ + bias [out] → [n, out] for n ≤ MAX_ROWS; all contiguous and of one dtype."""
    y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    _launch(x, weight, bias, y, plan, gated=False)
    return y


def gemv_silu_mul(x: Tensor, weight: Tensor, plan: GemvPlan) -> Tensor:
    """silu(gate) · up of x [n, in] · weight [2·i, in]ᵀ = [gate, up] → [n, i], rounded where `silu_mul` rounds."""
    y = torch.empty(x.shape[0], weight.shape[0] // 2, dtype=x.dtype, device=x.device)
    _launch(x, weight, None, y, plan, gated=True)
    return y


def _launch(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, plan: GemvPlan, gated: bool) -> None:
    rows, (width, features) = x.shape[0], weight.shape
    assert rows <= MAX_ROWS, f"{rows} rows"
    assert x.is_contiguous(), "x must be contiguous"
    assert weight.is_contiguous(), "weight must be contiguous"
    assert x.dtype == weight.dtype, f"{weight.dtype} weight for {x.dtype} input"
    assert features % _VECTOR == 0, f"{features} input features are not a multiple of {_VECTOR}"
    if rows == 0:
        return
    _gemv_kernel[(triton.cdiv(width, plan.block_n),)](
        x,
        weight,
        weight if bias is None else bias,
        y,
        rows,
        width,
        IN=features,
        ROWS=triton.next_power_of_2(rows),
        BLOCK_N=plan.block_n,
        BLOCK_K=plan.block_k,
        VECTOR=_VECTOR,
        GATED=gated,
        BIASED=bias is not None,
        EARLY=plan.early,
        launch_pdl=plan.early,
        num_warps=plan.num_warps,
    )


@triton.jit(do_not_specialize=["rows"])
def _gemv_kernel(
    x, weight, bias, y, rows, width,
    IN: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, VECTOR: tl.constexpr,
    GATED: tl.constexpr, BIASED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Tiles are [ROWS, BLOCK_N, BLOCK_K], laid out along BLOCK_K; a thread's vector is summed within the thread."""
    lane = tl.arange(0, BLOCK_N)
    if GATED:  # gate and up of one column follow each other
        n = lane % 2 * (width // 2) + tl.program_id(0) * (BLOCK_N // 2) + lane // 2
        is_column = tl.program_id(0) * BLOCK_N + lane < width
    else:
        n = tl.program_id(0) * BLOCK_N + lane
        is_column = n < width
    m = tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK_K)[None, None, :]
    w_tile = weight + n.to(tl.int64)[None, :, None] * IN + k
    x_tile = x + m[:, None, None] * IN + k
    is_weight = is_column[None, :, None]
    is_input = (m < rows)[:, None, None]
    if EARLY:
        gdc_launch_dependents()
    ahead = _load(w_tile, k, is_weight, 0, IN, BLOCK_K)
    if EARLY:
        gdc_wait()
    acc = tl.zeros((ROWS, BLOCK_N, BLOCK_K // VECTOR), dtype=tl.float32)
    for start in tl.static_range(0, IN, BLOCK_K):
        w = ahead
        if start + BLOCK_K < IN:
            ahead = _load(w_tile, k, is_weight, start + BLOCK_K, IN, BLOCK_K)
        xs = _load(x_tile, k, is_input, start, IN, BLOCK_K)
        products = w.to(tl.float32) * xs.to(tl.float32)
        acc += tl.sum(tl.reshape(products, (ROWS, BLOCK_N, BLOCK_K // VECTOR, VECTOR)), axis=3)
    total = tl.sum(acc, axis=2)  # [ROWS, BLOCK_N]
    if BIASED:
        total += tl.load(bias + n, is_column, 0.0).to(tl.float32)[None, :]
    if GATED:
        gate, up = tl.split(tl.reshape(total, (ROWS, BLOCK_N // 2, 2)))
        gate = gate.to(y.dtype.element_ty).to(tl.float32)
        silu = (gate / (1.0 + tl.exp(-gate))).to(y.dtype.element_ty).to(tl.float32)
        column = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        out = y + m[:, None] * (width // 2) + column[None, :]
        tl.store(out, silu * up.to(y.dtype.element_ty).to(tl.float32), (m < rows)[:, None] & (column < width // 2))
    else:
        tl.store(y + m[:, None] * width + n[None, :], total, (m < rows)[:, None] & is_column[None, :])


@triton.jit
def _load(tile, k, is_row, start: tl.constexpr, IN: tl.constexpr, BLOCK_K: tl.constexpr):
    """The tile's part at feature `start`; zero past the last feature and in masked rows."""
    if start + BLOCK_K <= IN:
        return tl.load(tile + start, is_row, 0.0)
    return tl.load(tile + start, is_row & (k < IN - start), 0.0)
