"""The kernels on torch's fake tensors: what each allocates, and no numbers. For estimates of memory."""

from typing import Any

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `reference.rms_norm`."""
    return torch.empty_like(x)


def rms_norm_backward(x: Tensor, weight: Tensor, eps: float, grad: Tensor, residual: Tensor | None) -> Tensor:
    """See `reference.rms_norm_backward`."""
    return torch.empty_like(x)


def rope_(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> Tensor:
    """See `reference.rope_`."""
    return x


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See `reference.swiglu`."""
    return torch.empty_like(gate)


def swiglu_backward_(gate: Tensor, up: Tensor, grad: Tensor) -> None:
    """See `reference.swiglu_backward_`."""


def dequantize(packed: Tensor, state: Any) -> Tensor:
    """See `kernels.dequantize`."""
    return torch.empty(state.shape, dtype=state.dtype, device=packed.device)
