"""The optimisation: micro-batches, their gradients added up, a step; evaluation; going on where a run stopped.

Knows nothing of files or methods.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from trainer.batches import PAD_TO, Batch, Feed, Position, Sequences, collate, num_learned, share
from trainer.devices import autocast
from trainer.encoding import Example
from trainer.errors import TrainingError
from trainer.groups import Alone, Group
from trainer.loss import CausalLoss
from trainer.optim import build_optimizer
from trainer.schedule import lr_factor
from trainer.settings import Settings
from trainer.sharding import is_sharded, whole


@dataclass(frozen=True, slots=True)
class Step:
    """What one optimizer step did. `loss` is the mean over its `num_learned` tokens (nats); `num_tokens` counts all;
    `seconds` is its own wall time, `learning_rate` the one before LoRA+, `grad_norm` that before clipping."""

    index: int
    num_steps: int
    epoch: int
    loss: float
    num_learned: int
    num_tokens: int
    learning_rate: float
    grad_norm: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Mean loss (nats) over the learned tokens of the evaluation's rows, after `step` steps."""

    step: int
    loss: float
    num_learned: int
    is_best: bool


@dataclass(slots=True)
class Progress:
    """Everything of a run besides weights and the optimizer: what a resumed run goes on with. Plain JSON.

    Sums are over the first and the current epoch: of the loss, and of the learned tokens.
    """

    step: int = 0
    position: Position = field(default_factory=Position)
    num_tokens: int = 0
    num_learned: int = 0
    epoch: int = 0
    epoch_loss: float = 0.0
    epoch_learned: int = 0
    first_epoch_loss: float | None = None
    last_epoch_loss: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    num_worse: int = 0
    micro_batch: int | None = None
    is_finished: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Progress":
        return cls(**{**values, "position": Position(**values["position"])})

    def add(self, step: Step) -> None:
        """Count a step."""
        if step.epoch != self.epoch:
            self.epoch, self.epoch_loss, self.epoch_learned = step.epoch, 0.0, 0
        self.epoch_loss += step.loss * step.num_learned
        self.epoch_learned += step.num_learned
        self.num_tokens += step.num_tokens
        self.num_learned += step.num_learned
        self.last_epoch_loss = self.epoch_loss / self.epoch_learned
        if step.epoch == 0:
            self.first_epoch_loss = self.last_epoch_loss


@dataclass(frozen=True, slots=True)
class Result:
    """Losses are means over the learned tokens of the first and the last epoch, as seen while training; `eval_loss`
    the best of the evaluations, that of `best_step`."""

    num_epochs: int
    num_steps: int
    num_tokens: int
    num_learned: int
    first_epoch_loss: float
    final_loss: float
    eval_loss: float | None
    best_step: int | None

    @classmethod
    def of(cls, progress: Progress) -> "Result":
        """Of a run that has come so far."""
        assert progress.first_epoch_loss is not None, "a run has steps"
        assert progress.last_epoch_loss is not None, "a run has steps"
        return cls(
            num_epochs=progress.epoch + 1,
            num_steps=progress.step,
            num_tokens=progress.num_tokens,
            num_learned=progress.num_learned,
            first_epoch_loss=progress.first_epoch_loss,
            final_loss=progress.last_epoch_loss,
            eval_loss=progress.best_loss,
            best_step=progress.best_step,
        )


class Listener(Protocol):
    """Hears what the loop does. `saved` and `best` are the moments to write checkpoints."""

    def stepped(self, step: Step) -> None: ...

    def evaluated(self, evaluation: Evaluation) -> None: ...

    def save(self, progress: Progress) -> None: ...

    def save_best(self, progress: Progress) -> None: ...

    def note(self, message: str) -> None: ...

    def is_stopped(self) -> bool:
        """Whether the user wants the run to end here, resumable."""
        ...


class Interrupted(Exception):
    """The run was stopped by its user, after a checkpoint."""


class Loop:
    """Trains the parameters of `causal_lm` that require gradients.

    Deterministic on CPU: the same data, settings and number of threads give the same bits, whether in one go or
    resumed. A step's dropout depends on the seed, the step and the process alone.

    Every process of `group` has to be given the same data. Sharded weights come with a `loss` that gathers them.
    """

    def __init__(
        self,
        causal_lm: Any,
        settings: Settings,
        *,
        loss: CausalLoss | None = None,
        pad_id: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        group: Group | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._lm = causal_lm
        self._settings = settings.resolved()
        self._pad_id = pad_id
        self._device = device
        self._dtype = dtype
        self._group = group or Alone()
        self._loss = loss or CausalLoss(causal_lm)
        if settings.packing:
            self._loss.require_positions()
        self.named = {name: p for name, p in causal_lm.named_parameters() if p.requires_grad}
        self.optimizer = build_optimizer(self.named, settings)
        self._peaks = [group["lr"] for group in self.optimizer.param_groups]
        share = settings.batch_size // self._group.size
        self.progress = progress or Progress(micro_batch=settings.micro_batch or max(1, share))
        self._is_sharded = is_sharded(list(self.named.values()))

    def run(self, feed: Feed, num_steps: int, evaluation: Sequence[Example], listener: Listener) -> Result:
        """Train until `num_steps` or until `patience` is out. Raises TrainingError as soon as a loss is not finite, and
        Interrupted."""
        state, settings = self.progress, self._settings
        if not state.is_finished:
            self._lm.train()
            for data in feed.steps(state.position):
                step = self._train(data.rows, data.epoch, num_steps, listener)
                state.step, state.position = step.index + 1, data.after
                state.add(step)
                listener.stepped(step)
                is_last = state.step >= num_steps
                if evaluation and (_due(state.step, settings.eval_every, data.ends_epoch) or is_last):
                    self._evaluate(evaluation, listener)
                patience_out = settings.patience is not None and state.num_worse >= settings.patience
                state.is_finished = is_last or patience_out
                if state.is_finished or _due(state.step, settings.checkpoint_every, data.ends_epoch):
                    listener.save(state)
                if state.is_finished:
                    break
                if self._group.any(listener.is_stopped()):
                    listener.save(state)
                    self._group.any(False)  # a process that ended sooner would have the first ended while it writes
                    raise Interrupted
        return Result.of(self.progress)

    def _train(self, rows: Sequences, epoch: int, num_steps: int, listener: Listener) -> Step:
        """One optimizer step on `rows`, in smaller micro-batches if memory does not suffice."""
        settings, index = self._settings, self.progress.step
        started = time.perf_counter()
        factor = lr_factor(index, num_steps, settings.warmup, settings.schedule, settings.final_lr)
        for param_group, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
            param_group["lr"] = peak * factor
        learned = num_learned(rows)
        while (total := self._try_accumulate(rows, learned, index)) is None:
            self._halve(listener)
        norm_before = self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss, norm = torch.stack(
            [total, norm_before.to(total)]
        ).tolist()  # all is queued before the device is waited for
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingError(f"the loss became {loss} at step {index + 1}; try a smaller learning rate")
        num_tokens = sum(len(example) for row in rows for example in row)
        rate = (settings.learning_rate or 0.0) * factor
        seconds = time.perf_counter() - started
        return Step(index, num_steps, epoch, loss, learned, num_tokens, rate, norm, seconds)

    def _try_accumulate(self, rows: Sequences, learned: int, index: int) -> Tensor | None:
        """The mean loss over `learned` tokens, its gradients added up; None if memory ran out."""
        torch.manual_seed((self._settings.seed << 32) + (self._group.rank << 24) + index)
        total = torch.zeros((), dtype=torch.float32, device=self._device)
        ran_out = False
        try:
            for batch in self._batches(rows):
                with autocast(self._device, self._dtype):
                    loss = self._loss(batch) / learned
                loss.backward()
                total += loss.detach()
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if self._is_sharded:  # the others wait for this process's part of a layer
                raise TrainingError("out of memory; use a smaller micro-batch, or gradient checkpointing") from error
            ran_out = True
        if self._group.any(ran_out):
            self.optimizer.zero_grad(set_to_none=True)
            return None
        gradients = [p.grad for p in self.named.values() if p.grad is not None]
        self._group.add([total] if self._is_sharded else [total, *gradients])  # shards are summed as they are made
        return total

    def _halve(self, listener: Listener) -> None:
        size = self.progress.micro_batch or 1
        if size == 1:
            raise TrainingError(
                "out of memory with one row at a time; use a shorter max-length, qlora, or gradient checkpointing"
            )
        self.progress.micro_batch = size // 2
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        listener.note(f"out of memory: {size // 2} rows at once from here on, not {size}; steps stay as large")

    def _batches(self, rows: Sequences) -> Iterator[Batch]:
        """The micro-batches of `rows` that are this process's."""
        at_once = self.progress.micro_batch or len(rows)
        pad_to = PAD_TO if self._device.type == "cuda" else 1
        for part in share(rows, self._group.rank, self._group.size, at_once):
            yield collate(part, self._pad_id, pad_to=pad_to).to(self._device)

    def _clip(self) -> Tensor:
        """The norm of all gradients, before they are clipped to `max_grad_norm`."""
        parameters = [p for p in self.named.values() if p.grad is not None]
        limit = self._settings.max_grad_norm or math.inf
        norm = whole(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        return norm

    def _evaluate(self, examples: Sequence[Example], listener: Listener) -> None:
        state = self.progress
        loss, learned = self.evaluate(examples)
        if not math.isfinite(loss):
            raise TrainingError(
                f"the evaluation's loss became {loss} at step {state.step}; try a smaller learning rate"
            )
        is_best = state.best_loss is None or loss < state.best_loss
        if is_best:
            state.best_loss, state.best_step, state.num_worse = loss, state.step, 0
            listener.save_best(state)
        else:
            state.num_worse += 1
        listener.evaluated(Evaluation(state.step, loss, learned, is_best))

    @torch.no_grad()
    def evaluate(self, examples: Sequence[Example]) -> tuple[float, int]:
        """Mean loss over the learned tokens of `examples`, and how many those are."""
        self._lm.eval()
        rows = [[example] for example in sorted(examples, key=len)]
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for batch in self._batches(rows):
            with autocast(self._device, self._dtype):
                total += self._loss(batch).double()
        self._group.add([total])
        self._lm.train()
        learned = num_learned(rows)
        return float(total) / learned, learned


def is_out_of_memory(error: Exception) -> bool:
    """Whether torch says that a device, or the host, has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _due(step: int, every: int | None, ends_epoch: bool) -> bool:
    return ends_epoch if every is None else step % every == 0
