"""What a decoder layer does between its products, forwards and backwards: the device of the tensors chooses the form.

Every operation is defined by its plain torch form in `kernels.reference`; `kernels.triton` has the same names, and
`kernels.shapes` those for fake tensors. Weights are frozen: gradients go to inputs alone. Names that end in `_` write
over their arguments.

Shapes use n = tokens, h = hidden size, d = head size, i = intermediate size.
"""

from typing import Any

from torch import Tensor
from torch._subclasses import FakeTensor

from trainer.kernels import reference, shapes


def _form(tensor: Tensor) -> Any:
    if isinstance(tensor, FakeTensor):
        return shapes
    if tensor.is_cuda:
        from trainer.kernels import triton

        return triton
    return reference


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `reference.rms_norm`."""
    out: Tensor = _form(x).rms_norm(x, weight, eps)
    return out


def rms_norm_backward(x: Tensor, weight: Tensor, eps: float, grad: Tensor, residual: Tensor | None) -> Tensor:
    """See `reference.rms_norm_backward`."""
    d_x: Tensor = _form(x).rms_norm_backward(x, weight, eps, grad, residual)
    return d_x


def rope_(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> Tensor:
    """See `reference.rope_`."""
    out: Tensor = _form(x).rope_(x, cos, sin, inverse=inverse)
    return out


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See `reference.swiglu`."""
    out: Tensor = _form(gate).swiglu(gate, up)
    return out


def swiglu_backward_(gate: Tensor, up: Tensor, grad: Tensor) -> None:
    """See `reference.swiglu_backward_`."""
    _form(gate).swiglu_backward_(gate, up, grad)


def dequantize(packed: Tensor, state: Any) -> Tensor:
    """A weight [out, in] in 4 bits as bitsandbytes holds it, `state` its QuantState, in the state's dtype."""
    weight: Tensor = _form(packed).dequantize(packed, state)
    return weight


def cross_entropy_(logits: Tensor, targets: Tensor, scale: float) -> Tensor:
    """See `reference.cross_entropy_`."""
    loss: Tensor = _form(logits).cross_entropy_(logits, targets, scale)
    return loss
