"""`lorikeet quantize`: what it writes loads in transformers with bitsandbytes, and is the same base to adapters."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file

from server.base.quantization import Quantization
from server.base.resolve import resolve_base
from server.cli import main
from server.errors import BaseModelError
from server.quantization.convert import convert
from tests.engine.inprocess import Driver, make_adapter, oracle_tokens
from tests.quantization.base import four_bit_oracle, load_oracle, save_base
from tests.support.tiny_base import save_tiny_base

IDS = torch.randint(0, 199, (1, 40), generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")


@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@torch.inference_mode()
def test_transformers_gives_the_logits_of_its_own_quantization(quant_type: str, double: bool, tmp_path: Path) -> None:
    save_base("llama", tmp_path / "base")
    (tmp_path / "out").mkdir()
    convert(tmp_path / "base", tmp_path / "out", Quantization(quant_type, double=double), CPU)
    want = four_bit_oracle(tmp_path / "base", quant_type, double)(IDS).logits
    assert torch.equal(load_oracle(tmp_path / "out")(IDS).logits, want)


@pytest.mark.parametrize("family", ["llama-tied", "qwen2"])
def test_the_tensors_are_those_that_transformers_saves(family: str, tmp_path: Path) -> None:
    keep = ["lm_head", "model.layers.1.self_attn"]
    save_base(family, tmp_path / "base", torch.bfloat16)
    (tmp_path / "out").mkdir()
    convert(tmp_path / "base", tmp_path / "out", Quantization("nf4", keep=tuple(keep)), CPU)
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, llm_int8_skip_modules=keep
    )
    oracle: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config)
    oracle.save_pretrained(tmp_path / "theirs")
    theirs, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "out"))
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        if ".quant_state." in name:
            assert json.loads(bytes(tensor.tolist())) == json.loads(bytes(ours[name].tolist())), name
        else:
            assert torch.equal(tensor, ours[name]), name
            assert tensor.dtype is ours[name].dtype, name


def test_shards_have_an_index(tmp_path: Path) -> None:
    model = save_base("mistral", tmp_path / "base")
    (tmp_path / "out").mkdir()
    convert(tmp_path / "base", tmp_path / "out", Quantization("nf4"), CPU, shard_bytes=60_000)
    assert len(list((tmp_path / "out").glob("model-0*-of-0*.safetensors"))) > 2
    assert not list((tmp_path / "out").glob("*.part"))
    adapter = make_adapter(model, tmp_path / "adapter", 0)
    prompt = [3, 14, 15, 92, 65]
    oracle = load_oracle(tmp_path / "out")
    driver = Driver(tmp_path / "out")
    for each in (None, adapter):
        assert driver.generate(prompt, 8, each) == oracle_tokens(oracle, prompt, 8, each)


@pytest.mark.parametrize("block_size", [32, 128])
def test_other_block_sizes(block_size: int, tmp_path: Path) -> None:
    """Quantized by us, once and while it is loaded; read by transformers and bitsandbytes."""
    model = save_base("llama", tmp_path / "base", hidden_size=128, intermediate_size=256, head_dim=32)
    (tmp_path / "out").mkdir()
    convert(tmp_path / "base", tmp_path / "out", Quantization("nf4", block_size), CPU)
    oracle = load_oracle(tmp_path / "out")
    blocks = {m.weight.quant_state.blocksize for m in oracle.modules() if isinstance(m, Linear4bit)}
    assert blocks == {block_size}
    adapter = make_adapter(model, tmp_path / "adapter", 0)
    stored = Driver(tmp_path / "out", dtype="float32")
    loaded = Driver(tmp_path / "base", quantization="nf4", quantization_block=block_size)
    usual = Driver(tmp_path / "base", quantization="nf4")
    prompt = [3, 14, 15, 92, 65]
    for each in (None, adapter):
        want = oracle_tokens(oracle, prompt, 12, each)
        assert stored.generate(prompt, 12, each) == want
        assert loaded.generate(prompt, 12, each) == want
        assert usual.generate(prompt, 12, each) != want, "blocks of 64 would not be told apart"


def test_the_copy_is_the_same_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny_base(tmp_path / "base")
    base, out = str(tmp_path / "base"), tmp_path / "new" / "out"
    assert main(["quantize", base, "--out", str(out), "--quantization", "fp4", "--keep-16bit", "o_proj", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    source, copy = resolve_base(base), resolve_base(str(out))
    assert told == {"path": str(out), "base_digest": source.digest, "size_bytes": told["size_bytes"]}
    assert copy.digest == source.digest
    assert {file.name for file in (tmp_path / "base").iterdir()} <= {file.name for file in out.iterdir()}
    assert list(out.parent.iterdir()) == [out], "nothing is left beside it"
    section = json.loads((out / "config.json").read_text())["quantization_config"]
    assert section["bnb_4bit_quant_type"] == "fp4"
    assert section["llm_int8_skip_modules"] == [f"model.layers.{i}.self_attn.o_proj" for i in range(2)]
    (out / "lorikeet.json").rename(tmp_path / "record")
    alone = resolve_base(str(out))
    assert alone.digest != source.digest, "without the record it is a base of its own"
    shutil.copyfile(tmp_path / "base" / "model.safetensors", out / "model.safetensors")
    (tmp_path / "record").rename(out / "lorikeet.json")
    with pytest.raises(BaseModelError, match=r"lorikeet\.json: was written for other weight files"):
        resolve_base(str(out))


def test_what_cannot_be_quantized_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny_base(tmp_path / "base")
    base, out = str(tmp_path / "base"), tmp_path / "out"
    faults: list[tuple[list[str], int, str]] = [
        ([base, "--out", base], 1, "is there already"),
        ([base, "--out", str(out), "--quantization-block", "48"], 2, "quantization block of 48"),
        ([base, "--out", str(out), "--keep-16bit", "nothing"], 2, "'nothing': the base has no linear layer"),
        ([base, "--out", str(out), "--device", "cuda:99"], 2, "device 'cuda:99'"),
    ]
    for arguments, code, message in faults:
        assert main(["quantize", *arguments]) == code
        assert message in capsys.readouterr().err
        assert not out.exists()


def test_a_quantized_checkpoint_is_not_quantized_again(tmp_path: Path) -> None:
    save_base("llama", tmp_path / "base")
    (tmp_path / "out").mkdir()
    convert(tmp_path / "base", tmp_path / "out", Quantization("nf4"), CPU)
    with pytest.raises(BaseModelError, match="is quantized to nf4 already"):
        convert(tmp_path / "out", tmp_path / "twice", Quantization("nf4"), CPU)
