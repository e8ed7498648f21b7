"""4-bit bases on a GPU: bitsandbytes' bits, its tokens, and what loading takes."""

import json
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch

from server.base.quantization import BLOCK_SIZES, QUANT_TYPES, Quantization
from server.base.spec import ModelSpec
from server.kernels import dequantize, quantize
from server.model.loader import load_weights
from tests.engine.inprocess import Driver, make_adapter, oracle_tokens
from tests.quantization.base import four_bit_oracle, save_base

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_every_bit_is_that_of_bitsandbytes(quant_type: str, block_size: int, dtype: torch.dtype) -> None:
    for seed, shape in enumerate([(256, 4096), (48, 80), (1, 34), (3000, 1536)]):
        for double in (False, True):
            weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)
            packed, state = bnb.quantize_4bit(
                weight, blocksize=block_size, compress_statistics=double, quant_type=quant_type
            )
            ours = quantize(weight, quant_type, block_size, double)
            assert torch.equal(ours.packed, packed.flatten())
            assert torch.equal(ours.absmax, state.absmax)
            assert torch.equal(dequantize(ours), bnb.dequantize_4bit(packed.view(-1, 1), state))


@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_tokens_are_those_of_transformers_peft_and_bitsandbytes(quant_type: str, double: bool, tmp_path: Path) -> None:
    """In float32; also from the checkpoint that transformers saves."""
    model = save_base("llama", tmp_path / "base")
    adapter = make_adapter(model, tmp_path / "adapter", 0)
    oracle = four_bit_oracle(tmp_path / "base", quant_type, double)  # on the GPU, where it is quantized
    oracle.save_pretrained(tmp_path / "stored")
    prompt = [3, 14, 15, 92, 65, 35]
    settings: list[tuple[str, dict[str, Any]]] = [
        ("base", {"quantization": quant_type, "double_quantization": double}),
        ("stored", {}),
    ]
    for name, options in settings:
        driver = Driver(tmp_path / name, device="cuda", dtype="float32", **options)
        for each in (None, adapter):
            assert driver.generate(prompt, 12, each) == oracle_tokens(oracle, prompt, 12, each)


def test_loading_takes_one_layer_more_than_what_is_kept(tmp_path: Path) -> None:
    """Device memory, at its peak: the 4-bit weights and one layer in 16 bits."""
    hidden, inter, layers = 1024, 4096, 6
    sizes: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": inter,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_hidden_layers": layers,
        "vocab_size": 8192,
    }
    save_base("llama", tmp_path, torch.bfloat16, **sizes)
    spec = ModelSpec.from_config(json.loads((tmp_path / "config.json").read_text()))
    device = torch.device("cuda")
    load_weights(tmp_path, spec, torch.bfloat16, device, Quantization("nf4"))  # loads the kernels
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    weights = load_weights(tmp_path, spec, torch.bfloat16, device, Quantization("nf4"))
    layer = 2 * (4 * hidden * hidden + 3 * hidden * inter)
    slack = 2 << 20  # the allocator's rounding, a table a weight
    assert torch.cuda.max_memory_allocated() - before <= weights.num_bytes + layer + slack
    assert weights.num_bytes < 2 * 2 * 8192 * hidden + layers * layer * 0.29
