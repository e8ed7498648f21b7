"""QLoRA (Dettmers et al. 2023, arXiv 2305.14314): the linear layers of the base in 4 bits, by bitsandbytes, on CPU as
on CUDA. The head and the embeddings stay as they are."""

from pathlib import Path
from typing import Any

import torch

from trainer.methods.base import load_causal_lm
from trainer.settings import Settings


class QLora:
    """The base quantized to NF4 or FP4, frozen."""

    def load_base(
        self, path: Path, settings: Settings, dtype: torch.dtype, device: torch.device, attention: str
    ) -> Any:
        """See `Method.load_base`."""
        from transformers import BitsAndBytesConfig

        quantization = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_quant_type=settings.quantization,
            bnb_4bit_use_double_quant=settings.double_quantization,
            bnb_4bit_compute_dtype=dtype,
        )
        model = load_causal_lm(
            path,
            attention,
            dtype=dtype,
            quantization_config=quantization,
            device_map={"": device},
        )
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):  # else one evaluation turns the weights, for good, into a
                module.support_avx512bf16_for_cpu = False  # layout whose product has no gradient
        return model.requires_grad_(False)
