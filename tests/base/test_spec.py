"""ModelSpec against transformers' own configs and modules, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from server.base.spec import ModelSpec, RopeScaling
from server.errors import UnsupportedModel

SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "llama-biased": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama3": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "mistral": MistralConfig(**SIZES, head_dim=16, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=24),
}


def as_saved(config: PreTrainedConfig, directory: Path) -> dict[str, Any]:
    config.save_pretrained(directory)
    saved: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return saved


@pytest.mark.parametrize("name", CONFIGS)
def test_the_spec_describes_the_modules_that_transformers_builds(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    spec = ModelSpec.from_config(as_saved(config, tmp_path))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    modules: dict[str, Any] = dict(model.named_modules())
    linears = {
        path: (module.out_features, module.in_features)
        for path, module in modules.items()
        if isinstance(module, torch.nn.Linear) and path != "lm_head"
    }
    assert spec.linears() == linears
    attention, mlp = modules["model.layers.0.self_attn"], modules["model.layers.0.mlp"]
    assert spec.qkv_bias == (attention.q_proj.bias is not None)
    assert spec.o_bias == (attention.o_proj.bias is not None)
    assert spec.mlp_bias == (mlp.down_proj.bias is not None)
    assert spec.qk_norm == hasattr(attention, "q_norm")
    assert spec.head_dim == attention.head_dim
    assert spec.softmax_scale == pytest.approx(attention.scaling)
    assert spec.tied_embeddings == config.tie_word_embeddings
    assert spec.rms_eps == modules["model.norm"].variance_epsilon


def test_llama3_rope_scaling_is_read(tmp_path: Path) -> None:
    spec = ModelSpec.from_config(as_saved(CONFIGS["llama3"], tmp_path))
    assert spec.rope_theta == 500000.0
    assert spec.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 32)


def test_the_older_spelling_of_rope_and_dtype_means_the_same(tmp_path: Path) -> None:
    new = as_saved(CONFIGS["llama3"], tmp_path) | {"dtype": "bfloat16"}
    old = {key: value for key, value in new.items() if key not in ("rope_parameters", "dtype")}
    old |= {"rope_theta": 500000.0, "rope_scaling": {**LLAMA3}, "torch_dtype": "bfloat16"}
    del old["rope_scaling"]["rope_theta"]
    assert ModelSpec.from_config(old) == ModelSpec.from_config(new)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gemma3"}, ["gemma3", "llama", "mistral", "qwen2", "qwen3"]),
        ({"model_type": None}, ["None", "llama"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantized", "gptq"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
        ({"num_key_value_heads": 4}, ["num_attention_heads 6", "num_key_value_heads 4"]),
        ({"dtype": "float8_e4m3fn"}, ["dtype", "float8_e4m3fn", "bfloat16"]),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, ["yarn", "llama3"]),
        ({"model_type": "mistral", "sliding_window": 32}, ["sliding_window", "32"]),
        ({"model_type": "qwen2", "sliding_window": 32, "use_sliding_window": True}, ["sliding_window", "32"]),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    config = as_saved(CONFIGS["llama"], tmp_path) | change
    with pytest.raises(UnsupportedModel) as caught:
        ModelSpec.from_config(config)
    assert all(word in caught.value.message for word in words)


@pytest.mark.parametrize(
    ("config_class", "changes"), [(MistralConfig, {}), (Qwen2Config, {"use_sliding_window": True})], ids=str
)
def test_a_window_that_is_left_out_is_transformers(config_class: Any, changes: dict[str, Any]) -> None:
    sizes = SIZES | changes | {"max_position_embeddings": 8192}
    window = config_class(**sizes).sliding_window
    with pytest.raises(UnsupportedModel, match=f"sliding_window {window} is shorter than the context"):
        ModelSpec.from_config({"model_type": config_class.model_type, **sizes})
    shorter = sizes | {"max_position_embeddings": window}
    assert ModelSpec.from_config({"model_type": config_class.model_type, **shorter}).max_position == window


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "mistral", "sliding_window": 128},
        {"model_type": "qwen2", "sliding_window": 32, "use_sliding_window": False},
    ],
)
def test_a_window_that_never_cuts_is_fine(change: dict[str, Any], tmp_path: Path) -> None:
    assert ModelSpec.from_config(as_saved(CONFIGS["llama"], tmp_path) | change).max_position == 128
