"""Several adapters in one forward pass: each has rows of the batch to itself, the frozen base is shared.

A row's result depends on its own adapter alone, so a lane learns what it would learn by itself, up to the rounding of
products of another shape.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from trainer.batches import PAD_TO, Position, StepData, collate, num_learned
from trainer.checkpoints import writing
from trainer.loop import Progress, Step
from trainer.loss import CausalLoss
from trainer.methods import adapter as adapters
from trainer.optim import build_optimizer
from trainer.prepare import Prepared
from trainer.schedule import lr_factor
from trainer.settings import Settings


class LoraPart(NamedTuple):
    """LoRA on one layer: A [rank, in], B [out, rank], and alpha / rank."""

    a: nn.Parameter
    b: nn.Parameter
    scaling: float


class Segment(NamedTuple):
    """Rows [start, stop) of the batch are a lane's."""

    lane: int
    start: int
    stop: int


@dataclass(slots=True)
class Board:
    """Whose rows are where in the batch under way."""

    segments: Sequence[Segment] = ()


class LaneLinear(nn.Module):
    """y = base(x) + scaling · (x Aᵀ) Bᵀ, with A and B those of the lane that each row of x belongs to."""

    def __init__(self, base: nn.Module, parts: Mapping[int, LoraPart], board: Board) -> None:
        super().__init__()
        self.base = base
        self._parts = parts
        self._board = board

    def forward(self, x: Tensor) -> Tensor:
        """x [rows, length, in] → [rows, length, out]."""
        y: Tensor = self.base(x)
        deltas: list[Tensor] = []
        for lane, start, stop in self._board.segments:
            part = self._parts.get(lane)
            if part is None:
                deltas.append(y.new_zeros(y[start:stop].shape))
            else:
                low = nn.functional.linear(x[start:stop], part.a)
                deltas.append(nn.functional.linear(low, part.b) * part.scaling)
        return y + torch.cat(deltas)


@dataclass(slots=True)
class Lane:
    """One adapter in training. `error` says why it ended early; then its adapter is worth nothing."""

    settings: Settings
    prepared: Prepared
    config: str  # adapter_config.json
    parts: Mapping[str, LoraPart]  # by the layer's path in the base
    on_step: Callable[[Step], None]
    progress: Progress = field(default_factory=Progress)
    error: str | None = None

    @property
    def is_live(self) -> bool:
        return self.error is None and self.progress.step < self.prepared.num_steps

    @property
    def named(self) -> dict[str, nn.Parameter]:
        """The parameters by the names that PEFT gives them."""
        found: dict[str, nn.Parameter] = {}
        for path, part in self.parts.items():
            found[f"{path}.lora_A.default.weight"] = part.a
            found[f"{path}.lora_B.default.weight"] = part.b
        return found


def start_lane(causal_lm: Any, settings: Settings, prepared: Prepared, on_step: Callable[[Step], None]) -> Lane:
    """A lane whose adapter begins as it would alone; `causal_lm` is left as it was."""
    torch.manual_seed(settings.seed)
    targets = adapters.choose_targets(adapters.linear_layers(causal_lm), settings.target_modules)
    model = adapters.add_adapter(causal_lm, settings, targets)
    if settings.init == "eva":
        adapters.start_by_eva(model, prepared.examples, prepared.pad_id, prepared.device)
    layers: dict[str, Any] = {path: m for path, m in causal_lm.named_modules() if isinstance(m, LoraLayer)}
    parts = {
        path: LoraPart(layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"])
        for path, layer in layers.items()
    }
    config = adapters.config_json(model)
    model.unload()
    return Lane(settings, prepared, config, parts, on_step)


def save_lane(lane: Lane, directory: Path) -> None:
    """Write a lane's adapter in PEFT's format. By hand: PEFT would put its layers on the base once more to save them,
    which takes longer than a small job trains."""
    config = json.loads(lane.config) | {"base_model_name_or_path": lane.prepared.base.name, "inference_mode": True}
    tensors: dict[str, Tensor] = {}
    for path, part in lane.parts.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = part.a.detach().cpu().contiguous()
        tensors[f"base_model.model.{path}.lora_B.weight"] = part.b.detach().cpu().contiguous()
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
        save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})


class LaneLoop:
    """Trains lanes side by side on one base. The base's layers are its own again after `run`."""

    def __init__(self, causal_lm: Any, lanes: Sequence[Lane], device: torch.device, dtype: torch.dtype) -> None:
        self._lm = causal_lm
        self._lanes = lanes
        self._device = device
        self._dtype = dtype
        self._board = Board()
        self._loss = CausalLoss(causal_lm)
        self._optimizers = [build_optimizer(lane.named, lane.settings) for lane in lanes]
        self._peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in self._optimizers]

    def run(self) -> None:
        """Train every lane to its end. What goes wrong in one ends that one alone."""
        feeds = [lane.prepared.feed.steps(Position()) for lane in self._lanes]
        originals = self._install()
        self._lm.train()
        try:
            while live := [number for number, lane in enumerate(self._lanes) if lane.is_live]:
                self._step(live, feeds)
        finally:
            for path, original in originals.items():
                self._lm.set_submodule(path, original)

    def _install(self) -> dict[str, nn.Module]:
        paths = dict.fromkeys(path for lane in self._lanes for path in lane.parts)
        originals = {path: self._lm.get_submodule(path) for path in paths}
        for path, original in originals.items():
            parts = {number: lane.parts[path] for number, lane in enumerate(self._lanes) if path in lane.parts}
            self._lm.set_submodule(path, LaneLinear(original, parts, self._board))
        return originals

    def _step(self, live: Sequence[int], feeds: Sequence[Iterator[StepData]]) -> None:
        """One optimizer step of every live lane."""
        started = time.perf_counter()
        data = {number: next(feeds[number]) for number in live}
        rows = [row for number in live for row in data[number].rows]
        stops = torch.tensor([len(data[number].rows) for number in live]).cumsum(0).tolist()
        self._board.segments = [Segment(*entry) for entry in zip(live, [0, *stops], stops, strict=False)]
        pad_to = PAD_TO if self._device.type == "cuda" else 1
        batch = collate(rows, self._lanes[0].prepared.pad_id, pad_to=pad_to).to(self._device)
        learned = [num_learned(data[number].rows) for number in live]
        with nullcontext() if self._dtype is torch.float32 else torch.autocast(self._device.type, dtype=self._dtype):
            hidden = self._loss.hidden(batch.ids, batch.position_ids)
            parts = zip(batch.places.split(learned), batch.targets.split(learned), learned, strict=True)
            losses = [self._loss.at(hidden, places, targets) / count for places, targets, count in parts]
        torch.stack(losses).sum().backward()
        seconds = (time.perf_counter() - started) / batch.num_tokens
        for number, loss in zip(live, losses, strict=True):
            self._update(number, data[number], float(loss.detach()), seconds)

    def _update(self, number: int, data: StepData, loss: float, seconds_per_token: float) -> None:
        """A lane's own part of a step: what a run alone does with its gradients."""
        lane, optimizer = self._lanes[number], self._optimizers[number]
        settings, index = lane.settings, lane.progress.step
        factor = lr_factor(index, lane.prepared.num_steps, settings.warmup, settings.schedule, settings.final_lr)
        for group, peak in zip(optimizer.param_groups, self._peaks[number], strict=True):
            group["lr"] = peak * factor
        norm = float(
            torch.nn.utils.clip_grad_norm_(lane.named.values(), settings.max_grad_norm or math.inf, foreach=None)
        )
        if not (math.isfinite(loss) and math.isfinite(norm)):
            lane.error = f"the loss became {loss} at step {index + 1}; try a smaller learning rate"
            return
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        num_tokens = sum(len(example) for row in data.rows for example in row)
        step = Step(
            index=index,
            num_steps=lane.prepared.num_steps,
            epoch=data.epoch,
            loss=loss,
            num_learned=num_learned(data.rows),
            num_tokens=num_tokens,
            learning_rate=(settings.learning_rate or 0.0) * factor,
            grad_norm=norm,
            seconds=seconds_per_token * num_tokens,
        )
        lane.progress.step = index + 1
        lane.progress.add(step)
        lane.on_step(step)
