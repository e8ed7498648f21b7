"""What a method is, and what all of them share."""

from pathlib import Path
from typing import Any, Protocol

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from trainer.settings import Settings


class Method(Protocol):
    """A way to hold the base. `quantization` is the format its weights have meanwhile ("nf4"), None for none."""

    @property
    def name(self) -> str: ...

    @property
    def quantization(self) -> str | None: ...

    def load_base(self, path: Path, dtype: torch.dtype, device: torch.device, attention: str) -> Any:
        """The base as a transformers model, frozen, computing in `dtype`; `attention` names transformers' kernel."""
        ...


def add_adapter(model: Any, targets: tuple[str, ...], settings: Settings) -> PeftModel:
    """Put fresh LoRA layers on `model`: A random (from torch's seed), B zero, both fp32, trainable."""
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]  # PEFT takes any number, its annotation says int
        lora_dropout=settings.dropout,
        target_modules=list(targets),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)
