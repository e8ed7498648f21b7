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

from trainer import kernels


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
            weight = kernels.dequantize(weight, state)
        return weight.to(dtype)

    @property
    def bias(self) -> Tensor | None:
        bias: Tensor | None = self.base.bias
        return bias

    @property
    def rank(self) -> int:
        """0 without LoRA."""
        return self.lora.rank if self.lora else 0


@dataclass(frozen=True, slots=True)
class Copy:
    """`target` is `scale` times `source`, in the dtype that is computed in, whenever a pass begins."""

    target: Tensor
    source: nn.Parameter
    scale: float


def refresh(copies: Sequence[Copy]) -> None:
    """Bring copies up to date; in few launches, however many they are."""
    with torch.no_grad():
        for scale in {copy.scale for copy in copies}:
            targets = [copy.target for copy in copies if copy.scale == scale]
            sources: list[Tensor] = [copy.source for copy in copies if copy.scale == scale]
            torch._foreach_copy_(targets, sources if scale == 1.0 else torch._foreach_mul(sources, scale))


@dataclass(frozen=True, slots=True)
class Group:
    """Projections of one input: q, k and v; gate and up; one alone."""

    projections: tuple[Projection, ...]
    a: Tensor | None  # copies of each s · A, one on the other [r, in]
    b: tuple[Tensor | None, ...]  # copies of each B [out, rank]
    scales: Tensor | None  # [r]

    @classmethod
    def of(cls, projections: tuple[Projection, ...], dtype: torch.dtype) -> "Group":
        """With copies in `dtype`, not yet made."""
        loras = [projection.lora for projection in projections if projection.lora]
        b = tuple(None if p.lora is None else torch.empty_like(p.lora.b, dtype=dtype) for p in projections)
        if not loras:
            return cls(projections, None, b, None)
        first = loras[0].a
        a = first.new_empty(sum(lora.rank for lora in loras), first.shape[1], dtype=dtype)
        scales = [lora.scaling for lora in loras for _ in range(lora.rank)]
        return cls(projections, a, tuple(b), torch.tensor(scales, dtype=dtype, device=first.device))

    def copies(self) -> Iterator[Copy]:
        """What has to be brought up to date before a pass."""
        for projection, a, b in zip(self.projections, self._rows(self.a), self.b, strict=True):
            if projection.lora and a is not None and b is not None:
                yield Copy(a, projection.lora.a, projection.lora.scaling)
                yield Copy(b, projection.lora.b, 1.0)

    def parameters(self) -> Iterator[nn.Parameter]:
        """A and B of each projection that has them, in that order."""
        for projection in self.projections:
            if projection.lora:
                yield projection.lora.a
                yield projection.lora.b

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[list[Tensor], Tensor | None]:
        """x [n, in] → each projection's y [n, out], on top of `residual` if given; and s · x Aᵀ [n, r]."""
        low = None if self.a is None else x @ self.a.t()
        outputs = []
        for projection, b, part in zip(self.projections, self.b, self._columns(low), strict=True):
            weight = projection.weight(x.dtype)
            if residual is None:
                y = F.linear(x, weight, _as(projection.bias, x))
            else:
                y = torch.addmm(residual, x, weight.t())
                if projection.bias is not None:
                    y += projection.bias
            del weight
            if b is not None and part is not None:
                y.addmm_(part, b.t())
            outputs.append(y)
        return outputs, low

    def backward(self, grads: Sequence[Tensor], *, needs_input: bool = True) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of the input [n, in] and of what `forward` gave beside y [n, r], given those of each y."""
        d_low = None
        if self.a is not None:
            d_low = grads[0].new_empty(grads[0].shape[0], self.a.shape[0])
            for b, grad, part in zip(self.b, grads, self._columns(d_low), strict=True):
                if b is not None and part is not None:
                    torch.mm(grad, b, out=part)
        if not needs_input:
            return None, d_low
        d_input: Tensor | None = None
        for projection, grad in zip(self.projections, grads, strict=True):
            weight = projection.weight(grad.dtype)
            d_input = grad @ weight if d_input is None else d_input.addmm_(grad, weight)
            del weight
        if d_input is not None and d_low is not None and self.a is not None:
            d_input.addmm_(d_low, self.a)
        return d_input, d_low

    def lora_gradients(
        self, x: Tensor, low: Tensor | None, d_low: Tensor | None, grads: Sequence[Tensor]
    ) -> Iterator[Tensor]:
        """The gradients of `parameters`, from what `forward` took and gave and `backward` took and gave."""
        if low is None or d_low is None or self.scales is None:
            return
        d_stacked = (d_low * self.scales).t() @ x  # [r, in]
        parts = zip(self.projections, self._columns(low), self._rows(d_stacked), grads, strict=True)
        for projection, part, d_a, grad in parts:
            if projection.lora and part is not None and d_a is not None:
                yield d_a.to(projection.lora.a.dtype)
                yield (grad.t() @ part).to(projection.lora.b.dtype)

    def _columns(self, low: Tensor | None) -> Sequence[Tensor | None]:
        return self._split(low, 1)

    def _rows(self, stacked: Tensor | None) -> Sequence[Tensor | None]:
        return self._split(stacked, 0)

    def _split(self, tensor: Tensor | None, dim: int) -> Sequence[Tensor | None]:
        if tensor is None:
            return [None] * len(self.projections)
        return torch.split(tensor, [projection.rank for projection in self.projections], dim=dim)


def _as(bias: Tensor | None, x: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(x.dtype)
