"""What a method is, and what all of them share."""

from pathlib import Path
from typing import Any, Protocol

import torch

from trainer.errors import SettingsError
from trainer.settings import Settings


class Method(Protocol):
    """A way to hold the base while training."""

    def load_base(
        self, path: Path, settings: Settings, dtype: torch.dtype, device: torch.device, attention: str
    ) -> Any:
        """The base as a transformers model that computes in `dtype`; `attention` names transformers' kernel.

        Raises SettingsError if transformers makes no causal language model of it.
        """
        ...


def read_causal_config(path: Path, attention: str) -> tuple[Any, str]:
    """transformers' config of the base, and `attention`, or plain attention for a model that has no other. Raises
    SettingsError for what is no causal language model."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    try:
        config: Any = AutoConfig.from_pretrained(path, local_files_only=True)
        kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    except (ValueError, KeyError, OSError) as error:
        raise _refusal(path, error) from error
    if kind is None:
        raise SettingsError(f"{path}: is no causal language model (model_type {config.model_type})")
    return config, attention if getattr(kind, "_supports_sdpa", False) else "eager"


def load_causal_lm(path: Path, attention: str, **options: Any) -> Any:
    """transformers' AutoModelForCausalLM; plain attention where a model has no other. Raises SettingsError for what
    that does not know."""
    from transformers import AutoModelForCausalLM

    _, attention = read_causal_config(path, attention)
    try:
        return AutoModelForCausalLM.from_pretrained(
            path, local_files_only=True, attn_implementation=attention, **options
        )
    except (ValueError, KeyError, OSError) as error:
        raise _refusal(path, error) from error


def _refusal(path: Path, error: Exception) -> SettingsError:
    reason = " ".join(str(error).split())[:200]
    return SettingsError(f"{path}: transformers loads no causal language model from it ({reason})")
