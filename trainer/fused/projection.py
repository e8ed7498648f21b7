"""Frozen linear layers with LoRA's A and B beside them: products that share an input, forwards and backwards.

y_i = x W_iᵀ + bias_i + s_i (x A_iᵀ) B_iᵀ; the A of all are one product, and B's is added where the base's result lies.
Shapes use n = tokens, r = the sum of the ranks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Lora:
    """A [rank, in] and B [out, rank] in the dtype that they are trained in, and alpha / rank."""

    a: nn.Parameter
    b: nn.Parameter
    scaling: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True, slots=True)
class Projection:
    """One layer: its base, in 16 or 32 bits or bitsandbytes's 4, and LoRA's part if it has one."""

    base: Any
    lora: Lora | None

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The base's weight [out, in]; of one in 4 bits a copy that is not kept."""
        weight: Tensor = self.base.weight
        if (state := getattr(weight, "quant_state", None)) is not None:
            from bitsandbytes.functional import dequantize_4bit

            weight = dequantize_4bit(weight, state)
        return weight.to(dtype)

    @property
    def bias(self) -> Tensor | None:
        bias: Tensor | None = self.base.bias
        return bias


@dataclass(frozen=True, slots=True)
class Group:
    """Projections of one input: q, k and v; gate and up; one alone."""

    projections: tuple[Projection, ...]

    def parameters(self) -> Iterator[nn.Parameter]:
        """A and B of each projection that has them, in that order."""
        for projection in self.projections:
            if projection.lora:
                yield projection.lora.a
                yield projection.lora.b

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[list[Tensor], Tensor | None]:
        """x [n, in] → each projection's y [n, out], on top of `residual` if given; and x Aᵀ [n, r]."""
        low = self.low(x)
        outputs = []
        for projection, part in zip(self.projections, self._split(low), strict=True):
            weight = projection.weight(x.dtype)
            if residual is None:
                y = F.linear(x, weight, _as(projection.bias, x))
            else:
                y = torch.addmm(residual, x, weight.t())
                if projection.bias is not None:
                    y += projection.bias
            del weight
            if projection.lora and part is not None:
                y.addmm_(part, projection.lora.b.to(x.dtype).t(), alpha=projection.lora.scaling)
            outputs.append(y)
        return outputs, low

    def low(self, x: Tensor) -> Tensor | None:
        """x Aᵀ [n, r], None where no projection has LoRA."""
        stacked = self._stacked_a(x.dtype)
        return None if stacked is None else x @ stacked.t()

    def backward(self, grads: Sequence[Tensor], *, needs_input: bool = True) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of the input [n, in] and of x Aᵀ [n, r], given those of each y [n, out]."""
        dtype = grads[0].dtype
        d_low = self._backward_low(grads)
        if not needs_input:
            return None, d_low
        d_input: Tensor | None = None
        for projection, grad in zip(self.projections, grads, strict=True):
            weight = projection.weight(dtype)
            d_input = grad @ weight if d_input is None else d_input.addmm_(grad, weight)
            del weight
        stacked = self._stacked_a(dtype)
        if d_input is not None and d_low is not None and stacked is not None:
            d_input.addmm_(d_low, stacked)
        return d_input, d_low

    def lora_gradients(
        self, x: Tensor, low: Tensor | None, d_low: Tensor | None, grads: Sequence[Tensor]
    ) -> Iterator[Tensor]:
        """The gradients of `parameters`, from what `forward` took and gave and `backward` took and gave."""
        if low is None or d_low is None:
            return
        d_stacked = d_low.t() @ x  # [r, in]
        parts = zip(self.projections, self._split(low), self._split_rows(d_stacked), grads, strict=True)
        for projection, part, d_a, grad in parts:
            if projection.lora and part is not None and d_a is not None:
                b = projection.lora.b
                yield d_a.to(projection.lora.a.dtype)
                yield torch.addmm(b.to(x.dtype), grad.t(), part, beta=0, alpha=projection.lora.scaling).to(b.dtype)

    def _backward_low(self, grads: Sequence[Tensor]) -> Tensor | None:
        total = sum(self._ranks())
        if not total:
            return None
        d_low = grads[0].new_empty(grads[0].shape[0], total)
        for projection, grad, part in zip(self.projections, grads, self._split(d_low), strict=True):
            if projection.lora and part is not None:
                b = projection.lora.b.to(grad.dtype)
                part.copy_(grad @ b).mul_(projection.lora.scaling)
        return d_low

    def _stacked_a(self, dtype: torch.dtype) -> Tensor | None:
        """All A, one on the other [r, in]."""
        parts: list[Tensor] = [projection.lora.a for projection in self.projections if projection.lora]
        return torch.cat(parts).to(dtype) if parts else None

    def _ranks(self) -> list[int]:
        return [projection.lora.rank if projection.lora else 0 for projection in self.projections]

    def _split(self, low: Tensor | None) -> Sequence[Tensor | None]:
        return [None] * len(self.projections) if low is None else low.split(self._ranks(), dim=1)

    def _split_rows(self, stacked: Tensor) -> Sequence[Tensor]:
        return torch.split(stacked, self._ranks(), dim=0)


def _as(bias: Tensor | None, x: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(x.dtype)
