"""What an adapter is worth on each form of its base: loss in 16 bits and in NF4, by the server's own forward pass."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from server.base.quantization import Quantization, stored_quantization
from server.base.resolve import BaseModel
from trainer.errors import SettingsError
from trainer.prepare import read_config
from trainer.served import Loss, ServedBase, Tokens

FORMATS = {"none": None, "nf4": Quantization("nf4")}  # as `lorikeet serve --quantization` names them


@dataclass(frozen=True, slots=True)
class Checked:
    """Losses in nats a token on one form of the base, without and with the adapter."""

    base: float
    adapter: float


def check(
    adapter: Path, rows: Sequence[Tokens], base: BaseModel, device: torch.device, note: Callable[[str], None]
) -> dict[str, Checked]:
    """By format. Raises SettingsError for a checkpoint that is quantized already, and what loading raises."""
    if (stored := stored_quantization(read_config(base.path))) is not None:
        raise SettingsError(f"{base.name} is a {stored} checkpoint: there is no 16-bit base to compare it with")
    found: dict[str, Checked] = {}
    for name, quantization in FORMATS.items():
        note(f"scoring {len(rows)} rows on the base with quantization {name}")
        served = ServedBase(base.path, base.spec, device, quantization)
        loaded = served.load_adapter(adapter)
        bare, with_adapter = Loss.sum(served.losses(rows)), Loss.sum(served.losses(rows, loaded))
        found[name] = Checked(bare.mean, with_adapter.mean)
    return found
