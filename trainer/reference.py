"""The trainer's forward pass on the files that are shipped: transformers, with PEFT as anyone would load them."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from trainer.batches import collate
from trainer.devices import choose_attention
from trainer.encoding import Example
from trainer.loss import CausalLoss
from trainer.methods import METHODS
from trainer.served import Loss
from trainer.settings import Settings

BATCH_ROWS = 8


@torch.inference_mode()
def peft_losses(
    base: Path,
    adapter: Path | None,
    rows: Sequence[Example],
    dtype: torch.dtype,
    device: torch.device,
    settings: Settings,
) -> list[Loss]:
    """Each row's loss on its learned tokens, the base held as the method of `settings` does and computing in `dtype`,
    whatever that is while training."""
    attention = choose_attention(max(len(row.ids) for row in rows), device)
    causal_lm: Any = METHODS[settings.method].load_base(base, settings, dtype, device, attention)
    if adapter is not None:
        from peft import PeftModel

        causal_lm = PeftModel.from_pretrained(causal_lm, str(adapter)).get_base_model()
    causal_lm.eval()
    loss = CausalLoss(causal_lm)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    losses: dict[int, Loss] = {}
    with nullcontext() if dtype is torch.float32 else torch.autocast(device.type, dtype=dtype):
        for first in range(0, len(order), BATCH_ROWS):
            indexes = order[first : first + BATCH_ROWS]
            batch = collate([[rows[index]] for index in indexes], 0).to(device)
            hidden = loss.hidden(batch.ids)
            counts = [int(rows[index].mask.sum()) for index in indexes]
            parts = zip(indexes, batch.places.split(counts), batch.targets.split(counts), counts, strict=True)
            for index, places, targets, count in parts:
                losses[index] = Loss(float(loss.at(hidden, places, targets)), count)
    return [losses[index] for index in range(len(rows))]
