"""A linear layer whose weight is laid out once, at load, for the device it runs on."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from server.kernels.cuda.module import is_available
from server.kernels.cuda.skinny_plans import skinny_plan
from server.kernels.layer import silu_mul
from server.kernels.triton.gemv_plans import gemv_plan


class Linear(Protocol):
    """y = x Wᵀ + bias, in whatever format W [out, in] lies. What changes W does so in place, for CUDA graphs' sake."""

    @property
    def out_features(self) -> int: ...

    @property
    def num_bytes(self) -> int: ...

    def __call__(self, x: Tensor) -> Tensor:
        """x [n, in] → [n, out], accumulated in float32."""
        ...

    def dense(self) -> Tensor:
        """The values [out, in] of W."""
        ...

    def write(self, weight: Tensor) -> None:
        """Hold these values, as nearly as the format can."""
        ...

    def save(self) -> tuple[Tensor, ...]:
        """All bits of W, in host memory."""
        ...

    def restore(self, saved: tuple[Tensor, ...]) -> None:
        """Hold what `save` gave."""
        ...


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """y = x Wᵀ + bias. `weight` is [out, in], in oneDNN's blocked layout when `blocked`."""

    weight: Tensor
    bias: Tensor | None
    out_features: int
    blocked: bool

    def __call__(self, x: Tensor) -> Tensor:
        """x [n, in] → [n, out], accumulated in float32."""
        if self.blocked:
            out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
            return out
        plan = gemv_plan(len(x), self.weight)
        if plan is not None:
            from server.kernels.triton.gemv import gemv

            return gemv(x, self.weight, self.bias, plan)
        skinny = skinny_plan(len(x), *reversed(self.weight.shape))
        if skinny is not None and self.bias is None and _runs_skinny(self.weight):
            from server.kernels.cuda.skinny import skinny_linear

            return skinny_linear(x, self.weight, skinny)
        return F.linear(x, self.weight, self.bias)

    def dense(self) -> Tensor:
        """The weight [out, in] in its plain layout; where it lies so, itself."""
        return self.weight.to_dense() if self.blocked else self.weight

    def write(self, weight: Tensor) -> None:
        """Hold another weight [out, in] from now on, rounded to this one's dtype. In place: a graph that has captured
        this layer computes with it."""
        rounded = weight.to(self.weight.dtype)
        if self.blocked:
            self.weight.data = torch.ops.mkldnn._reorder_linear_weight(rounded, None)
        else:
            self.weight.copy_(rounded)

    def save(self) -> tuple[Tensor, ...]:
        """All bits of the weight, in host memory."""
        return (self.dense().to("cpu", copy=True),)

    def restore(self, saved: tuple[Tensor, ...]) -> None:
        """Hold what `save` gave, in place."""
        self.write(saved[0].to(self.weight.device))

    @property
    def num_bytes(self) -> int:
        bias = 0 if self.bias is None else self.bias.numel() * self.bias.element_size()
        return self.weight.numel() * self.weight.element_size() + bias


@dataclass(frozen=True, slots=True)
class SideBySide:
    """One layer of several of different formats, whose outputs are concatenated."""

    parts: tuple[Linear, ...]

    def __call__(self, x: Tensor) -> Tensor:
        """x [n, in] → [n, out]."""
        return torch.cat([part(x) for part in self.parts], dim=1)

    @property
    def out_features(self) -> int:
        return sum(part.out_features for part in self.parts)

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts)

    def dense(self) -> Tensor:
        """The weights [out, in], one on the other."""
        return torch.cat([part.dense() for part in self.parts])

    def write(self, weight: Tensor) -> None:
        """Hold another weight [out, in] from now on."""
        pieces = weight.split([part.out_features for part in self.parts])
        for part, piece in zip(self.parts, pieces, strict=True):
            part.write(piece)

    def save(self) -> tuple[Tensor, ...]:
        """All bits of the weights, in host memory: where each part's end, and those."""
        saved = [part.save() for part in self.parts]
        ends = torch.tensor([0, *(len(tensors) for tensors in saved)]).cumsum(0)
        return (ends, *(tensor for tensors in saved for tensor in tensors))

    def restore(self, saved: tuple[Tensor, ...]) -> None:
        """Hold what `save` gave, in place."""
        ends, tensors = saved[0].tolist(), saved[1:]
        for part, (start, stop) in zip(self.parts, pairwise(ends), strict=True):
            part.restore(tensors[start:stop])


def linear_silu_mul(linear: Linear, x: Tensor) -> Tensor:
    """silu(gate) · up of linear(x) = [gate, up], x [n, in] → [n, out / 2]; one launch where that is faster."""
    if isinstance(linear, PackedLinear) and linear.bias is None and not linear.blocked:
        plan = gemv_plan(len(x), linear.weight, gated=True)
        if plan is not None:
            from server.kernels.triton.gemv import gemv_silu_mul

            return gemv_silu_mul(x, linear.weight, plan)
    return silu_mul(linear(x))


def side_by_side(parts: Sequence[Linear]) -> Linear:
    """The parts as one layer."""
    return parts[0] if len(parts) == 1 else SideBySide(tuple(parts))


def pack_linear(weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
    """Prepare weight [out, in] (and bias [out]).

    On a CPU with 16-bit dot products, `F.linear` reorders the weight at every call; oneDNN's reordered form,
    the one torch.compile's inductor uses, is made once here. Elsewhere the weight is kept as it is.
    """
    blocked = weight.device.type == "cpu" and _onednn_supports(weight.dtype)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None) if blocked else weight
    return PackedLinear(packed, bias, weight.shape[0], blocked)


def _runs_skinny(weight: Tensor) -> bool:
    return weight.dtype in (torch.bfloat16, torch.float16) and is_available(weight.device)


def _onednn_supports(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype is torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return False
