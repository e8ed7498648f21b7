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
from trainer.settings import Settings

BATCH_ROWS = 8


@torch.inference_mode()
def peft_loss(
    base: Path,
    adapter: Path | None,
    rows: Sequence[Example],
    dtype: torch.dtype,
    device: torch.device,
    settings: Settings,
) -> float:
    """The mean loss on the rows' learned tokens, the base held as the method of `settings` does and computing in
    `dtype`, whatever that is while training."""
    attention = choose_attention(max(len(row.ids) for row in rows), device)
    causal_lm: Any = METHODS[settings.method].load_base(base, settings, dtype, device, attention)
    if adapter is not None:
        from peft import PeftModel

        causal_lm = PeftModel.from_pretrained(causal_lm, str(adapter)).get_base_model()
    causal_lm.eval()
    loss = CausalLoss(causal_lm)
    order = sorted(rows, key=len)
    total, num_tokens = 0.0, 0
    with nullcontext() if dtype is torch.float32 else torch.autocast(device.type, dtype=dtype):
        for first in range(0, len(order), BATCH_ROWS):
            batch = collate([[row] for row in order[first : first + BATCH_ROWS]], 0).to(device)
            total += float(loss(batch))
            num_tokens += len(batch.targets)
    return total / num_tokens
