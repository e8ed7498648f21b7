"""Random PEFT adapters of a base's shape: speed does not depend on what weights say."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file

from server.base.spec import ModelSpec


def write_random_adapters(spec: ModelSpec, directory: Path, count: int, *ranks: int) -> list[Path]:
    """PEFT directories a0, a1, … under `directory`, bf16, every linear layer adapted, alpha = 2 · rank; several ranks
    are used in turn."""
    linears = spec.linears()
    paths: list[Path] = []
    for i in range(count):
        rank = ranks[i % len(ranks)]
        generator = torch.Generator().manual_seed(i)
        tensors = {}
        for name, (out_features, in_features) in linears.items():
            key = f"base_model.model.{name}"
            a = torch.randn(rank, in_features, generator=generator) * 0.01
            b = torch.randn(out_features, rank, generator=generator) * 0.01
            tensors[f"{key}.lora_A.weight"] = a.bfloat16()
            tensors[f"{key}.lora_B.weight"] = b.bfloat16()
        path = directory / f"a{i}"
        path.mkdir(parents=True)
        save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
        (path / "adapter_config.json").write_text(json.dumps(peft_config(linears, rank)))
        paths.append(path)
    return paths


def peft_config(linears: Iterable[str], rank: int) -> dict[str, object]:
    """adapter_config.json of an adapter of these linear layers."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted({name.rsplit(".", 1)[1] for name in linears}),
        "inference_mode": True,
    }
