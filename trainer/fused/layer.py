"""A decoder layer as one differentiable function: which tensors it keeps for the backward pass is written here.

Norms and the product of the MLP's halves are computed again instead of kept; with checkpointing everything is, but the
layer's input. Shapes use n = tokens, h = hidden size, i = intermediate size.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer import kernels
from trainer.batches import Segments
from trainer.fused.attention import attention
from trainer.fused.projection import Group


@dataclass(frozen=True, slots=True)
class Norm:
    """An RMS norm."""

    weight: Tensor
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        return kernels.rms_norm(x, self.weight, self.eps)

    def backward(self, x: Tensor, grad: Tensor, residual: Tensor | None = None) -> Tensor:
        """The gradient for `x`, with what else x received."""
        return kernels.rms_norm_backward(x, self.weight, self.eps, grad, residual)


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer's weights: x + o(attention(qkv(norm x))), then + down(silu(gate) · up) of the normed sum."""

    first_norm: Norm
    qkv: Group
    o: Group
    second_norm: Norm
    gate_up: Group
    down: Group
    head_norms: tuple[Norm, Norm] | None  # of each query and key, before they are turned (Qwen3)
    head_dim: int
    scale: float

    @property
    def groups(self) -> tuple[Group, ...]:
        """All products."""
        return (self.qkv, self.o, self.gate_up, self.down)

    def parameters(self) -> Iterator[nn.Parameter]:
        """LoRA's, in the order of `_Function`'s arguments."""
        for group in self.groups:
            yield from group.parameters()


@dataclass(frozen=True, slots=True)
class Places:
    """Where tokens are: cos and sin [m, d] of their positions (token t has row t % m), rows and length of the batch."""

    cos: Tensor
    sin: Tensor
    rows: int
    length: int
    segments: Segments | None


@dataclass(slots=True)
class _Attention:
    """What the attention's half keeps. q, k and v are turned; `out` [rows, length, heads, d] has their graph. `raw` are
    q and k before their norms [n · heads, d], if they have any."""

    raw: tuple[Tensor, Tensor] | None
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    low_qkv: Tensor | None
    low_o: Tensor | None
    total: Tensor  # [n, h], the residual stream after it


@dataclass(slots=True)
class _Mlp:
    """What the MLP's half keeps."""

    gate: Tensor  # [n, i]
    up: Tensor
    low_gate_up: Tensor | None


def run_layer(x: Tensor, layer: Layer, places: Places, *, checkpointing: bool) -> Tensor:
    """The layer's output for x [n, h], differentiable in x and in LoRA's weights; backwards once."""
    keeps = torch.is_grad_enabled() and not checkpointing
    result: Tensor = _Function.apply(x, layer, places, keeps, *layer.parameters())  # type: ignore[no-untyped-call]
    return result


def run_norm(x: Tensor, norm: Norm) -> Tensor:
    """The norm of x [n, h], differentiable in x."""
    result: Tensor = _NormFunction.apply(x, norm)  # type: ignore[no-untyped-call]
    return result


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Layer, places: Places, keeps: bool, *parameters: nn.Parameter) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            attended = _attend(x, layer, places, keeps)
            mlp = _gate_up(attended.total, layer)
            act = kernels.swiglu(mlp.gate, mlp.up)
            (result,), low_down = layer.down.forward(act, residual=attended.total)
        ctx.layer, ctx.places, ctx.low_down = layer, places, low_down
        ctx.kept = (attended, mlp) if keeps else None
        ctx.save_for_backward(x)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        layer, places = ctx.layer, ctx.places
        grad = grads[0].contiguous()
        with torch.autocast(x.device.type, enabled=False):
            kept, ctx.kept = ctx.kept, None  # the graph holds on to ctx until the step's end, memory should not
            if kept is None:
                attended = _attend(x, layer, places, True)
                mlp = _gate_up(attended.total, layer)
            else:
                attended, mlp = kept
            del kept
            d_total, mlp_gradients = _mlp_backward(attended.total, layer, mlp, ctx.low_down, grad)
            del mlp
            d_x, gradients = _attention_backward(x, layer, places, attended, d_total, ctx.needs_input_grad[0])
        return d_x, None, None, None, *gradients, *mlp_gradients


def _attend(x: Tensor, layer: Layer, places: Places, is_trained: bool) -> _Attention:
    """The attention's half, forwards."""
    (q, k, v), low_qkv = layer.qkv.forward(layer.first_norm.forward(x))
    shape = (places.rows, places.length, -1, layer.head_dim)
    raw = None
    if layer.head_norms:
        raw = (q.view(-1, layer.head_dim), k.view(-1, layer.head_dim))
        q, k = (norm.forward(tensor) for norm, tensor in zip(layer.head_norms, raw, strict=True))
    for tensor in (q, k):
        kernels.rope_(tensor.view(x.shape[0], -1, layer.head_dim), places.cos, places.sin)
    q, k, v = (tensor.view(shape).requires_grad_(is_trained) for tensor in (q, k, v))
    with torch.set_grad_enabled(is_trained):
        out = attention(q, k, v, layer.scale, places.segments)
    (total,), low_o = layer.o.forward(out.detach().reshape(x.shape[0], -1), residual=x)
    return _Attention(raw, q, k, v, out, low_qkv, low_o, total)


def _gate_up(total: Tensor, layer: Layer) -> _Mlp:
    """The MLP's half, forwards, up to its two halves."""
    (gate, up), low = layer.gate_up.forward(layer.second_norm.forward(total))
    return _Mlp(gate, up, low)


def _mlp_backward(
    total: Tensor, layer: Layer, mlp: _Mlp, low_down: Tensor | None, grad: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The gradients of the MLP's input and of its LoRA weights; overwrites what `mlp` holds."""
    d_act, d_low = layer.down.backward([grad])
    assert d_act is not None, "asked for"
    kernels.swiglu_backward_(mlp.gate, mlp.up, d_act)
    act, d_halves = d_act, [mlp.gate, mlp.up]
    down_gradients = list(layer.down.lora_gradients(act, low_down, d_low, [grad]))
    del act, d_act
    d_normed, d_low = layer.gate_up.backward(d_halves)
    assert d_normed is not None, "asked for"
    normed = layer.second_norm.forward(total)
    gradients = list(layer.gate_up.lora_gradients(normed, mlp.low_gate_up, d_low, d_halves))
    return layer.second_norm.backward(total, d_normed, grad), [*gradients, *down_gradients]


def _attention_backward(
    x: Tensor, layer: Layer, places: Places, attended: _Attention, grad: Tensor, needs_input: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """The gradients of the layer's input, if that is needed, and of the attention's LoRA weights."""
    n = x.shape[0]
    out = attended.out.detach().reshape(n, -1)
    d_out, d_low = layer.o.backward([grad])
    assert d_out is not None, "asked for"
    o_gradients = list(layer.o.lora_gradients(out, attended.low_o, d_low, [grad]))
    halves = (attended.q, attended.k, attended.v)
    d_heads = torch.autograd.grad(attended.out, halves, d_out.view_as(attended.out))
    d_q, d_k, d_v = (tensor.reshape(n, -1, layer.head_dim).contiguous() for tensor in d_heads)
    for tensor in (d_q, d_k):
        kernels.rope_(tensor, places.cos, places.sin, inverse=True)
    if layer.head_norms and attended.raw:
        pairs = zip(layer.head_norms, attended.raw, (d_q, d_k), strict=True)
        d_q, d_k = (norm.backward(raw, tensor.view_as(raw)) for norm, raw, tensor in pairs)
    d_parts = [tensor.view(n, -1) for tensor in (d_q, d_k, d_v)]
    d_normed, d_low = layer.qkv.backward(d_parts, needs_input=needs_input)
    gradients = list(layer.qkv.lora_gradients(layer.first_norm.forward(x), attended.low_qkv, d_low, d_parts))
    d_x = None if d_normed is None else layer.first_norm.backward(x, d_normed, grad)
    return d_x, [*gradients, *o_gradients]


class _NormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Norm) -> Tensor:
        ctx.norm = norm
        ctx.save_for_backward(x)
        return norm.forward(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return ctx.norm.backward(x, grads[0].contiguous()), None
