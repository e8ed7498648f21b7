"""LoRA (Hu et al. 2021, arXiv 2106.09685): the base stays in 16 or 32 bits."""

from pathlib import Path
from typing import Any

import torch

from trainer.methods.base import load_causal_lm
from trainer.settings import Settings


class Lora:
    """The base as it is, frozen."""

    def load_base(
        self, path: Path, settings: Settings, dtype: torch.dtype, device: torch.device, attention: str
    ) -> Any:
        """See `Method.load_base`."""
        model = load_causal_lm(path, attention, dtype=dtype)
        return model.to(device).requires_grad_(False)
