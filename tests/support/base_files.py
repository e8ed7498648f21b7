"""A base that can be described and hashed, and adapters for it, made without torch; too small to be run."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file


def write_base(directory: Path, seed: int = 0) -> Path:
    """One layer of width 8."""
    directory.mkdir()
    config = {
        "model_type": "llama",
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 32,
        "max_position_embeddings": 64,
    }
    (directory / "config.json").write_text(json.dumps(config))
    weights = {"model.embed_tokens.weight": np.full((32, 8), seed, np.float32)}
    save_file(weights, directory / "model.safetensors")
    return directory


def write_adapter(directory: Path, value: float) -> Path:
    """Of rank 2 on q_proj; its every weight is `value`."""
    directory.mkdir(parents=True)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{prefix}.lora_A.weight": (2, 8), f"{prefix}.lora_B.weight": (8, 2)}
    filled = {name: np.full(shape, value, np.float32) for name, shape in tensors.items()}
    save_file(filled, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    return directory
