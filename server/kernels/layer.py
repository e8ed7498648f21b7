"""The operations between the products of a layer: the device of the tensors chooses the form.

Semantics are those of `kernels.reference.layer`.
"""

from torch import Tensor

from server.kernels.reference import layer as reference


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `reference.layer.rms_norm`."""
    return reference.rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `reference.layer.add_rms_norm`."""
    if x.is_cuda:
        from server.kernels.triton import layer as triton

        return triton.add_rms_norm(x, residual, weight, eps)
    return reference.add_rms_norm(x, residual, weight, eps)


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `reference.layer.silu_mul`."""
    if gate_up.is_cuda:
        from server.kernels.triton import layer as triton

        return triton.silu_mul(gate_up)
    return reference.silu_mul(gate_up)


def rope_and_store(
    qkv: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
) -> Tensor:
    """See `reference.layer.rope_and_store`."""
    if qkv.is_cuda:
        from server.kernels.triton import layer as triton

        return triton.rope_and_store(qkv, norms, eps, cos, sin, slots, k_cache, v_cache)
    return reference.rope_and_store(qkv, norms, eps, cos, sin, slots, k_cache, v_cache)
