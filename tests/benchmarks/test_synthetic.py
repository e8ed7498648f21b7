"""Synthetic bases and adapters are what servers load."""

import json
from pathlib import Path

import torch

from benchmarks.synthetic import base_tensors, write_adapters, write_base
from server.base.quantization import Quantization
from server.base.spec import ModelSpec
from server.lora.weights import load_adapter
from server.model.loader import load_weights
from tests.engine.inprocess import adapter_ref

CPU = torch.device("cpu")


def test_quantized_as_it_is_made_it_is_what_loading_would_quantize(tmp_path: Path) -> None:
    spec = write_base(tmp_path / "plain", "tiny", "none", CPU)
    assert spec == write_base(tmp_path / "nf4", "tiny", "nf4", CPU)
    plain = load_weights(tmp_path / "plain", spec, torch.bfloat16, CPU, Quantization("nf4"))
    stored = load_weights(tmp_path / "nf4", spec, torch.bfloat16, CPU)
    assert plain.num_bytes == stored.num_bytes
    for mine, other in zip(plain.layers, stored.layers, strict=True):
        assert torch.equal(mine.gate_up.dense(), other.gate_up.dense())
        assert torch.equal(mine.qkv.dense(), other.qkv.dense())
    assert torch.equal(stored.embedding, dict(base_tensors(spec, CPU))["model.embed_tokens.weight"])


def test_fewer_layers(tmp_path: Path) -> None:
    spec = write_base(tmp_path, "tiny", "none", CPU, num_layers=1)
    assert spec == ModelSpec.from_config(json.loads((tmp_path / "config.json").read_text()))
    assert len(load_weights(tmp_path, spec, torch.bfloat16, CPU).layers) == 1


def test_adapters_that_share_weights_are_as_many(tmp_path: Path) -> None:
    spec = write_base(tmp_path / "base", "tiny", "none", CPU)
    write_adapters(spec, tmp_path, 3, 4, True, CPU)
    paths = [tmp_path / f"a{i}" for i in range(3)]
    assert len({adapter_ref(path).digest for path in paths}) == 3
    assert len({(path / "adapter_model.safetensors").stat().st_ino for path in paths}) == 1
    assert [load_adapter(path, spec, torch.bfloat16).rank for path in paths] == [4, 4, 4]
