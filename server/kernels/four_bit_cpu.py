"""The 4-bit product of bitsandbytes for CPUs with AVX512-BF16: bfloat16, float32 accumulation, nothing dequantized in
memory. It rounds each absmax to bfloat16, which costs what rounding each dequantized weight does."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from server.base.weights import CPU_ROW_GROUP, fits_cpu_operator
from server.kernels.four_bit import PIECE, QuantizedWeight, dequantize, quantize_like
from server.kernels.reference.four_bit import code_table


def supports(weights: Sequence[QuantizedWeight]) -> bool:
    """Whether the operator is here and takes these weights as one."""
    first = weights[0]
    if first.packed.device.type != "cpu" or first.dtype is not torch.bfloat16:
        return False
    fits = fits_cpu_operator([weight.shape for weight in weights], first.block_size)
    if not fits or any(weight.quant_type != first.quant_type for weight in weights):
        return False
    return bool(_bitsandbytes().has_avx512bf16()) and all(w.block_size == first.block_size for w in weights)


@dataclass(frozen=True, slots=True)
class PackedFourBit:
    """y = x Wᵀ + bias in bfloat16. `bare` are the weights that W consists of, without their codes."""

    codes: Tensor  # uint8 [out, in / 2], in the operator's layout
    scales: Tensor  # bfloat16 [in / block, out]
    table: Tensor  # float32 [16]
    bare: tuple[QuantizedWeight, ...]
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """x [n, in] → [n, out], accumulated in float32."""
        if len(x) == 0:  # the operator divides by the rows
            return x.new_empty(0, self.out_features)
        shape = (self.out_features, x.shape[1])
        block_size = self.bare[0].block_size
        out: Tensor = torch.ops.bitsandbytes.gemv_4bit(x, self.codes, shape, self.scales, self.table, block_size)
        return out if self.bias is None else out.add_(self.bias)

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    def weights(self) -> list[QuantizedWeight]:
        """The weights in bitsandbytes' own order."""
        flat = torch.cat([_unpack(rows) for rows in self.codes.split(_rows_of_a_piece(2 * self.codes.shape[1]))])
        packed = flat.split([bare.shape[0] * bare.shape[1] // 2 for bare in self.bare])
        return [replace(bare, packed=codes) for bare, codes in zip(self.bare, packed, strict=True)]

    def dense(self) -> Tensor:
        """The weights dequantized, [out, in]."""
        return torch.cat([dequantize(weight) for weight in self.weights()])

    def write(self, weight: Tensor) -> None:
        """Hold another weight [out, in] from now on, quantized as this one is; in place."""
        new = pack(quantize_like(weight, self.bare), None)
        for mine, theirs in zip(self._tensors(), new._tensors(), strict=True):
            mine.copy_(theirs)

    def save(self) -> tuple[Tensor, ...]:
        """All bits of the weights."""
        return tuple(tensor.clone() for tensor in self._tensors())

    def restore(self, saved: tuple[Tensor, ...]) -> None:
        """Hold what `save` gave, in place."""
        for mine, original in zip(self._tensors(), saved, strict=True):
            mine.copy_(original)

    @property
    def num_bytes(self) -> int:
        tensors = (*self._tensors(), self.table, *(() if self.bias is None else (self.bias,)))
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _tensors(self) -> tuple[Tensor, ...]:
        return (self.codes, self.scales, *(tensor for bare in self.bare for tensor in bare.scale_tensors()))


def pack(weights: Sequence[QuantizedWeight], bias: Tensor | None) -> PackedFourBit:
    """Lay out weights [out_i, in] that `supports` takes, and bias [sum(out_i)]."""
    first = weights[0]
    features, size = first.shape[1], first.block_size
    rows = _rows_of_a_piece(features)
    codes, scales = [], []
    for weight in weights:
        absmax = weight.scales().view(-1, features // size)
        for piece, piece_absmax in zip(
            weight.packed.view(-1, features // 2).split(rows), absmax.split(rows), strict=True
        ):
            done, state = _bitsandbytes()._convert_weight_packed_for_cpu(
                piece.flatten(), _state(weight, piece_absmax.flatten(), piece.shape[0])
            )
            codes.append(done)
            scales.append(state.absmax)
    table = code_table(first.quant_type, first.packed.device)
    bare = tuple(replace(weight, packed=weight.packed.new_empty(0)) for weight in weights)
    return PackedFourBit(torch.cat(codes), torch.cat(scales, dim=1), table, bare, bias)


def _unpack(codes: Tensor) -> Tensor:
    """Some rows of the operator's layout in bitsandbytes' own order, flat."""
    state = _bitsandbytes().QuantState(absmax=None)
    state.packing_format_for_cpu = True
    state.original_nested, state.original_dtype, state.original_qshape = False, None, torch.Size((codes.numel(),))
    flat: Tensor = _bitsandbytes()._convert_weight_packed_for_cpu_inverse(codes, state)[0]
    return flat


def _state(weight: QuantizedWeight, absmax: Tensor, rows: int) -> Any:
    return _bitsandbytes().QuantState(
        absmax=absmax,
        shape=torch.Size((rows, weight.shape[1])),
        blocksize=weight.block_size,
        quant_type=weight.quant_type,
        dtype=weight.dtype,
    )


def _rows_of_a_piece(features: int) -> int:
    return max(PIECE // features // CPU_ROW_GROUP, 1) * CPU_ROW_GROUP


def _bitsandbytes() -> Any:
    import bitsandbytes.functional

    return bitsandbytes.functional
