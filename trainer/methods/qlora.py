"""QLoRA (Dettmers et al. 2023, arXiv 2305.14314): the linear layers of the base in 4 bits, NF4 with double
quantization by bitsandbytes, on CPU as on CUDA. The head and the embeddings stay as they are."""

from pathlib import Path
from typing import Any

import torch


class QLora:
    """The base quantized to NF4."""

    name = "qlora"
    quantization = "nf4"

    def load_base(self, path: Path, dtype: torch.dtype, device: torch.device, attention: str) -> Any:
        """See `Method.load_base`."""
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        quantization = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            quantization_config=quantization,
            device_map={"": device},
            attn_implementation=attention,
            local_files_only=True,
        )
        return model.requires_grad_(False)
