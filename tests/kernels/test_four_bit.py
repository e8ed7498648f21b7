"""4-bit weights: bitsandbytes' bits, whatever the format; products as exact as dequantizing first."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from server.kernels import four_bit, four_bit_cpu
from server.kernels.four_bit import (
    PIECE,
    DecodedLinear,
    FourBitLinear,
    QuantizedWeight,
    decode,
    dequantize,
    pack_four_bit,
    quantize,
)
from server.kernels.linear import Linear, SideBySide, pack_linear
from server.kernels.reference import four_bit as reference

QUANT_TYPES = ("nf4", "fp4")
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True, scope="module")
def _eager() -> Iterator[None]:
    """bitsandbytes compiles some of its fallbacks for each shape; their values are the same."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def oracle(weight: Tensor, quant_type: str, block_size: int, double: bool) -> tuple[Tensor, Any]:
    packed, state = bnb.quantize_4bit(weight, blocksize=block_size, compress_statistics=double, quant_type=quant_type)
    return packed.flatten(), state


def draw(shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05
    weight[0, :4] = torch.tensor([0.0, 3.0, -3.0, 1e-9])  # outliers, as real weights have
    return weight.to(dtype)


shapes = st.tuples(st.integers(1, 40), st.integers(2, 12).map(lambda n: 16 * n))


@settings(max_examples=150, deadline=None)
@given(
    shape=shapes,
    dtype=st.sampled_from(DTYPES),
    quant_type=st.sampled_from(QUANT_TYPES),
    block_size=st.sampled_from(BLOCK_SIZES),
    double=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_every_bit_is_that_of_bitsandbytes(
    shape: tuple[int, int], dtype: torch.dtype, quant_type: str, block_size: int, double: bool, seed: int
) -> None:
    weight = draw(shape, dtype, seed)
    ours = quantize(weight, quant_type, block_size, double)
    packed, state = oracle(weight, quant_type, block_size, double)
    assert torch.equal(ours.packed, packed)
    assert torch.equal(ours.absmax, state.absmax)
    if ours.nested is not None:
        assert torch.equal(ours.nested.absmax, state.state2.absmax)
        assert torch.equal(ours.nested.table, state.state2.code)
        assert torch.equal(ours.nested.offset, state.offset)
    dense = dequantize(ours)
    assert dense.dtype is dtype
    if shape[1] % block_size == 0 or weight.numel() <= block_size:
        assert torch.equal(dense, bnb.dequantize_4bit(packed.view(-1, 1), state))
    if weight.numel() % block_size == 0:  # as one long row, whose blocks its CPU kernel does not take apart
        theirs = torch.ops.bitsandbytes.dequantize_4bit(
            packed, ours.scales(), block_size, quant_type, (weight.numel(),), dtype
        )
        assert torch.equal(dense.flatten(), theirs.flatten())


@settings(max_examples=60, deadline=None)
@given(
    shape=shapes,
    dtype=st.sampled_from(DTYPES),
    quant_type=st.sampled_from(QUANT_TYPES),
    block_size=st.sampled_from(BLOCK_SIZES),
)
def test_the_reference_says_what_the_codes_mean(
    shape: tuple[int, int], dtype: torch.dtype, quant_type: str, block_size: int
) -> None:
    q = quantize(draw(shape, dtype), quant_type, block_size, double=True)
    assert q.nested is not None
    scales = reference.nested_scales(q.absmax, q.nested.table, q.nested.absmax, q.nested.offset, 256)
    assert torch.equal(scales, q.scales())
    assert torch.equal(reference.dequantize(q.packed, scales, quant_type, block_size, shape, dtype), dequantize(q))
    assert torch.equal(reference.code_table(quant_type, q.packed.device), bnb.get_4bit_type(quant_type, device="cpu"))


@pytest.mark.parametrize("shape", [(48, 80), (7, 130), (3, 10)])
def test_what_runs_on_from_row_to_row_is_near_the_weight(shape: tuple[int, int]) -> None:
    """Where bitsandbytes' own CPU kernel is off by whole blocks."""
    weight = draw(shape, torch.float32)
    q = quantize(weight, "nf4", 64, double=False)
    gap = 0.31  # between the two outermost codes of NF4
    bound = q.scales().repeat_interleave(64)[: weight.numel()].view(shape) * gap / 2
    assert ((dequantize(q) - weight).abs() <= bound).all()


def test_a_weight_of_several_pieces() -> None:
    weight = draw((2049, 2048), torch.bfloat16)
    assert weight.numel() > PIECE
    q = quantize(weight, "nf4", 64, double=True)
    packed, state = oracle(weight, "nf4", 64, True)
    assert torch.equal(q.packed, packed)
    assert torch.equal(q.absmax, state.absmax)
    pieced = pack_four_bit([q])
    assert torch.equal(pieced.dense(), dequantize(q))


FUSED = {"qkv": ((96, 32, 64), 128), "gate_up": ((160, 160), 64), "one": ((64,), 192), "odd rows": ((7, 33), 64)}


def products(fused: str, dtype: torch.dtype, block_size: int = 64, double: bool = True) -> list[QuantizedWeight]:
    outs, features = FUSED[fused]
    return [quantize(draw((out, features), dtype, seed), "nf4", block_size, double) for seed, out in enumerate(outs)]


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_products_are_as_exact_as_dequantizing_first(fused: str, dtype: torch.dtype, block_size: int) -> None:
    """Over seventy rows, however many of them are one product: the error of a single row's few values varies."""
    torch.manual_seed(0)
    weights = products(fused, dtype, block_size)
    bias = torch.randn(sum(weight.shape[0] for weight in weights)).to(dtype)
    layer = pack_four_bit(weights, bias)
    exact_weight = torch.cat([dequantize(replace(weight, dtype=torch.float32)) for weight in weights]).double()
    dense = torch.cat([dequantize(weight) for weight in weights])
    x = torch.randn(70, weights[0].shape[1]).to(dtype)
    exact = x.double() @ exact_weight.t() + bias.double()
    plain = (torch.nn.functional.linear(x, dense) + bias).double()
    for rows in (1, 3, 17, 70):
        found = torch.cat([layer(part) for part in x.split(rows)]).double()
        assert (found - exact).norm() <= 1.25 * (plain - exact).norm() + 1e-9 * exact.norm()
    assert layer.out_features == dense.shape[0]
    assert torch.equal(layer.dense(), dense)


def layers(dtype: torch.dtype) -> dict[str, Linear]:
    weights = products("qkv", dtype)
    plain = FourBitLinear(tuple(weights), None, 192)
    mixed = SideBySide((pack_linear(draw((64, 128), dtype)), pack_four_bit(products("qkv", dtype)[2:])))
    decoded = decode(products("qkv", dtype), None)
    return {"packed": pack_four_bit(products("qkv", dtype)), "plain": plain, "decoded": decoded, "mixed": mixed}


KINDS = pytest.mark.parametrize("kind", ["packed", "plain", "decoded", "mixed"])


@KINDS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_product_of_no_rows(kind: str, dtype: torch.dtype) -> None:
    """As the head's in a step that only reads part of a prompt."""
    layer = layers(dtype)[kind]
    assert layer(torch.empty(0, 128, dtype=dtype)).shape == (0, layer.out_features)


@KINDS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_are_written_and_restored_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    layer = layers(dtype)[kind]
    x = torch.randn(5, 128).to(dtype)
    before, saved = layer(x), layer.save()
    other = draw((layer.out_features, 128), torch.float32, seed=9)
    layer.write(other)
    changed = layer.dense().float()
    assert (changed - other).norm() < 0.2 * other.norm()
    assert not torch.equal(layer(x), before)
    layer.restore(saved)
    assert torch.equal(layer(x), before)
    assert all(torch.equal(a, b) for a, b in zip(saved, layer.save(), strict=True))


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_processor_that_decodes_slowly_computes_with_what_it_decoded_once(
    fused: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is written to as every other form is."""
    monkeypatch.setattr(four_bit_cpu, "supports", lambda weights: False)
    weights = products(fused, dtype)
    bias = torch.randn(sum(weight.shape[0] for weight in weights)).to(dtype)
    plain = pack_four_bit(weights, bias)
    monkeypatch.setattr(four_bit, "decodes_quickly", lambda: False)
    decoded = pack_four_bit(weights, bias)
    assert isinstance(decoded, DecodedLinear)
    assert decoded.num_bytes == plain.dense().numel() * dtype.itemsize + bias.numel() * dtype.itemsize
    assert not any(weight.num_bytes for weight in decoded.formats), "neither codes nor scales are kept beside it"
    x, other = torch.randn(5, weights[0].shape[1]).to(dtype), draw(tuple(plain.dense().shape), torch.float32, seed=9)
    for _ in range(2):
        assert torch.equal(decoded.dense(), plain.dense())
        error = (decoded(x).float() - plain(x).float()).norm() / plain(x).float().norm()
        assert error <= torch.finfo(dtype).eps
        decoded.write(other)
        plain.write(other)


def test_the_processor_decides_the_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is AVX512-BF16, bfloat16 products run without dequantizing; float32 never loses precision."""
    monkeypatch.setattr(four_bit, "decodes_quickly", lambda: True)
    fused = pack_four_bit(products("qkv", torch.bfloat16))
    assert isinstance(fused, four_bit_cpu.PackedFourBit) == bool(bnb.has_avx512bf16())
    assert isinstance(pack_four_bit(products("qkv", torch.float32)), FourBitLinear)
    assert isinstance(pack_four_bit(products("odd rows", torch.bfloat16)), FourBitLinear)


def test_memory_is_counted() -> None:
    for double, scale_bits in ((False, 32), (True, 8 + 32 / 256)):
        layer = FourBitLinear((quantize(draw((1024, 1024), torch.float32), "nf4", 64, double),), None, 1024)
        table = 256 * 4 + 4 if double else 0
        assert layer.num_bytes == 1024 * 1024 * (4 + scale_bits / 64) / 8 + table
