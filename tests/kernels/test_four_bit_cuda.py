"""4-bit products in CUDA C++: the repacking, by a model of the matrix instruction."""

import pytest
import torch
from torch import Tensor

from server.kernels.cuda.four_bit import code_pairs, repack
from server.kernels.reference.four_bit import CODES, code_table

OUT, IN = 48, 512
G, T = torch.arange(32) // 4, torch.arange(32) % 4  # of each lane


def random_weight(seed: int, out: int = OUT, features: int = IN) -> tuple[Tensor, Tensor]:
    """Packed codes and absmax."""
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (out * features // 2,), generator=generator, dtype=torch.uint8)
    return packed, torch.rand(out * features // 64, generator=generator) + 0.1


def exact(packed: Tensor, absmax: Tensor, quant_type: str, shape: tuple[int, int]) -> Tensor:
    """[out, in] in float64."""
    nibbles = torch.stack([packed >> 4, packed & 15], dim=-1).flatten().int()
    return (code_table(quant_type, packed.device).double()[nibbles] * absmax.double().repeat_interleave(64)).view(shape)


def matrix_instruction(a: Tensor, b: Tensor) -> Tensor:
    """mma.m16n8k16 by the PTX manual's tables: a [.., 32 lanes, 4 registers, 2], b [.., 32, 2, 2] → c [.., 32, 4]."""
    left = torch.zeros(*a.shape[:-3], 16, 16, dtype=torch.float64)
    right = torch.zeros(*b.shape[:-3], 16, 8, dtype=torch.float64)
    for half in range(2):
        for register in range(4):
            left[..., G + 8 * (register % 2), 2 * T + half + 8 * (register // 2)] = a[..., register, half]
        for register in range(2):
            right[..., 2 * T + half + 8 * register, G] = b[..., register, half]
    c = left @ right
    return torch.stack([c[..., G + 8 * (i // 2), 2 * T + i % 2] for i in range(4)], dim=-1)


def value_of(pairs: Tensor, codes: Tensor, dtype: torch.dtype) -> Tensor:
    """The two numbers that the table has for each byte."""
    entry = pairs[codes.int()]
    return torch.stack([entry & 0xFFFF, entry >> 16], -1).to(torch.int16).view(dtype).double()


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_lanes_of_the_repacked_weight_make_the_product(quant_type):
    packed, absmax = random_weight(0)
    x = torch.randn(8, IN, generator=torch.Generator().manual_seed(1)).bfloat16()
    weight = repack(packed, absmax, quant_type, (OUT, IN))
    pairs, scale = code_pairs(quant_type, torch.bfloat16)
    acc = torch.zeros(OUT // 16, 32, 4, dtype=torch.float64)
    for column in range(IN // 64):
        decoded = value_of(pairs, weight.codes[:, column], torch.bfloat16)  # tile, lane, byte, 2
        of_row = x[:, column * 64 : column * 64 + 64].double().view(8, 8, 4, 2)  # ldmatrix: row, matrix, t, 2
        words = torch.stack([of_row[g, :, t] for g, t in zip(G, T, strict=True)])  # lane, 8 registers, 2
        c = 0
        for step in range(4):
            a = torch.stack([decoded[:, :, (i % 2) * 8 + 2 * step + i // 2] for i in range(4)], dim=2)
            c = c + matrix_instruction(a, words[:, 2 * step : 2 * step + 2].expand(OUT // 16, -1, -1, -1))
        by = weight.absmax[:, column // 4, :, column % 4].double()  # tile, 16 features
        acc += torch.stack([by[:, G + 8 * (i // 2)] for i in range(4)], dim=-1) * c
    y = torch.zeros(8, OUT, dtype=torch.float64)
    for i in range(4):
        for tile in range(OUT // 16):
            y[2 * T + i % 2, tile * 16 + G + 8 * (i // 2)] = acc[tile, :, i] * scale
    expected = x.double() @ exact(packed, absmax, quant_type, (OUT, IN)).T
    error = (y - expected).norm() / expected.norm()
    assert error < {"nf4": 1e-3, "fp4": 1e-6}[quant_type], "only the codes' rounding may be seen"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_rounded_codes_err_less_than_rounded_weights(quant_type, dtype):
    pairs, scale = code_pairs(quant_type, dtype)
    packed, absmax = random_weight(2)
    weight = exact(packed, absmax, quant_type, (OUT, IN))
    codes = (value_of(pairs, packed, dtype) * scale).flatten() * absmax.double().repeat_interleave(64)
    error = (codes.view(OUT, IN) - weight).norm()
    assert error < 0.6 * (weight.to(dtype).double() - weight).norm()
    assert len(CODES[quant_type]) == 16
