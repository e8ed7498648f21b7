"""Weights in shards over the processes of a run: FSDP2 (`fully_shard`), layer by layer.

Each process holds its part of every weight, gradient and optimizer state; a layer is whole while it is computed.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from trainer.errors import SettingsError
from trainer.groups import Group
from trainer.loss import CausalLoss
from trainer.settings import Settings

ROOM = 0.7  # of a device's memory, that a base may take whole


def needs_sharding(path: Path, settings: Settings, num_devices: int, available: int) -> bool:
    """Whether a run over so many devices, each with `available` bytes, holds its weights in shards."""
    if settings.shard == "off" or num_devices == 1:
        return False
    is_large = sum(file.stat().st_size for file in path.glob("*.safetensors")) > ROOM * available
    if not (settings.shard == "on" or settings.method == "full" or (settings.method == "lora" and is_large)):
        return False
    if settings.method == "qlora":
        raise SettingsError("shard: 4-bit weights are not sharded; use method lora, or leave shard out")
    if settings.optimizer not in ("auto", "adamw"):
        raise SettingsError(f"optimizer {settings.optimizer} cannot take sharded weights; use adamw, or shard off")
    if settings.init != "default":
        raise SettingsError(f"init {settings.init} needs whole weights; use init default, or shard off")
    return True


def layers_of(causal_lm: Any) -> list[nn.Module]:
    """What is gathered at once: the decoder's layers."""
    kinds = set(getattr(causal_lm, "_no_split_modules", None) or ())
    return [module for module in causal_lm.modules() if type(module).__name__ in kinds]


def shard(loss: CausalLoss, group: Group, device: torch.device) -> None:
    """Put shards on `device` in place of the weights of `loss`'s model, which lie on the CPU: those of the first
    process; the others' values do not matter."""
    causal_lm = loss.causal_lm
    values = {name: parameter.detach() for name, parameter in causal_lm.named_parameters()}
    mesh = init_device_mesh(device.type, (group.size,))
    for layer in layers_of(causal_lm):
        fully_shard(layer, mesh=mesh)
    fully_shard(loss, mesh=mesh)  # what is in no layer; gathered where the loss is asked for
    for module in loss.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # a sum: the loss is divided by the tokens of all processes
            module.set_force_sum_reduction_for_comms(True)
    with torch.no_grad():
        for name, parameter in causal_lm.named_parameters():
            parameter.copy_(distribute_tensor(values.pop(name).to(device), mesh, parameter.placements))
    group.share(list(causal_lm.buffers()))


def gather(loss: CausalLoss, *, keep: bool) -> None:
    """Where `keep`, put whole trained weights on the CPU in place of their shards, tied ones still tied. Every process
    has to call this; after it the model is for saving alone."""
    made: dict[int, nn.Parameter | None] = {}
    for module in loss.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # an evaluation leaves some gathered
    for module in loss.causal_lm.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and is_sharded([parameter]) and parameter.requires_grad:
                if id(parameter) not in made:
                    value = whole(parameter)
                    made[id(parameter)] = nn.Parameter(value.cpu()) if keep else None
                if keep:
                    module._parameters[name] = made[id(parameter)]


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, of which this process may hold a shard: then every process has to call this."""
    held: Any = tensor.detach()
    value: Tensor = held.full_tensor() if isinstance(held, DTensor) else held
    return value


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole `tensor` as `parameter` is held: on its device, and of a shard the shard."""
    tensor = tensor.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return tensor


def is_sharded(tensors: Sequence[Tensor]) -> bool:
    """Whether any of them is a shard."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)
