"""A base of any shape with random weights, made where it is trained: nothing is read but its config.json."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer.methods.adapter import linear_layers

STD = 0.02


def random_base(path: Path, dtype: torch.dtype, device: torch.device, attention: str, *, four_bit: bool) -> Any:
    """The causal language model that `path`'s config.json describes, frozen; with `four_bit` its linear layers but the
    head in NF4, double quantized, one after the other, so that the whole is never in 16 bits."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path, local_files_only=True)
    with torch.device("meta"):
        lm: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)  # type: ignore[no-untyped-call]
    torch.manual_seed(0)
    if four_bit:
        for name in linear_layers(lm):
            lm.set_submodule(name, _quantized(lm.get_submodule(name), dtype, device))
    for module in lm.modules():
        for name, old in module._parameters.items():
            if old is not None and old.is_meta:
                module._parameters[name] = _random(old, device)
    lm.tie_weights()
    lm.base_model.rotary_emb = type(lm.base_model.rotary_emb)(config).to(device)  # its tables are no parameters
    return lm.requires_grad_(False)


def _random(like: torch.Tensor, device: torch.device) -> nn.Parameter:
    new = torch.empty(like.shape, dtype=like.dtype, device=device)
    return nn.Parameter(new.fill_(1.0) if new.dim() == 1 else new.normal_(std=STD), requires_grad=False)


def _quantized(layer: nn.Linear, dtype: torch.dtype, device: torch.device) -> nn.Module:
    from bitsandbytes.nn import modules

    four_bit: Any = modules
    out_features, in_features = layer.weight.shape
    options = {"compress_statistics": True, "quant_type": "nf4"}
    with torch.device("meta"):
        new: nn.Module = four_bit.Linear4bit(
            in_features, out_features, layer.bias is not None, compute_dtype=dtype, **options
        )
    weight = torch.empty(out_features, in_features, dtype=dtype, device=device).normal_(std=STD)
    new.weight = four_bit.Params4bit(weight, requires_grad=False, **options).to(device)
    return new
