"""The oracle: transformers and PEFT on the tiny base, with adapters that PEFT made and saved."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import LlamaForCausalLM

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


def lora_config(rank: int, targets: Sequence[str], **options: Any) -> LoraConfig:
    """A config whose matrices PEFT draws at random, B too, so that the adapter has an effect."""
    settings: dict[str, Any] = {"lora_alpha": 2 * rank, "init_lora_weights": False, "task_type": "CAUSAL_LM"} | options
    return LoraConfig(r=rank, target_modules=list(targets), **settings)


ADAPTERS = {
    "rank-4": lora_config(4, ["q_proj", "v_proj"]),
    "rank-8": lora_config(8, ATTENTION + MLP),
    "rank-12": lora_config(12, MLP, lora_alpha=20),
    "rank-16-rslora": lora_config(16, ATTENTION, use_rslora=True, lora_alpha=8),
    "rank-24-patterns": lora_config(
        24, ATTENTION + MLP, rank_pattern={"q_proj": 5, "layers.1.mlp.up_proj": 3}, alpha_pattern={"down_proj": 7}
    ),
    "rank-32-last-layer": lora_config(32, ATTENTION + MLP, layers_to_transform=[1]),
    "rank-48": lora_config(48, ["k_proj", "down_proj"], lora_alpha=48),
    "rank-64": lora_config(64, ATTENTION, lora_alpha=64),
}


class PeftOracle:
    """One PeftModel that holds every adapter it made."""

    def __init__(self, base: LlamaForCausalLM, directory: Path) -> None:
        self._base = base
        self._directory = directory
        self._model: PeftModel | None = None

    def make(self, name: str, config: LoraConfig, seed: int) -> Path:
        """A new random adapter; returns its PEFT directory."""
        torch.manual_seed(seed)
        if self._model is None:
            self._model = PeftModel(self._base, config, adapter_name=name).eval()
        else:
            self._model.add_adapter(name, config)
        self._model.save_pretrained(str(self._directory), selected_adapters=[name])
        return self._directory / name

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int], adapter: str | None) -> Tensor:
        """[len(tokens), vocab]."""
        model = self._ready(adapter)
        with model.disable_adapter() if adapter is None else nullcontext():
            result: Tensor = model(input_ids=torch.tensor([list(tokens)])).logits[0]
        return result

    @torch.inference_mode()
    def greedy(self, prompt: Sequence[int], num_tokens: int, adapter: str | None) -> list[int]:
        """Greedy continuation that does not stop at the end token."""
        model = self._ready(adapter)
        output: list[int] = []
        with model.disable_adapter() if adapter is None else nullcontext():
            step = model(input_ids=torch.tensor([list(prompt)]), use_cache=True)
            while True:
                output.append(int(step.logits[0, -1].argmax()))
                if len(output) == num_tokens:
                    return output
                last = torch.tensor([output[-1:]])
                step = model(input_ids=last, past_key_values=step.past_key_values, use_cache=True)

    def _ready(self, adapter: str | None) -> PeftModel:
        assert self._model is not None, "make an adapter first"
        if adapter is not None:
            self._model.set_adapter(adapter)
        return self._model
