"""The processes that train together, each on a device of its own, as torchrun (and so `accelerate launch`) starts them.

All of them read all rows and take their share of each step; what they exchange goes through a `Group`.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.devices import choose_device
from trainer.errors import PeerFailed, SettingsError
from trainer.launch import is_launched

PATIENCE = timedelta(hours=1)  # the first process prepares while the others wait; one that dies is noticed at once


class Group(Protocol):
    """The processes that train together. Every process makes the same calls in the same order."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace each by its sum over all processes."""
        ...

    def share(self, tensors: Sequence[Tensor]) -> None:
        """Replace each by the first process's."""
        ...

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in any process."""
        ...


class Alone:
    """One process."""

    rank = 0
    size = 1

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Nothing to add."""

    def share(self, tensors: Sequence[Tensor]) -> None:
        """Nothing to share."""

    def any(self, flag: bool) -> bool:
        return flag


class Processes:
    """The default process group: GPUs exchange by NCCL, everything else goes by gloo."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()

    def add(self, tensors: Sequence[Tensor]) -> None:
        flat = torch.cat([tensor.detach().flatten().float() for tensor in tensors])  # one exchange for all of them
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.detach().copy_(part.view_as(tensor))

    def share(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), 0)

    def any(self, flag: bool) -> bool:
        value = torch.tensor(flag, dtype=torch.int32)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return bool(value)


@contextmanager
def joined(device: str) -> Iterator[Group]:
    """The group that torchrun's environment tells of, for training on `device`; alone without it.

    Raises SettingsError where there are more processes than devices, and PeerFailed once another process has ended.
    """
    size, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    if not is_launched() or size == 1:
        yield Alone()
        return
    _take_device(device, local)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
        yield Processes()
        dist.destroy_process_group()
    except RuntimeError as error:
        if not _is_peers(error):
            raise
        raise PeerFailed("another process of this run has ended, so this one does, too") from error


@contextmanager
def first_process_first(group: Group) -> Iterator[None]:
    """The first process does what is inside while the others wait: a fault is found, and said, once."""
    if group.rank:
        group.any(False)
    yield
    if not group.rank:
        group.any(False)


def _take_device(name: str, local: int) -> None:
    device = choose_device(name)
    if device.type != "cuda":
        return
    if ":" in name:
        raise SettingsError(f"device {name} is one GPU for several processes; use cuda, and each takes its own")
    if local >= torch.cuda.device_count():
        raise SettingsError(f"there are {torch.cuda.device_count()} GPUs, fewer than processes; lower --devices")
    torch.cuda.set_device(local)


def _is_peers(error: RuntimeError) -> bool:
    """Whether an exchange failed: NCCL's errors are of a kind of their own, gloo's name its source files."""
    return isinstance(error, dist.DistError) or "gloo/" in str(error)
