"""Weights in 4 bits, and linear layers over them: the device of the tensors chooses the form.

Quantizing and dequantizing are bitsandbytes' own operators, so that every value is its value; what they mean is said
in `kernels.reference.four_bit`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

QUANT_TYPES = ("nf4", "fp4")
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK_SIZE = 256


@dataclass(frozen=True, slots=True)
class NestedScales:
    """Double quantization's state: block b's absmax is table[codes[b]] · absmax[b // 256] + offset."""

    absmax: Tensor  # float32 [blocks / 256], rounded up
    table: Tensor  # float32 [256]
    offset: Tensor  # float32 []


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight [out, in] in 4 bits, in bitsandbytes' own order: codes of the flat weight, two a byte, the first in the
    high nibble; `block_size` of them share one absmax. `absmax` is float32 [blocks], or with `nested` uint8 codes.
    `dtype` is what it dequantizes to."""

    packed: Tensor  # uint8 [out · in / 2]
    absmax: Tensor
    nested: NestedScales | None
    quant_type: str  # "nf4" or "fp4"
    block_size: int
    shape: tuple[int, int]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        tensors = [self.packed, self.absmax]
        if self.nested is not None:
            tensors += [self.nested.absmax, self.nested.table, self.nested.offset]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def scales(self) -> Tensor:
        """Each block's absmax, float32 [blocks]; double quantization undone."""
        if self.nested is None:
            return self.absmax
        import bitsandbytes  # noqa: F401  (registers the operators)

        scales: Tensor = torch.ops.bitsandbytes.dequantize_blockwise(
            self.absmax, self.nested.absmax, self.nested.table, NESTED_BLOCK_SIZE, torch.float32
        )
        return scales + self.nested.offset

    def to(self, device: torch.device) -> "QuantizedWeight":
        """The same on a device."""
        nested = self.nested
        if nested is not None:
            nested = NestedScales(nested.absmax.to(device), nested.table.to(device), nested.offset.to(device))
        return replace(self, packed=self.packed.to(device), absmax=self.absmax.to(device), nested=nested)


def quantize(weight: Tensor, quant_type: str, block_size: int, double: bool) -> QuantizedWeight:
    """weight [out, in] in 16 or 32 bits → 4 bits; `double` quantizes the absmax too. As bitsandbytes does, bit for bit;
    `out · in` must be even."""
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(
        weight.contiguous(), blocksize=block_size, compress_statistics=double, quant_type=quant_type
    )
    nested = None
    if state.nested:
        assert state.state2.blocksize == NESTED_BLOCK_SIZE, f"nested blocks of {state.state2.blocksize}"
        nested = NestedScales(state.state2.absmax, state.state2.code, state.offset)
    shape = (weight.shape[0], weight.shape[1])
    return QuantizedWeight(packed.flatten(), state.absmax, nested, quant_type, block_size, shape, weight.dtype)


def dequantize(weight: QuantizedWeight) -> Tensor:
    """[out, in] in the weight's dtype, on its device. Bit for bit what bitsandbytes makes of it."""
    return _dequantize(weight, weight.scales())


def _dequantize(weight: QuantizedWeight, scales: Tensor) -> Tensor:
    import bitsandbytes  # noqa: F401  (registers the operators)

    dense: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
        weight.packed.view(-1, 1), scales, weight.block_size, weight.quant_type, weight.shape, weight.dtype
    )
    return dense


@dataclass(frozen=True, slots=True)
class FourBitLinear:
    """y = x Wᵀ + bias for W of several weights, one on the other, each quantized on its own (q, k, v; gate, up)."""

    weights: tuple[QuantizedWeight, ...]
    bias: Tensor | None
    out_features: int

    def __call__(self, x: Tensor) -> Tensor:
        """x [n, in] → [n, out], accumulated in float32."""
        out = torch.cat([F.linear(x, dequantize(weight)) for weight in self.weights], dim=1)
        return out if self.bias is None else out + self.bias

    @property
    def num_bytes(self) -> int:
        bias = 0 if self.bias is None else self.bias.numel() * self.bias.element_size()
        return sum(weight.num_bytes for weight in self.weights) + bias


def pack_four_bit(weights: Sequence[QuantizedWeight], bias: Tensor | None = None) -> FourBitLinear:
    """Prepare weights [out_i, in] of one fused layer (and its bias [sum(out_i)]) for the device they are on."""
    return FourBitLinear(tuple(weights), bias, sum(weight.shape[0] for weight in weights))
