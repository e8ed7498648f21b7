"""Weights in 4 bits, and linear layers over them: the device of the tensors chooses the form.

Quantizing and dequantizing are bitsandbytes' own operators, so that every value is its value; what they mean is said
in `kernels.reference.four_bit`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from server.base.weights import NESTED_BLOCK_SIZE
from server.kernels.linear import Linear, PackedLinear, pack_linear
from server.kernels.reference import four_bit as reference

# Weights that are quantized or laid out at once on a CPU: the operators there take up to 16 bytes for each.
PIECE = 1 << 22


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
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())

    def tensors(self) -> tuple[Tensor, ...]:
        """All that it consists of."""
        nested = self.nested
        return (self.packed, self.absmax) if nested is None else (self.packed, *self.scale_tensors())

    def scale_tensors(self) -> tuple[Tensor, ...]:
        """What the scales consist of."""
        nested = self.nested
        return (self.absmax,) if nested is None else (self.absmax, nested.absmax, nested.table, nested.offset)

    def scales(self) -> Tensor:
        """Each block's absmax, float32 [blocks]; double quantization undone."""
        if self.nested is None:
            return self.absmax
        import bitsandbytes  # noqa: F401  (registers the operators)

        scales: Tensor = torch.ops.bitsandbytes.dequantize_blockwise(
            self.absmax, self.nested.absmax, self.nested.table, NESTED_BLOCK_SIZE, torch.float32
        )
        return scales + self.nested.offset

    def emptied(self) -> "QuantizedWeight":
        """Its shape and format, with nothing in it."""
        none = self.packed.new_empty(0)
        nested = None if self.nested is None else NestedScales(none, none, none)
        return replace(self, packed=none, absmax=none, nested=nested)

    def copy_(self, other: "QuantizedWeight") -> None:
        """Become a weight of the same shape and format, in place."""
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine.copy_(theirs)


def quantize(weight: Tensor, quant_type: str, block_size: int, double: bool) -> QuantizedWeight:
    """weight [out, in] in 16 or 32 bits → 4 bits; `double` quantizes the absmax too. As bitsandbytes does, bit for bit;
    `out · in` must be even."""
    from bitsandbytes.functional import quantize_blockwise

    assert weight.numel() % 2 == 0, f"{tuple(weight.shape)}: an odd number of weights"
    flat = weight.contiguous().view(-1)
    done = [
        torch.ops.bitsandbytes.quantize_4bit(piece, block_size, quant_type, torch.uint8)
        for piece in (flat.split(PIECE) if flat.device.type == "cpu" else (flat,))
    ]
    packed, absmax = (torch.cat([part.flatten() for part in parts]) for parts in zip(*done, strict=True))
    nested = None
    if double:
        offset = absmax.mean()
        absmax, state = quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK_SIZE)
        nested = NestedScales(state.absmax, state.code, offset)
    shape = (weight.shape[0], weight.shape[1])
    return QuantizedWeight(packed, absmax, nested, quant_type, block_size, shape, weight.dtype)


def quantize_like(weight: Tensor, likes: Sequence[QuantizedWeight]) -> list[QuantizedWeight]:
    """weight [sum(out_i), in] quantized as `likes` are: split like them, each in its format."""
    parts = weight.split([like.shape[0] for like in likes])
    return [
        replace(quantize(part, like.quant_type, like.block_size, like.nested is not None), dtype=like.dtype)
        for part, like in zip(parts, likes, strict=True)
    ]


def dequantize(weight: QuantizedWeight) -> Tensor:
    """[out, in] in the weight's dtype, on its device. Bit for bit what bitsandbytes' CUDA kernel makes of it.

    Its CPU kernel takes the blocks of each row apart and so misreads weights whose blocks run on from row to row, and
    it is not exact for large blocks; those go through the reference.
    """
    import bitsandbytes  # noqa: F401  (registers the operators)

    scales = weight.scales()
    size, shape = weight.block_size, weight.shape
    if weight.packed.device.type == "cpu" and (shape[1] % size or size >= 2048):
        return reference.dequantize(weight.packed, scales, weight.quant_type, size, shape, weight.dtype)
    dense: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
        weight.packed.view(-1, 1), scales, size, weight.quant_type, shape, weight.dtype
    )
    return dense


@dataclass(frozen=True, slots=True)
class FourBitLinear:
    """y = x Wᵀ + bias for W of several weights, one on the other, each quantized on its own (q, k, v; gate, up):
    dequantized at every call."""

    weights: tuple[QuantizedWeight, ...]
    bias: Tensor | None
    out_features: int

    def __call__(self, x: Tensor) -> Tensor:
        """x [n, in] → [n, out], accumulated in float32."""
        parts = [F.linear(x, dequantize(weight)) for weight in self.weights]
        out = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        return out if self.bias is None else out.add_(self.bias)

    def dense(self) -> Tensor:
        """The weights dequantized, [out, in]."""
        return torch.cat([dequantize(weight) for weight in self.weights])

    def write(self, weight: Tensor) -> None:
        """Hold another weight [out, in] from now on, quantized as this one is; in place."""
        for mine, new in zip(self.weights, quantize_like(weight, self.weights), strict=True):
            mine.copy_(new)

    def save(self) -> tuple[Tensor, ...]:
        """All bits of the weights, in host memory."""
        return tuple(tensor.to("cpu", copy=True) for weight in self.weights for tensor in weight.tensors())

    def restore(self, saved: tuple[Tensor, ...]) -> None:
        """Hold what `save` gave, in place."""
        mine = [tensor for weight in self.weights for tensor in weight.tensors()]
        for tensor, original in zip(mine, saved, strict=True):
            tensor.copy_(original)

    @property
    def num_bytes(self) -> int:
        bias = 0 if self.bias is None else self.bias.numel() * self.bias.element_size()
        return sum(weight.num_bytes for weight in self.weights) + bias


@dataclass(frozen=True, slots=True)
class DecodedLinear:
    """y = x Wᵀ + bias for W of several weights, one on the other, that were dequantized once and for all. `formats` are
    these weights without what they hold."""

    linear: PackedLinear
    formats: tuple[QuantizedWeight, ...]

    def __call__(self, x: Tensor) -> Tensor:
        """x [n, in] → [n, out], accumulated in float32."""
        return self.linear(x)

    @property
    def out_features(self) -> int:
        return self.linear.out_features

    @property
    def num_bytes(self) -> int:
        return self.linear.num_bytes

    def dense(self) -> Tensor:
        """The weights dequantized, [out, in]."""
        return self.linear.dense()

    def write(self, weight: Tensor) -> None:
        """Hold another weight [out, in] from now on, quantized as this one is; in place."""
        self.linear.write(torch.cat([dequantize(new) for new in quantize_like(weight, self.formats)]))

    def save(self) -> tuple[Tensor, ...]:
        """All bits of the weights, in host memory."""
        return self.linear.save()

    def restore(self, saved: tuple[Tensor, ...]) -> None:
        """Hold what `save` gave, in place."""
        self.linear.restore(saved)


def decode(weights: Sequence[QuantizedWeight], bias: Tensor | None) -> DecodedLinear:
    """Dequantize weights [out_i, in] of one fused layer."""
    dense = torch.cat([dequantize(weight) for weight in weights])
    return DecodedLinear(pack_linear(dense, bias), tuple(weight.emptied() for weight in weights))


def decodes_quickly() -> bool:
    """Whether this CPU decodes 4 bits at a few times the speed of a product: bitsandbytes' operators do with AVX-512.
    Without it, decoding one weight after the other makes a step of one row 7.6 times as long."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def pack_four_bit(weights: Sequence[QuantizedWeight], bias: Tensor | None = None) -> Linear:
    """Prepare weights [out_i, in] of one fused layer (and its bias [sum(out_i)]) for the device they are on."""
    from server.kernels import four_bit_cpu

    if four_bit_cpu.supports(weights):
        return four_bit_cpu.pack(weights, bias)
    if weights[0].packed.is_cuda:
        from server.kernels.cuda import linear as cuda

        if cuda.supports(weights):
            return cuda.pack(weights, bias)
    elif not decodes_quickly():
        return decode(weights, bias)
    return FourBitLinear(tuple(weights), bias, sum(weight.shape[0] for weight in weights))
