"""A small base and well-formed adapters for it, made without torch or PEFT, for tests to break."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

BASE_DIGEST = "sha256:" + "ba" * 32
_SIZES = {
    "self_attn.q_proj": (16, 16),
    "self_attn.k_proj": (8, 16),
    "self_attn.v_proj": (8, 16),
    "self_attn.o_proj": (16, 16),
    "mlp.gate_proj": (24, 16),
    "mlp.up_proj": (24, 16),
    "mlp.down_proj": (16, 24),
}
LINEARS = {f"model.layers.{layer}.{name}": size for layer in range(2) for name, size in _SIZES.items()}
PUBLISH: dict[str, Any] = {"base_digest": BASE_DIGEST, "base_name": "tiny", "linears": LINEARS}

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def config(**changes: Any) -> dict[str, Any]:
    """A config as PEFT writes it, rank 4 on q_proj and v_proj."""
    plain = {
        "auto_mapping": None,
        "base_model_name_or_path": "somewhere/tiny",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "peft_version": "0.21.2",
        "r": 4,
        "rank_pattern": {},
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    return {**plain, **changes}


def tensors(
    seed: int = 0,
    rank: int = 4,
    names: tuple[str, ...] = ("q_proj", "v_proj"),
    linears: Mapping[str, tuple[int, int]] = LINEARS,
) -> dict[str, np.ndarray]:
    """Random A and B, float32, for the layers named."""
    random = np.random.default_rng(seed)
    found = {}
    for path, (out_features, in_features) in linears.items():
        if path.endswith(names):
            shapes = {"lora_A": (rank, in_features), "lora_B": (out_features, rank)}
            for part, shape in shapes.items():
                found[f"base_model.model.{path}.{part}.weight"] = random.standard_normal(shape, dtype=np.float32)
    return found


def packed(header: str, data: bytes = b"") -> bytes:
    """A safetensors file of a header written by hand."""
    return struct.pack("<Q", len(header.encode())) + header.encode() + data


def safetensors(values: dict[str, np.ndarray], dtypes: dict[str, str] | None = None) -> bytes:
    """A safetensors file; a uint16 array stands for BF16 unless `dtypes` says otherwise."""
    names = {"float32": "F32", "float16": "F16", "uint16": "BF16", "float64": "F64", "int8": "I8"}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, value in values.items():
        dtype = (dtypes or {}).get(name, names[str(value.dtype)])
        offsets = [len(data), len(data) + value.nbytes]
        header[name] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": offsets}
        data += value.tobytes()
    return packed(json.dumps(header), data)


def write_adapter(
    directory: Path,
    values: dict[str, np.ndarray] | None = None,
    settings: dict[str, Any] | None = None,
    *,
    seed: int = 0,
) -> Path:
    """A directory as PEFT saves it."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(settings or config()))
    (directory / "adapter_model.safetensors").write_bytes(safetensors(tensors(seed) if values is None else values))
    (directory / "README.md").write_text("not a part of it\n")
    return directory
