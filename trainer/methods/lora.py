"""LoRA (Hu et al. 2021, arXiv 2106.09685): the base stays in 16 or 32 bits."""

from pathlib import Path
from typing import Any

import torch


class Lora:
    """The base as it is."""

    name = "lora"
    quantization = None

    def load_base(self, path: Path, dtype: torch.dtype, device: torch.device, attention: str) -> Any:
        """See `Method.load_base`."""
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation=attention, local_files_only=True
        )
        return model.to(device).requires_grad_(False)
