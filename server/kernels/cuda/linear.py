"""A linear layer over repacked 4-bit weights on a Hopper GPU."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from server.base.weights import fits_hopper
from server.kernels.cuda.four_bit import RepackedWeight, four_bit_dense, multiply, repack
from server.kernels.cuda.module import is_available
from server.kernels.cuda.plans import choose
from server.kernels.four_bit import QuantizedWeight, quantize_like


def supports(weights: Sequence[QuantizedWeight]) -> bool:
    """Whether the kernels run here and take these weights as one."""
    first = weights[0]
    if not first.packed.is_cuda or first.dtype not in (torch.bfloat16, torch.float16):
        return False
    if any((w.quant_type, w.block_size, w.dtype) != (first.quant_type, first.block_size, first.dtype) for w in weights):
        return False
    fits = fits_hopper(sum(weight.shape[0] for weight in weights), first.shape[1], first.block_size)
    return fits and is_available(first.packed.device)


@dataclass(frozen=True, slots=True)
class RepackedFourBit:
    """y = x Wᵀ + bias. `formats` are the weights, one on the other, that W consists of, without what they hold. The
    scales are held as double quantization undone, so that no kernel has to."""

    weight: RepackedWeight
    formats: tuple[QuantizedWeight, ...]
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """x [n, in] → [n, out], accumulated in float32."""
        weight = self.weight
        plan = choose(x.shape[0], weight.out_features, weight.in_features)
        if plan is None:
            return F.linear(x, four_bit_dense(weight, x.dtype), self.bias)
        out = multiply(x, weight, plan)
        return out if self.bias is None else out.add_(self.bias)

    @property
    def out_features(self) -> int:
        return self.weight.out_features

    @property
    def num_bytes(self) -> int:
        tensors = (*self._held(), self.weight.arrivals, *(() if self.bias is None else (self.bias,)))
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def dense(self) -> Tensor:
        """The weights dequantized, [out, in]."""
        return four_bit_dense(self.weight, self.formats[0].dtype)

    def write(self, weight: Tensor) -> None:
        """Hold another weight [out, in] from now on, quantized as this one is; in place."""
        new = _repack(quantize_like(weight, self.formats))
        self._become((new.codes, new.absmax))

    def save(self) -> tuple[Tensor, ...]:
        """All bits of the weights, in host memory."""
        return tuple(tensor.to("cpu", copy=True) for tensor in self._held())

    def restore(self, saved: tuple[Tensor, ...]) -> None:
        """Hold what `save` gave, in place."""
        self._become(saved)

    def _held(self) -> tuple[Tensor, Tensor]:
        return self.weight.codes, self.weight.absmax

    def _become(self, tensors: Sequence[Tensor]) -> None:
        for mine, other in zip(self._held(), tensors, strict=True):
            mine.copy_(other)
        # A product that is launched early reads weights while what precedes it may still run.
        torch.cuda.current_stream(self.weight.codes.device).synchronize()


def pack(weights: Sequence[QuantizedWeight], bias: Tensor | None) -> RepackedFourBit:
    """Lay out weights [out_i, in] that `supports` takes, and bias [sum(out_i)]."""
    return RepackedFourBit(_repack(weights), tuple(weight.emptied() for weight in weights), bias)


def _repack(weights: Sequence[QuantizedWeight]) -> RepackedWeight:
    packed = torch.cat([weight.packed for weight in weights])
    scales = torch.cat([weight.scales() for weight in weights])
    first = weights[0]
    return repack(packed, scales, first.quant_type, (sum(weight.shape[0] for weight in weights), first.shape[1]))
