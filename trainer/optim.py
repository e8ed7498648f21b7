"""The optimizer, and its state as plain tensors and numbers."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trainer.settings import Settings
from trainer.sharding import like, whole

State = tuple[dict[str, Tensor], dict[str, int | float]]


def build_optimizer(named: Mapping[str, torch.nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    """AdamW over `named`, LoRA's B with its own learning rate (LoRA+, Hayou et al. 2024, arXiv 2402.12354).

    8-bit states (Dettmers et al. 2022, arXiv 2110.02861) and paged ones (QLoRA) are bitsandbytes's.
    """
    rate = settings.resolved().learning_rate
    assert rate is not None, "resolved"
    faster = [p for name, p in named.items() if "lora_B" in name or "lora_embedding_B" in name]
    others = [p for name, p in named.items() if not ("lora_B" in name or "lora_embedding_B" in name)]
    groups: list[dict[str, Any]] = [{"params": others, "lr": rate}] if others else []
    groups += [{"params": faster, "lr": rate * settings.lora_plus}] if faster else []
    device = next(iter(named.values())).device
    match choose_optimizer(settings, device):
        case "adamw":
            return torch.optim.AdamW(groups, weight_decay=settings.weight_decay, fused=True)
        case kind:
            import bitsandbytes as bnb

            kinds = {"adamw_8bit": "AdamW8bit", "paged_adamw": "PagedAdamW32bit", "paged_adamw_8bit": "PagedAdamW8bit"}
            optimizer: torch.optim.Optimizer = getattr(bnb.optim, kinds[kind])(
                groups, weight_decay=settings.weight_decay
            )
            return optimizer


def choose_optimizer(settings: Settings, device: torch.device) -> str:
    """What `auto` means on `device`."""
    if settings.optimizer != "auto":
        return settings.optimizer
    return "paged_adamw_8bit" if settings.method == "qlora" and device.type == "cuda" else "adamw"


def optimizer_state(optimizer: torch.optim.Optimizer, *, keep: bool = True) -> State:
    """What the optimizer remembers: tensors, whole and on the CPU, and numbers, by "parameter.entry".
    Without `keep` this process only takes part in making tensors whole."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, int | float] = {}
    for index, parameter in enumerate(_parameters(optimizer)):
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                value = whole(value)
                if keep:
                    tensors[f"{index}.{key}"] = value.cpu()
            else:
                numbers[f"{index}.{key}"] = value
    return tensors, numbers


def restore_optimizer(optimizer: torch.optim.Optimizer, state: State) -> None:
    """The inverse, for an optimizer of the same parameters that has made no step."""
    parameters = _parameters(optimizer)
    places = {p: (g, i) for g, group in enumerate(optimizer.param_groups) for i, p in enumerate(group["params"])}
    for name, value in (state[0] | state[1]).items():
        number, _, key = name.partition(".")
        parameter = parameters[int(number)]
        own = optimizer.state[parameter]
        if not own and hasattr(optimizer, "init_state"):  # bitsandbytes: so that paged states lie in paged memory
            group, index = places[parameter]
            optimizer.init_state(optimizer.param_groups[group], parameter, group, index)
            own = optimizer.state[parameter]
        if isinstance(own.get(key), Tensor) and isinstance(value, Tensor):
            own[key].copy_(value)
        elif isinstance(value, Tensor):
            own[key] = like(value, parameter) if key != "step" else value.to(parameter.device)  # as fused AdamW has it
        else:
            own[key] = value


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
