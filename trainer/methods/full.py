"""Every weight is trained: what LoRA is measured against."""

from pathlib import Path
from typing import Any

import torch

from trainer.methods.base import load_causal_lm
from trainer.settings import Settings


class Full:
    """The weights in fp32, whatever is computed in: a step's change is lost in 16 bits."""

    def load_base(
        self, path: Path, settings: Settings, dtype: torch.dtype, device: torch.device, attention: str
    ) -> Any:
        """See `Method.load_base`."""
        model = load_causal_lm(path, attention, dtype=torch.float32)
        return model.to(device).requires_grad_(True)
