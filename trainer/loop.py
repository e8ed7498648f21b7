"""The optimisation: forward, loss on the learned tokens, backward, step. Knows nothing of files or methods."""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.batches import Batch, collate, group_by_length
from trainer.encoding import Example
from trainer.errors import TrainingError
from trainer.settings import Settings


@dataclass(frozen=True, slots=True)
class Step:
    """What one optimizer step did. `loss` is the mean over its `num_learned` tokens (nats); `num_tokens` counts all."""

    index: int
    num_steps: int
    epoch: int
    loss: float
    num_learned: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Result:
    """Losses are means over the learned tokens of the first and the last epoch, as seen while training."""

    num_epochs: int
    num_steps: int
    num_tokens: int
    first_epoch_loss: float
    final_loss: float


class Loop:
    """Trains the parameters of `model` (a PEFT model over a causal LM) that require gradients.

    Deterministic on CPU: the same examples, settings and number of threads give the same bits.
    """

    def __init__(self, model: Any, settings: Settings, pad_id: int, device: torch.device) -> None:
        self._model = model
        self._settings = settings
        self._pad_id = pad_id
        self._device = device
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay
        )

    def run(self, examples: Sequence[Example], on_step: Callable[[Step], None]) -> Result:
        """Train for all epochs. Raises TrainingError as soon as a loss is not a finite number."""
        self._model.train()
        steps: list[Step] = []
        for index, (epoch, num_steps, rows) in enumerate(self._schedule(examples)):
            for group in self._optimizer.param_groups:
                group["lr"] = self._settings.learning_rate * lr_factor(index, num_steps, self._settings.warmup)
            batch = collate([examples[row] for row in rows], self._pad_id, self._device)
            loss = self._step(batch)
            step = Step(index, num_steps, epoch, loss, batch.targets.numel(), int(batch.attention.sum()))
            if not math.isfinite(loss):
                raise TrainingError(f"the loss became {loss} at step {index + 1}; try a smaller learning rate")
            steps.append(step)
            on_step(step)
        return Result(
            num_epochs=self._settings.epochs,
            num_steps=len(steps),
            num_tokens=sum(step.num_tokens for step in steps),
            first_epoch_loss=_epoch_loss(steps, 0),
            final_loss=_epoch_loss(steps, self._settings.epochs - 1),
        )

    def _schedule(self, examples: Sequence[Example]) -> Iterator[tuple[int, int, list[int]]]:
        """(epoch, steps in all, rows) of every step."""
        rng = random.Random(self._settings.seed)
        lengths = [len(example.ids) for example in examples]
        num_steps = math.ceil(len(examples) / self._settings.batch_size) * self._settings.epochs
        for epoch in range(self._settings.epochs):
            for rows in group_by_length(lengths, self._settings.batch_size, rng):
                yield epoch, num_steps, rows

    def _step(self, batch: Batch) -> float:
        loss = self._loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, self._settings.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def _loss(self, batch: Batch) -> Tensor:
        """Mean cross entropy over the learned tokens; the head runs only at the places that predict one."""
        causal_lm = self._model.get_base_model()
        output = causal_lm.model(input_ids=batch.ids, attention_mask=batch.attention, use_cache=False)
        hidden = output.last_hidden_state[batch.positions]  # [learned, hidden]
        logits = causal_lm.get_output_embeddings()(hidden)  # [learned, vocab]
        return F.cross_entropy(logits.float(), batch.targets)


def lr_factor(index: int, num_steps: int, warmup: float) -> float:
    """Linear warm-up over the first share `warmup` of the steps, then a cosine down to a tenth."""
    warmup_steps = math.ceil(num_steps * warmup)
    if index < warmup_steps:
        return (index + 1) / (warmup_steps + 1)
    progress = (index - warmup_steps) / max(1, num_steps - warmup_steps)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def _epoch_loss(steps: Sequence[Step], epoch: int) -> float:
    those = [step for step in steps if step.epoch == epoch]
    return sum(step.loss * step.num_learned for step in those) / sum(step.num_learned for step in those)
