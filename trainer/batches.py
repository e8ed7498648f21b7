"""Which examples make a batch, and the batch's tensors."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.encoding import Example

WINDOW = 16  # batches that are sorted by length together: little padding, still a different mix every epoch


@dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded. `targets` holds the learned tokens, `positions` the places that predict them."""

    ids: Tensor  # [rows, length] int64
    attention: Tensor  # [rows, length] int64, 1 where there is a token
    positions: Tensor  # [rows, length] bool: the next token is learned
    targets: Tensor  # [number of True in positions] int64, in row order


def group_by_length(lengths: Sequence[int], batch_size: int, rng: random.Random) -> list[list[int]]:
    """Indexes in batches of at most `batch_size`, each index once; rows of a batch are of similar length."""
    order = list(range(len(lengths)))
    rng.shuffle(order)
    window = batch_size * WINDOW
    batches: list[list[int]] = []
    for start in range(0, len(order), window):
        part = sorted(order[start : start + window], key=lambda index: lengths[index])
        batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    rng.shuffle(batches)
    return batches


def collate(examples: Sequence[Example], pad_id: int, device: torch.device) -> Batch:
    """Pad `examples` to the longest of them."""
    length = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), length), pad_id, dtype=torch.int64)
    attention = torch.zeros_like(ids)
    learned = torch.zeros_like(ids, dtype=torch.bool)
    for row, example in enumerate(examples):
        size = len(example.ids)
        ids[row, :size] = torch.tensor(example.ids)
        attention[row, :size] = 1
        learned[row, :size] = torch.tensor(example.mask)
    positions = torch.zeros_like(learned)
    positions[:, :-1] = learned[:, 1:]  # place t predicts token t + 1
    targets = ids[learned]
    return Batch(ids.to(device), attention.to(device), positions.to(device), targets.to(device))
