"""4-bit blockwise weights in plain torch: what the codes mean.

NF4: Dettmers et al., 2023 (QLoRA, arXiv 2305.14314), appendix E. FP4 is bitsandbytes' float of one sign, two exponent
and one mantissa bit. The layout is bitsandbytes' own: the weight is one flat row of codes, two a byte, the first in
the high nibble; every `block_size` of them share one absmax.
"""

import torch
from torch import Tensor

CODES = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    # the nibble's order, in twelfths
    "fp4": tuple(sign * value / 12 for sign in (1, -1) for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)),
}


def code_table(quant_type: str, device: torch.device) -> Tensor:
    """What each nibble stands for, float32 [16]."""
    return torch.tensor(CODES[quant_type], dtype=torch.float32, device=device)


def nested_scales(codes: Tensor, table: Tensor, absmax: Tensor, offset: Tensor, block_size: int) -> Tensor:
    """Undo double quantization: codes uint8 [blocks] of table float32 [256], absmax float32 [blocks / block_size]
    rounded up, offset float32 [] → float32 [blocks]."""
    scales = table[codes.int()] * absmax.repeat_interleave(block_size)[: codes.numel()]
    return scales + offset


def dequantize(
    packed: Tensor, scales: Tensor, quant_type: str, block_size: int, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """packed uint8 [out · in / 2], scales float32 [blocks] → [out, in]: code times scale in float32, rounded once."""
    nibbles = torch.stack([packed >> 4, packed & 15], dim=-1).flatten().int()
    values = code_table(quant_type, packed.device)[nibbles]
    return (values * scales.repeat_interleave(block_size)[: values.numel()]).to(dtype).view(shape)
