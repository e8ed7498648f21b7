"""A 4-bit base, served: token for token what transformers, PEFT and bitsandbytes give, in float32."""

import json
import random
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from server.base.quantization import Quantization
from server.base.spec import ModelSpec
from server.engine.messages import AdapterRef
from server.errors import BaseModelError, ConfigError
from server.kernels import four_bit
from server.kernels.four_bit import FourBitLinear
from server.kernels.linear import PackedLinear, SideBySide
from server.model.loader import load_weights
from server.model.transformer import ModelWeights
from tests.engine.inprocess import Driver, make_adapter, oracle_tokens
from tests.model.test_transformer import load, logits_in_chunks
from tests.model.tiny import FAMILIES
from tests.quantization.base import four_bit_oracle, load_oracle, save_base

CPU = torch.device("cpu")
ADAPTERS: list[dict[str, Any]] = [
    {},
    {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]},
    {"r": 16, "use_rslora": True, "target_modules": ["gate_proj", "up_proj", "down_proj"]},
]


def prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(3, 199), k=length)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[AdapterRef]]:
    root = tmp_path_factory.mktemp("llama")
    model = save_base("llama", root / "base")
    return root / "base", [make_adapter(model, root / f"a{i}", i, **config) for i, config in enumerate(ADAPTERS)]


def serve_all(driver: Driver, adapters: list[AdapterRef | None]) -> list[list[int]]:
    names = [f"r{i}" for i in range(len(adapters))]
    for i, (name, adapter) in enumerate(zip(names, adapters, strict=True)):
        driver.submit(name, prompt(i, 5 + 6 * i), 12, adapter)
    driver.run(*names)
    return [driver.inbox.tokens(name) for name in names]


def expected(oracle: PreTrainedModel, adapters: list[AdapterRef | None]) -> list[list[int]]:
    return [oracle_tokens(oracle, prompt(i, 5 + 6 * i), 12, adapter) for i, adapter in enumerate(adapters)]


@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_base_quantized_while_loading(
    quant_type: str, double: bool, llama: tuple[Path, list[AdapterRef]], tmp_path: Path
) -> None:
    """And the same from the checkpoint that transformers saves of it."""
    directory, trained = llama
    adapters = [None, *trained]
    oracle = four_bit_oracle(directory, quant_type, double)
    want = expected(oracle, adapters)
    assert len(set(map(tuple, want))) == len(want)
    driver = Driver(directory, quantization=quant_type, double_quantization=double)
    assert driver.engine.ready.quantization == quant_type
    assert serve_all(driver, adapters) == want
    oracle.save_pretrained(tmp_path)
    stored = Driver(tmp_path, dtype="float32")
    assert stored.engine.ready.quantization == quant_type
    assert serve_all(stored, adapters) == want


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"llama", "llama-rope3"}))
def test_every_family(family: str, tmp_path: Path) -> None:
    model = save_base(family, tmp_path / "base")
    adapters = [None, make_adapter(model, tmp_path / "adapter", 1)]
    want = expected(four_bit_oracle(tmp_path / "base", "nf4", True), adapters)
    assert serve_all(Driver(tmp_path / "base", quantization="nf4"), adapters) == want
    assert serve_all(Driver(tmp_path / "base"), adapters) != want, "quantization is not to be seen"


def test_layers_that_stay_in_16_bits(
    llama: tuple[Path, list[AdapterRef]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also within a fused product, and the head quantized: named as transformers names them, from either checkpoint."""
    directory, trained = llama
    adapters = [None, *trained]
    skip = ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp", "o_proj"]
    oracle = four_bit_oracle(directory, "nf4", True, skip)
    want = expected(oracle, adapters)
    assert serve_all(Driver(directory, quantization="nf4", keep_16bit=tuple(skip)), adapters) == want
    oracle.save_pretrained(tmp_path)
    assert serve_all(Driver(tmp_path, dtype="float32"), adapters) == want
    monkeypatch.setattr(four_bit, "decodes_quickly", lambda: True)  # whatever this processor does
    weights = weights_of(tmp_path)
    assert isinstance(weights.layers[0].qkv, SideBySide)
    assert isinstance(weights.layers[1].gate_up, PackedLinear)
    assert isinstance(weights.head, FourBitLinear)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32], ids=str)
def test_codes_that_are_stored_as_another_dtype(
    storage: torch.dtype, llama: tuple[Path, list[AdapterRef]], tmp_path: Path
) -> None:
    """As FSDP wants them (bnb_4bit_quant_storage)."""
    oracle = four_bit_oracle(llama[0], "nf4", True, bnb_4bit_quant_storage=storage)
    oracle.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors")[UP].dtype is storage
    adapters = [None, *llama[1]]
    assert serve_all(Driver(tmp_path, dtype="float32"), adapters) == expected(oracle, adapters)


@torch.inference_mode()
def test_bfloat16_is_as_near_to_float32_as_dequantizing_first(tmp_path: Path) -> None:
    """Whichever product the processor has."""
    save_base("llama", tmp_path, torch.bfloat16)
    oracle = four_bit_oracle(tmp_path, "nf4", True)
    ids = torch.tensor([prompt(0, 60)])
    exact = oracle(ids).logits[0]
    dense = load_oracle(tmp_path)
    for name, module in oracle.named_modules():
        if isinstance(module, Linear4bit):
            weight = bnb.dequantize_4bit(module.weight.data, module.weight.quant_state)
            dense.get_submodule(name).weight.copy_(weight)
    theirs = dense.bfloat16()(ids).logits[0].float()
    model, cache = load(tmp_path, torch.bfloat16, Quantization("nf4"))
    ours = logits_in_chunks(model, cache, ids[0], [40, 1, 19]).float()
    assert (ours - exact).norm() <= 1.3 * (theirs - exact).norm()


def test_adapters_pass_the_canary_in_bfloat16(llama: tuple[Path, list[AdapterRef]]) -> None:
    driver = Driver(llama[0], quantization="nf4", dtype="bfloat16")
    assert all(len(tokens) == 12 for tokens in serve_all(driver, [None, *llama[1]]))


def weights_of(directory: Path, quantization: Quantization | None = None) -> ModelWeights:
    spec = ModelSpec.from_config(json.loads((directory / "config.json").read_text()))
    return load_weights(directory, spec, torch.float32, CPU, quantization)


def test_the_memory_of_the_weights_is_told(
    llama: tuple[Path, list[AdapterRef]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(four_bit, "decodes_quickly", lambda: True)  # else they are kept as they were decoded
    plain, quantized = weights_of(llama[0]), weights_of(llama[0], Quantization("nf4", double=False))
    linears = 2 * (64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 128)
    assert plain.num_bytes - quantized.num_bytes == linears * 4 - linears // 2 - linears // 64 * 4
    assert Driver(llama[0], quantization="nf4").engine.stats().memory["weights"] < plain.num_bytes


def broken(directory: Path, target: Path, change: Any) -> Path:
    target.mkdir()
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text((directory / "config.json").read_text())
    return target


UP = "model.layers.1.mlp.up_proj.weight"
STATE = f"{UP}.quant_state.bitsandbytes__nf4"


def without(name: str) -> Any:
    return lambda tensors: tensors.pop(name)


def replaced(name: str, make: Any) -> Any:
    return lambda tensors: tensors.update({name: make(tensors[name])})


def state_of(**fields: Any) -> Any:
    def change(old: torch.Tensor) -> torch.Tensor:
        state = json.loads(bytes(old.tolist())) | fields
        return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return replaced(STATE, change)


FAULTS: dict[str, tuple[Any, str]] = {
    "no state": (without(STATE), rf"{UP} is quantized, but its quant_state"),
    "no absmax": (without(f"{UP}.absmax"), rf"no tensor {UP}\.absmax"),
    "no nested absmax": (without(f"{UP}.nested_absmax"), rf"no tensor {UP}\.nested_absmax"),
    "no nested offset": (state_of(nested_offset=None), rf"{UP}: .* no nested_offset"),
    "nested offset is no number": (state_of(nested_offset=[1]), "is not the state of a quantized weight"),
    "scales are no floats": (replaced(f"{UP}.absmax", lambda old: old.view(torch.int8)), "absmax: is torch.int8"),
    "8 bits": (replaced("model.norm.weight", lambda old: old.to(torch.int8)), r"model\.norm\.weight is int8"),
    "state is no JSON": (replaced(STATE, lambda old: old + 7), "is not the state of a quantized weight"),
    "another shape": (state_of(shape=[64, 128]), rf"{UP}: is \[64, 128\] before quantization"),
    "another block": (state_of(blocksize=48), rf"{UP}: blocks of 48"),
    "other blocks": (state_of(blocksize=128), rf"{UP}\.absmax: has 128 values for 64 blocks"),
    "another code": (replaced(f"{UP}.quant_map", lambda old: old.flip(0)), "is not the code of nf4"),
    "codes cut short": (replaced(UP, lambda old: old[:-5].clone()), rf"{UP}: holds"),
    "weight missing": (without(UP), rf"no tensor {UP}"),
}


@pytest.fixture(scope="module")
def stored(llama: tuple[Path, list[AdapterRef]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("stored")
    four_bit_oracle(llama[0], "nf4", True).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_with_a_checkpoint_is_named(fault: str, stored: Path, tmp_path: Path) -> None:
    change, message = FAULTS[fault]
    with pytest.raises(BaseModelError, match=message):
        weights_of(broken(stored, tmp_path / "broken", change))


def test_settings_that_do_not_fit_are_named(llama: tuple[Path, list[AdapterRef]], stored: Path) -> None:
    for quant_type in ("fp4", "none"):
        with pytest.raises(ConfigError, match=f"--quantization {quant_type}: the base is quantized to nf4 already"):
            Driver(stored, quantization=quant_type)
    assert Driver(stored, dtype="float32", quantization="nf4").engine.ready.quantization == "nf4"
    with pytest.raises(ConfigError, match="'q_prj': the base has no linear layer of that name"):
        Driver(llama[0], quantization="nf4", keep_16bit=("lm_head", "q_prj"))
    with pytest.raises(ConfigError, match="quantization block of 100"):
        Driver(llama[0], quantization="nf4", quantization_block=100)
    with pytest.raises(ConfigError, match="'int3' is not known"):
        Driver(llama[0], quantization="int3")


def test_an_odd_number_of_weights_is_refused(tmp_path: Path) -> None:
    save_base("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    spec = ModelSpec.from_config({**config, "intermediate_size": 1, "hidden_size": 1, "head_dim": 3})
    tensors = {"model.embed_tokens.weight": torch.ones(199, 1)}
    tensors |= {f"{path}.weight": torch.ones(shape) for path, shape in spec.linears().items()}
    tensors |= {
        f"model.layers.{i}.{n}_layernorm.weight": torch.ones(1) for i in (0, 1) for n in ("input", "post_attention")
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match=r"gate_proj\.weight: \[1, 1\] is an odd number of weights"):
        load_weights(tmp_path, spec, torch.float32, CPU, Quantization("nf4"))
