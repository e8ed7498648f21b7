"""PEFT itself is the oracle: what it adapts, at which rank and scaling, is what we derive from what it saved."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import LlamaConfig, LlamaForCausalLM

from adapters.errors import InvalidAdapter, UnsupportedAdapter
from adapters.layout import read_layout
from adapters.peft_config import LoraSettings, parse_settings
from adapters.store import AdapterStore
from adapters.transfer import export_version
from tests.adapters.builders import PUBLISH

# What PEFT and transformers say to their own users
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning", "ignore::FutureWarning")

CONFIG = LlamaConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=4,
    num_attention_heads=2,
    num_key_value_heads=1,
    vocab_size=32,
)
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EVERY_PATH = [
    f"model.layers.{i}.{'mlp' if m in ALL[4:] else 'self_attn'}.{m}"
    for i in range(CONFIG.num_hidden_layers)
    for m in ALL
]


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG)


def linears(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }


def adapted(model: PeftModel) -> dict[str, tuple[int, float]]:
    """PEFT's own account of itself: module path → (rank, scaling)."""
    return {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


VARIANTS: dict[str, dict[str, Any]] = {
    "two names": {"target_modules": ["q_proj", "v_proj"]},
    "one name": {"target_modules": ["down_proj"]},
    "all names": {"target_modules": ALL},
    "all-linear": {"target_modules": "all-linear"},
    "ALL-LINEAR": {"target_modules": "All-Linear"},
    "whole paths": {"target_modules": ["model.layers.1.mlp.up_proj", "layers.2.self_attn.q_proj"]},
    "more paths than peft keeps": {"target_modules": EVERY_PATH[:24]},
    "a name that is nowhere": {"target_modules": ["q_proj", "c_attn"]},
    "expression": {"target_modules": r".*\.self_attn\.(q|o)_proj"},
    "expression on layers": {"target_modules": r"model\.layers\.(0|3)\..*_proj"},
    "expression looking ahead": {"target_modules": r"(?!.*mlp).*_proj$"},
    "excluded names": {"target_modules": ALL, "exclude_modules": ["q_proj", "model.layers.0.mlp.up_proj"]},
    "excluded expression": {"target_modules": ALL, "exclude_modules": r".*layers\.[12]\..*"},
    "all-linear less some": {"target_modules": "all-linear", "exclude_modules": ["mlp.down_proj"]},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": 2},
    "layer nought": {"target_modules": ["q_proj"], "layers_to_transform": 0},
    "some layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 3]},
    "no layers means all": {"target_modules": ["q_proj"], "layers_to_transform": []},
    "layers by pattern": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "layers by patterns": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
    "whole path passes the layer filter": {
        "target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"],
        "layers_to_transform": [2],
    },
    "rslora": {"target_modules": ALL, "use_rslora": True, "r": 6, "lora_alpha": 10},
    "alpha": {"target_modules": ALL, "lora_alpha": 17, "r": 3},
    "rank by name": {"target_modules": ALL, "rank_pattern": {"q_proj": 2, "down_proj": 16}},
    "rank by path": {
        "target_modules": ALL,
        "rank_pattern": {"model.layers.1.mlp.up_proj": 2, "layers.2.mlp.up_proj": 5},
    },
    "rank by expression": {"target_modules": ALL, "rank_pattern": {r".*\.(up|down)_proj": 3, r"layers\.[01]\..*": 2}},
    "rank anchored": {"target_modules": ALL, "rank_pattern": {r"^model.layers.0.self_attn.q_proj": 2}},
    "rank by part of a name": {"target_modules": ALL, "rank_pattern": {"proj": 2, "_proj": 3, "self_attn": 5}},
    "first key wins": {"target_modules": ALL, "rank_pattern": {".*q_proj": 5, "a|q_proj": 7, "q_proj": 2}},
    "alpha by name": {"target_modules": ALL, "alpha_pattern": {"q_proj": 2, "mlp.up_proj": 64}},
    "alpha by a key that is two": {"target_modules": ALL, "alpha_pattern": {"o)|(up_proj": 5, "q)|(mlp.gate": 64}},
    "both, rslora": {
        "target_modules": ALL,
        "use_rslora": True,
        "rank_pattern": {"layers.3..*": 8, "q_proj": 2},
        "alpha_pattern": {r".*layers\.0.*": 4, "v_proj": 32},
    },
    "gaussian": {"target_modules": ALL, "init_lora_weights": "gaussian"},
    "orthogonal": {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
    "dropout": {"target_modules": ["q_proj"], "lora_dropout": 0.5},
    "no task": {"target_modules": ["q_proj"], "task_type": None},
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_same_modules_ranks_and_scalings_as_peft(variant: dict[str, Any], tmp_path: Path) -> None:
    model = base()
    layers = linears(model)
    wanted = LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, **variant})
    peft_model = get_peft_model(model, wanted)
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    peft_model.save_pretrained(tmp_path)

    layout = read_layout(tmp_path, layers)

    assert {path: (module.rank, module.scaling) for path, module in layout.modules.items()} == adapted(peft_model)
    assert layout.dtype == "F32"


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_same_targets_from_the_config_as_it_was_written(variant: dict[str, Any]) -> None:
    """PEFT rewrites some settings when it saves ("all-linear", long lists); configs written by hand keep them."""
    model = base()
    layers = linears(model)
    settings = parse_settings({"r": 4, **variant}, max_rank=64)
    assert isinstance(settings, LoraSettings)
    derived = settings.targets(layers)
    assert derived == adapted(get_peft_model(model, LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, **variant})))


UNSORTED = {"target_modules": ALL, "r": 4, "rank_pattern": {"q_proj": 2, "layers.3..*": 8, ".*q_proj": 5}}


def test_the_first_key_wins_also_out_of_order() -> None:
    model = base()
    layers = linears(model)
    settings = parse_settings(UNSORTED, max_rank=64)
    assert isinstance(settings, LoraSettings)
    assert settings.targets(layers) == adapted(get_peft_model(model, LoraConfig(**UNSORTED)))


def test_keys_that_peft_put_in_another_order_are_refused(tmp_path: Path) -> None:
    """PEFT sorts the keys as it saves, and with them changes what they mean; the tensors show it."""
    model = base()
    layers = linears(model)
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **UNSORTED)).save_pretrained(tmp_path)
    with pytest.raises(InvalidAdapter, match="has shape"):
        read_layout(tmp_path, layers, allow_zero=True)


def test_the_published_copy_means_the_same_to_peft(tmp_path: Path) -> None:
    model = base()
    variant = VARIANTS["both, rslora"] | {"exclude_modules": ["o_proj", "k_proj"]}
    peft_model = get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", **variant))
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    peft_model.save_pretrained(tmp_path / "saved")
    fresh = base()
    settings = {**PUBLISH, "linears": linears(fresh)}
    store = AdapterStore(tmp_path / "store")
    version = store.publish(tmp_path / "saved", "a", **settings)
    export_version(store, version, tmp_path / "exported")
    again = PeftModel.from_pretrained(fresh, str(tmp_path / "exported"))

    tokens = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(peft_model.eval()(tokens).logits, again.eval()(tokens).logits)
    assert adapted(again) == adapted(peft_model)
    assert version.manifest.num_parameters == sum(p.numel() for n, p in again.named_parameters() if "lora_" in n)
    assert version.manifest.ranks == (2, 4, 8)


UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "use_dora"),
    "bias": ({"bias": "lora_only"}, "bias"),
    "lora bias": ({"lora_bias": True}, "lora_bias"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, "model.embed_tokens"),
    "head": ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
    "token indices": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    "olora": ({"init_lora_weights": "olora"}, "init_lora_weights"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    "pissa, fast": ({"init_lora_weights": "pissa_niter_2"}, "init_lora_weights"),
    "layer replication": ({"layer_replication": [[0, 2], [1, 4]]}, "layer_replication"),
    "alora": ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
    "another task": ({"task_type": "FEATURE_EXTRACTION"}, "task_type"),
}


@pytest.mark.parametrize(("variant", "named"), UNSUPPORTED.values(), ids=UNSUPPORTED.keys())
def test_what_peft_can_save_and_we_do_not_honour_is_refused_by_name(
    variant: dict[str, Any], named: str, tmp_path: Path
) -> None:
    model = base()
    layers = linears(model)
    peft_model = get_peft_model(
        model, LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj"], **variant})
    )
    peft_model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedAdapter) as caught:
        read_layout(tmp_path, layers)
    assert named in caught.value.message


def test_pissa_converted_to_plain_lora_is_taken(tmp_path: Path) -> None:
    peft_model = get_peft_model(
        base(), LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights="pissa")
    )
    peft_model.peft_config["default"].init_lora_weights = True
    peft_model.save_pretrained(tmp_path / "initial")
    peft_model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter += 0.1
    peft_model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    saved = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    layout = read_layout(tmp_path / "plain", linears(base()))
    assert {module.rank for module in layout.modules.values()} == {8}
    assert saved["init_lora_weights"] is True
