"""Adapters by the dozen: random weights under PEFT's names and configs, each a content of its own."""

import itertools
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from tests.support.peft_model import ATTENTION, MLP, lora_config

KINDS = (
    lora_config(4, ["q_proj", "v_proj"]),
    lora_config(8, ATTENTION + MLP),
    lora_config(12, MLP, lora_alpha=20),
    lora_config(8, ATTENTION, use_rslora=True, lora_alpha=8),
)
MEAN_RANK = 8


class Contents:
    """Makes PEFT directories under `directory`, the kinds in turn. For one thread."""

    def __init__(self, directory: Path, linears: Mapping[str, tuple[int, int]]) -> None:
        self._directory = directory
        self._linears = linears
        self._numbers = itertools.count()

    def make(self, config: LoraConfig | None = None) -> Path:
        """A content that was never there before."""
        number = next(self._numbers)
        config = config or KINDS[number % len(KINDS)]
        path = self._directory / str(number)
        config.save_pretrained(str(path))
        save_file(self._tensors(config, number), path / "adapter_model.safetensors", metadata={"format": "pt"})
        return path

    def _tensors(self, config: LoraConfig, seed: int) -> dict[str, Tensor]:
        """As wide as torch draws the weights of a linear layer, so that both matrices have an effect."""
        generator = torch.Generator().manual_seed(seed)
        rank, targets = config.r, config.target_modules
        assert isinstance(targets, (list, set)), "the kinds list theirs"
        tensors: dict[str, Tensor] = {}
        for name, (out_features, in_features) in self._linears.items():
            if name.rpartition(".")[2] in targets:
                key = f"base_model.model.{name}"
                a = torch.empty(rank, in_features).uniform_(-1, 1, generator=generator) / in_features**0.5
                b = torch.empty(out_features, rank).uniform_(-1, 1, generator=generator) / rank**0.5
                tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
        return tensors
