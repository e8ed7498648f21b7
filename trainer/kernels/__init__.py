"""What a decoder layer does between its products, forwards and backwards: the device of the tensors chooses the form.

Every operation is defined by its plain torch form in `kernels.reference`; `kernels.triton` has the same names. Weights
are frozen: gradients go to inputs alone. Names that end in `_` write over their arguments.

Shapes use n = tokens, h = hidden size, d = head size, i = intermediate size.
"""

from typing import Any

from torch import Tensor

from trainer.kernels import reference


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `reference.rms_norm`."""
    if x.is_cuda:
        from trainer.kernels import triton

        return triton.rms_norm(x, weight, eps)
    return reference.rms_norm(x, weight, eps)


def rms_norm_backward(x: Tensor, weight: Tensor, eps: float, grad: Tensor, residual: Tensor | None) -> Tensor:
    """See `reference.rms_norm_backward`."""
    if x.is_cuda:
        from trainer.kernels import triton

        return triton.rms_norm_backward(x, weight, eps, grad, residual)
    return reference.rms_norm_backward(x, weight, eps, grad, residual)


def rope_(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> Tensor:
    """See `reference.rope_`."""
    if x.is_cuda:
        from trainer.kernels import triton

        return triton.rope_(x, cos, sin, inverse=inverse)
    return reference.rope_(x, cos, sin, inverse=inverse)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See `reference.swiglu`."""
    if gate.is_cuda:
        from trainer.kernels import triton

        return triton.swiglu(gate, up)
    return reference.swiglu(gate, up)


def swiglu_backward_(gate: Tensor, up: Tensor, grad: Tensor) -> None:
    """See `reference.swiglu_backward_`."""
    if gate.is_cuda:
        from trainer.kernels import triton

        triton.swiglu_backward_(gate, up, grad)
    else:
        reference.swiglu_backward_(gate, up, grad)


def cross_entropy_(logits: Tensor, targets: Tensor, scale: float) -> Tensor:
    """See `reference.cross_entropy_`."""
    if logits.is_cuda:
        from trainer.kernels import triton

        return triton.cross_entropy_(logits, targets, scale)
    return reference.cross_entropy_(logits, targets, scale)


def dequantize(packed: Tensor, state: Any) -> Tensor:
    """A weight [out, in] in 4 bits as bitsandbytes holds it, `state` its QuantState, in the state's dtype."""
    if packed.is_cuda:
        from trainer.kernels import triton

        return triton.dequantize(packed, state)
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(packed, state)
