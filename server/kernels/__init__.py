"""The numeric operations of the forward pass: what each computes, on which shapes and dtypes.

Every operation is defined by its plain torch form in `kernels.reference`, which runs on any device. Where a
faster form exists for a device, the device of the tensors chooses it; a failing kernel is never papered over.

Shapes use n = tokens of the batch, h = hidden size, d = head size.
"""

from server.kernels.four_bit import QuantizedWeight, dequantize, pack_four_bit, quantize
from server.kernels.layer import add_rms_norm, rms_norm, rope_and_store, silu_mul
from server.kernels.linear import Linear, PackedLinear, linear_silu_mul, pack_linear, side_by_side
from server.kernels.memory import Scratch, reserve
from server.kernels.reference.attention import head_rows, paged_decode_attention, prefill_attention
from server.kernels.reference.layer import rope_table
from server.kernels.reference.lora import lora_segment

__all__ = [
    "Linear",
    "PackedLinear",
    "QuantizedWeight",
    "Scratch",
    "add_rms_norm",
    "dequantize",
    "head_rows",
    "linear_silu_mul",
    "lora_segment",
    "pack_four_bit",
    "pack_linear",
    "paged_decode_attention",
    "prefill_attention",
    "quantize",
    "reserve",
    "rms_norm",
    "rope_and_store",
    "rope_table",
    "side_by_side",
    "silu_mul",
]
