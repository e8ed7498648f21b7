"""The likeliest token of each row of logits: the first of the largest values, as `torch.argmax` on a CPU."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from server.kernels.triton.pdl import launches_early

_BLOCK = 2048


def argmax_rows(x: Tensor) -> Tensor:
    """x [n, m] → [n] int64; contiguous. NaN counts as infinity. Two launches: over parts of rows, over those parts."""
    n, width = x.shape
    assert x.is_contiguous(), "x must be contiguous"
    result = torch.empty(n, dtype=torch.int64, device=x.device)
    if n == 0:
        return result
    parts = triton.cdiv(width, _BLOCK)
    largest = torch.empty(n, parts, dtype=torch.float32, device=x.device)
    where = torch.empty(n, parts, dtype=torch.int32, device=x.device)
    early = launches_early(x.device, len(x))
    options = {"EARLY": early, "launch_pdl": early}
    _argmax_parts[(n, parts)](x, largest, where, width, parts, BLOCK=_BLOCK, num_warps=4, **options)
    _argmax_of_parts[(n,)](
        largest, where, result, parts, BLOCK=max(triton.next_power_of_2(parts), 32), num_warps=1, **options
    )
    return result


@triton.jit
def _argmax_parts(x, largest, where, width, parts, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """Of each part of a row the largest value and its first index."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row, part = tl.program_id(0), tl.program_id(1)
    index = part * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + row.to(tl.int64) * width + index, index < width, float("-inf")).to(tl.float32)
    values = tl.where(values == values, values, float("inf"))
    value, at = tl.max(values, axis=0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(largest + row * parts + part, value)
    tl.store(where + row * parts + part, part * BLOCK + at)


@triton.jit
def _argmax_of_parts(largest, where, result, parts, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """The index of the largest value of a row's parts; of several the first."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    part = tl.arange(0, BLOCK)
    values = tl.load(largest + row * parts + part, part < parts, float("-inf"))
    at = tl.argmax(values, axis=0, tie_break_left=True)
    tl.store(result + row, tl.load(where + row * parts + at).to(tl.int64))
