"""What the forward pass needs to know of a base model, read from its `config.json`.

One description drives one implementation for every supported family; whatever a config asks for that
the implementation would not honour is refused here by name, never ignored.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from server.base.quantization import stored_quantization
from server.errors import UnsupportedModel

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
DTYPES = ("float32", "bfloat16", "float16")
_DEFAULT_WINDOW = 4096  # transformers', of those families that have one


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Llama 3's frequency scaling (transformers `rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Shape and settings of a decoder-only transformer. Sizes are elements, `max_position` is tokens."""

    family: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    rms_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tied_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    dtype: str

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read a Hugging Face config. Raises UnsupportedModel naming the family or setting that is not supported,
        KeyError for a field that is missing, ValueError or TypeError for one of the wrong kind."""
        family = config.get("model_type")
        if family not in FAMILIES:
            raise UnsupportedModel(f"model_type {family!r} is not supported; supported are {', '.join(FAMILIES)}")
        stored_quantization(config)  # refuses methods that are not supported
        if (act := config.get("hidden_act", "silu")) not in ("silu", "swish"):
            raise UnsupportedModel(f"hidden_act {act!r} is not supported; supported is silu")
        heads, hidden = _size(config, "num_attention_heads"), _size(config, "hidden_size")
        kv_heads = _size(config, "num_key_value_heads", heads)
        if heads % kv_heads:
            raise UnsupportedModel(f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
        max_position = _size(config, "max_position_embeddings")
        _refuse_sliding_window(config, family, max_position)
        theta, scaling = _rope(config)
        dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
        if dtype not in DTYPES:
            raise UnsupportedModel(f"dtype {dtype!r} is not supported; supported are {', '.join(DTYPES)}")
        bias = bool(config.get("attention_bias", False))
        return cls(
            family=family,
            hidden_size=hidden,
            intermediate_size=_size(config, "intermediate_size"),
            num_layers=_size(config, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=_size(config, "head_dim", 128 if family == "qwen3" else hidden // heads),
            vocab_size=_size(config, "vocab_size"),
            max_position=max_position,
            rms_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=family == "qwen2" or (family in ("llama", "qwen3") and bias),
            o_bias=family in ("llama", "qwen3") and bias,
            mlp_bias=family == "llama" and bool(config.get("mlp_bias", False)),
            qk_norm=family == "qwen3",
            dtype=dtype,
        )

    @property
    def softmax_scale(self) -> float:
        return 1.0 / math.sqrt(self.head_dim)

    def linears(self) -> dict[str, tuple[int, int]]:
        """Every linear layer an adapter may change: module path in the checkpoint → (out_features, in_features)."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        hidden, inter = self.hidden_size, self.intermediate_size
        layer = {
            "self_attn.q_proj": (q, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, q),
            "mlp.gate_proj": (inter, hidden),
            "mlp.up_proj": (inter, hidden),
            "mlp.down_proj": (hidden, inter),
        }
        return {f"model.layers.{i}.{name}": size for i in range(self.num_layers) for name, size in layer.items()}


def _size(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """The field, or where it is absent or null the default, if there is one."""
    value = config[name] if default is None else config.get(name) or default
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}")
    return value


def _rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Rope theta and scaling, from transformers 5's `rope_parameters` or the older pair of keys."""
    params = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = params.get("rope_theta") or config.get("rope_theta") or 10000.0
    kind = params.get("rope_type") or params.get("type") or "default"
    if kind == "default":
        return float(theta), None
    if kind != "llama3":
        raise UnsupportedModel(f"rope_type {kind!r} is not supported; supported are default, llama3")
    return float(theta), RopeScaling(
        factor=params["factor"],
        low_freq_factor=params["low_freq_factor"],
        high_freq_factor=params["high_freq_factor"],
        original_max_position=params["original_max_position_embeddings"],
    )


def _refuse_sliding_window(config: Mapping[str, Any], family: str, max_position: int) -> None:
    """Mistral applies its window unless it is null, the Qwens only under `use_sliding_window`."""
    window = config.get("sliding_window", _DEFAULT_WINDOW)
    used = family == "mistral" or bool(config.get("use_sliding_window", False))
    if used and window is not None and window < max_position:
        raise UnsupportedModel(
            f"sliding_window {window} is shorter than the context; sliding attention is not supported"
        )
