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


def known_attention(kind: Any, attention: str) -> str:
    """`attention`, or plain attention for a class of model that has no other."""
    return attention if getattr(kind, "_supports_sdpa", False) else "eager"


def load_causal_lm(path: Path, attention: str, **options: Any) -> Any:
    """transformers' AutoModelForCausalLM; plain attention where a model has no other. Raises SettingsError for what
    that does not know."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

    try:
        kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(AutoConfig.from_pretrained(path, local_files_only=True))]
        options["attn_implementation"] = known_attention(kind, attention)
        return AutoModelForCausalLM.from_pretrained(path, local_files_only=True, **options)
    except (ValueError, KeyError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise SettingsError(f"{path}: transformers loads no causal language model from it ({reason})") from error
