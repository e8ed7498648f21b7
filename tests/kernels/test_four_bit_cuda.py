"""4-bit products in CUDA C++: the repacking, by a model of the matrix instruction."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from server.kernels.cuda.four_bit import COUNTERS, GROUP, code_pairs, repack, rows_macros
from server.kernels.cuda.linear import RepackedFourBit
from server.kernels.cuda.module import compile_source
from server.kernels.cuda.plans import MULTIPROCESSORS, RowsPlan, WarpgroupPlan, choose
from server.kernels.four_bit import QuantizedWeight, dequantize, pack_four_bit, quantize
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


MEASURED = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]


@given(
    st.integers(1, 2000),
    st.sampled_from(MEASURED)
    | st.tuples(st.integers(1, 8192).map(lambda n: 16 * n), st.integers(1, 128).map(lambda n: 256 * n)),
)
def test_plans_fit_the_kernels(rows, shape):
    out, features = shape
    plan = choose(rows, out, features)
    if plan is None:
        assert rows > 256
        return
    assert plan.early
    if isinstance(plan, RowsPlan):
        height, width = plan.row_tiles * 8, plan.warps * plan.feature_tiles * 16
        assert height % plan.warps == 0
        assert 1 <= plan.splits <= features // GROUP
        assert plan.splits == 1 or -(-rows // height) * -(-out // width) <= COUNTERS
    else:
        assert plan.chunk in (64, 128)
        assert plan.columns in (2, 4)
        assert plan.splits in (1, 2, 4, 8)
        assert plan.splits * plan.columns * 64 <= features
        assert plan.resident * (plan.shared_bytes + 1024) <= 228 * 1024, "so much has a multiprocessor; CUDA takes 1024"
        if plan.shared_out:
            shares = -(-out // plan.width) * -(-rows // plan.rows) * (features // 64 // plan.columns)
            assert shares >= plan.resident * MULTIPROCESSORS, "a block without a share would be waited for in vain"
            assert plan.splits == 1


@pytest.mark.parametrize("shape", [*MEASURED, (3072, 1024)])
def test_few_rows_are_one_kernels_and_many_the_others(shape):
    assert all(isinstance(choose(rows, *shape), RowsPlan) for rows in range(1, 17))
    assert all(isinstance(choose(rows, *shape), WarpgroupPlan) for rows in range(33, 257))
    assert not any(choose(rows, *shape) for rows in (0, 385, 512, 4096))


CHOSEN = {choose(rows, *shape) for shape in (*MEASURED, (3072, 1024)) for rows in range(1, 33)}
ROWS_PLANS = sorted((plan for plan in CHOSEN if isinstance(plan, RowsPlan)), key=str)


@pytest.mark.parametrize(
    ("plan", "dtype"), [*((plan, torch.bfloat16) for plan in ROWS_PLANS), (ROWS_PLANS[0], torch.float16)], ids=str
)
def test_the_source_compiles(plan: RowsPlan, dtype: torch.dtype) -> None:
    assert compile_source("four_bit_rows.cu", rows_macros(plan, dtype), "sm_90a")


@pytest.mark.parametrize("is_bfloat16", [0, 1])
def test_the_source_of_dequantizing_compiles(is_bfloat16: int) -> None:
    assert compile_source("four_bit_dense.cu", {"BF16": is_bfloat16}, "sm_90a")


LAYERS = {"qkv": ((4096, 1024, 1024), 4096), "odd": ((48, 16, 16), 512), "down": ((4096,), 14336)}


def weights_of(name: str, quant_type: str, dtype: torch.dtype, double: bool) -> list[QuantizedWeight]:
    outs, features = LAYERS[name]
    torch.manual_seed(0)
    return [
        quantize((torch.randn(out, features, device="cuda") * 0.02).to(dtype), quant_type, 64, double) for out in outs
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("quant_type", "double"), [("nf4", True), ("nf4", False), ("fp4", True)])
@pytest.mark.parametrize("name", LAYERS)
def test_products_on_a_gpu_err_no_more_than_16_bit_ones(
    name: str, quant_type: str, double: bool, dtype: torch.dtype
) -> None:
    weights = weights_of(name, quant_type, dtype, double)
    bias = torch.randn(sum(weight.shape[0] for weight in weights), device="cuda").to(dtype)
    layer = pack_four_bit(weights, bias)
    assert isinstance(layer, RepackedFourBit)
    dense = torch.cat([dequantize(weight) for weight in weights])
    assert torch.equal(layer.dense(), dense)
    unrounded = torch.cat([dequantize(replace(weight, dtype=torch.float32)) for weight in weights]).double()
    for rows in (1, 7, 16, 33, 64, 65, 200, 256, 400):
        x = torch.randn(rows, dense.shape[1], device="cuda").to(dtype)
        expected = x.double() @ unrounded.t()
        plain = (torch.nn.functional.linear(x, dense) + bias).double() - bias.double()
        error = (layer(x).double() - bias.double() - expected).norm()
        assert error <= 1.05 * (plain - expected).norm(), rows
        assert torch.equal(layer(x), layer(x))


@pytest.mark.gpu
def test_a_captured_layer_follows_its_weight() -> None:
    layer = pack_four_bit(weights_of("qkv", "nf4", torch.bfloat16, True))
    x = torch.randn(16, 4096, device="cuda").bfloat16()
    original, saved = layer(x), layer.save()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer(layer(x)[:, :4096].contiguous())
    graph.replay()
    before = captured.clone()
    other = torch.randn(layer.out_features, 4096, device="cuda") * 0.02
    layer.write(other)
    assert (layer.dense().float() - other).norm() < 0.2 * other.norm()
    graph.replay()
    assert not torch.equal(captured, before)
    layer.restore(saved)
    graph.replay()
    assert torch.equal(captured, before)
    assert torch.equal(layer(x), original)


@pytest.mark.gpu
def test_only_the_repacked_weight_stays() -> None:
    layer = pack_four_bit(weights_of("down", "nf4", torch.bfloat16, True))
    assert layer.num_bytes <= 4096 * 14336 * (4 + 32 / 64) / 8 + 4 * COUNTERS
