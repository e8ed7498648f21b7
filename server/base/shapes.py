"""Sizes of well-known models, as their config.json has them: to plan for a model that is not here. What does not size
anything (norms' epsilon, rope) is left at its default."""

from typing import Any

from server.base.spec import ModelSpec


def _config(
    family: str,
    sizes: tuple[int, int, int, int, int, int],
    vocab: int,
    context: int,
    tied: bool = False,
) -> dict[str, Any]:
    """`sizes`: hidden, intermediate, layers, heads, heads of keys and values, their dimension."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return {
        "model_type": family,
        "dtype": "bfloat16",
        **dict(zip((*names, "head_dim"), sizes, strict=True)),
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "sliding_window": None,
        "tie_word_embeddings": tied,
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "smollm2-135m": _config("llama", (576, 1536, 30, 9, 3, 64), 49152, 8192, True),
    "smollm2-1.7b": _config("llama", (2048, 8192, 24, 32, 32, 64), 49152, 8192, True),
    "llama-3.2-1b": _config("llama", (2048, 8192, 16, 32, 8, 64), 128256, 131072, True),
    "llama-3.2-3b": _config("llama", (3072, 8192, 28, 24, 8, 128), 128256, 131072, True),
    "llama-3.1-8b": _config("llama", (4096, 14336, 32, 32, 8, 128), 128256, 131072),
    "llama-3.1-70b": _config("llama", (8192, 28672, 80, 64, 8, 128), 128256, 131072),
    "mistral-7b-v0.3": _config("mistral", (4096, 14336, 32, 32, 8, 128), 32768, 32768),
    "qwen2.5-7b": _config("qwen2", (3584, 18944, 28, 28, 4, 128), 152064, 32768),
    "qwen3-8b": _config("qwen3", (4096, 12288, 36, 32, 8, 128), 151936, 40960),
}


def named_spec(name: str) -> ModelSpec | None:
    """The shape of that name; None for one that is not known."""
    config = CONFIGS.get(name.lower())
    return None if config is None else ModelSpec.from_config(config)
