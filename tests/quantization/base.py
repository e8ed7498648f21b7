"""Tiny bases whose rows hold whole quantization blocks, and transformers with bitsandbytes over them in float32.

On CPUs that have AVX512-BF16 bitsandbytes computes in bfloat16 whatever the compute dtype; the oracle does not.
"""

from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from tests.model.tiny import FAMILIES, SHAPE

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16, "num_hidden_layers": 2}


def save_base(
    family: str, directory: Path, dtype: torch.dtype = torch.float32, seed: int = 0, **sizes: Any
) -> PreTrainedModel:
    """Write a random base and return it."""
    config_class, model_class, extra = FAMILIES[family]
    torch.manual_seed(seed)
    model = model_class(config_class(**{**SHAPE, **SIZES, **extra, **sizes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=0.15)
    model.to(dtype).save_pretrained(directory)
    return model


def four_bit_oracle(
    directory: Path, quant_type: str, double: bool, skip: list[str] | None = None, **options: Any
) -> PreTrainedModel:
    """The base quantized by transformers and bitsandbytes while it loads it, computing in float32."""
    config = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=skip,
        **options,
    )
    return load_oracle(directory, quantization_config=config)


def load_oracle(directory: Path, **options: Any) -> PreTrainedModel:
    """A checkpoint as transformers loads it, in float32."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options).eval()
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model
