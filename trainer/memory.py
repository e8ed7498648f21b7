"""The memory of a training step, known before any of it is taken: the step is run on torch's fake tensors, which have
shapes and no contents, and the bytes that would be alive are counted operation by operation.

What a library takes inside an operation is not seen (a few MiB), nor what an allocator rounds up.
"""

import weakref
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.batches import Batch
from trainer.devices import choose_attention
from trainer.fake_model import fake_batch, materialise, meta_model
from trainer.fused import fuse
from trainer.loss import CausalLoss
from trainer.optim import choose_optimizer
from trainer.settings import Settings
from trainer.sharding import layers_of

OPTIMIZER_BYTES = {"adamw": 8.0, "paged_adamw": 8.0, "adamw_8bit": 2.04, "paged_adamw_8bit": 2.04}  # a weight
SMALL = 4096  # weights: bitsandbytes keeps fp32 states for tensors below this
CRUDE = 400  # bytes of activations a token, layer and unit of width: far above any step's, where rows are not long


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes of a device at the moment that most are held. `activations` are what the backward pass needs and what
    operations hold for a moment, of the body; `logits` those of the head and the loss; `gathered` what is there, of
    weights and gradients in shards, besides this device's own."""

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    gathered: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return sum(astuple(self))


@dataclass(frozen=True, slots=True)
class _Peaks:
    """Bytes alive at most, besides weights and optimizer: until the loss is known, of these the head's, and after."""

    forward: int
    head: int
    backward: int


def available_memory(device: torch.device) -> int:
    """Bytes that can be taken on `device` now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("/proc/meminfo says what is available")


def needs_checkpointing(
    path: Path,
    settings: Settings,
    config: dict[str, Any],
    length: int,
    dtype: torch.dtype,
    device: torch.device,
    available: int,
    num_shards: int = 1,
) -> bool:
    """Whether a step would not fit into nine tenths of `available` bytes without it. Rows are `length` tokens; weights
    and what belongs to them are split over `num_shards` devices."""
    if settings.gradient_checkpointing != "auto":
        return settings.gradient_checkpointing == "on"
    rows = settings.micro_batch or settings.batch_size
    size = config.get("num_hidden_layers", 100) * config.get("hidden_size", 10_000)
    if length <= 2048 and rows * length * size * CRUDE < available / 4:
        return False  # without a look: an estimate takes seconds
    found = estimate(
        path,
        settings,
        rows=rows,
        length=length,
        learned=rows * length,
        dtype=dtype,
        device=device,
        checkpointing=False,
        num_shards=num_shards,
    )
    return found.total > 0.9 * available


def estimate(
    path: Path,
    settings: Settings,
    *,
    rows: int,
    length: int,
    learned: int,
    dtype: torch.dtype,
    device: torch.device,
    checkpointing: bool,
    num_shards: int = 1,
) -> Estimate:
    """Of a step on `rows` rows at once of `length` tokens, `learned` of which are learned, for the base at `path`; on
    each of `num_shards` devices that have such rows of their own and a part of the weights."""
    lm = meta_model(path, settings, dtype, choose_attention(length, device))
    with FakeTensorMode(allow_non_fake_inputs=True):
        materialise(lm)
        if checkpointing:
            checkpoint_layers(lm)
        fuses = device.type == "cuda" and dtype is torch.bfloat16 and settings.method != "full" and num_shards == 1
        batch = fake_batch(rows, length, learned, packed=settings.packing)
        peaks = _measure(lm, batch, dtype, settings, fuses=fuses, num_shards=num_shards)
    return _add_up(lm, peaks, settings, choose_optimizer(settings, device), num_shards)


def _measure(lm: Any, batch: Batch, dtype: torch.dtype, settings: Settings, *, fuses: bool, num_shards: int) -> _Peaks:
    """What a pass forwards and backwards holds, of weights that are whole while they are needed."""
    lm.train()
    with (
        LiveBytes(not settings.packing) as live,
        torch.autocast("cpu", dtype=dtype, enabled=dtype is not torch.float32),
    ):
        for parameter in lm.parameters():
            if parameter.requires_grad and num_shards > 1:  # of its gradient a shard stays
                parameter.register_post_accumulate_grad_hook(lambda p: live.let_go(_bytes(p) * (1 - 1 / num_shards)))
        loss = CausalLoss(lm, fuse(lm, tries=False)[0] if fuses else None)
        if settings.packing:
            loss.require_positions()
        hidden = loss.hidden(batch.ids, batch.position_ids, batch.segments)
        body_held = live.now
        live.peak = live.now
        total = loss.at(hidden, batch.places, batch.targets)
        forward, head = live.peak, live.peak - body_held
        del hidden
        live.peak = live.now
        total.backward()
        return _Peaks(forward, head, live.peak)


def _add_up(lm: Any, peaks: _Peaks, settings: Settings, optimizer: str, num_shards: int) -> Estimate:
    """The parts, of weights of which each of `num_shards` devices has as much."""
    trained = [p for p in lm.parameters() if p.requires_grad]
    gradients = sum(map(_bytes, trained))
    adapters = 0 if settings.method == "full" else gradients
    weights = sum(map(_bytes, _unique(lm))) - adapters
    states = sum(int(p.numel() * (8.0 if p.numel() < SMALL else OPTIMIZER_BYTES[optimizer])) for p in trained)
    forward, backward = peaks.forward, peaks.backward  # gradients are among what is alive at the backward pass's end
    gathered = (0, 0)
    if num_shards > 1:
        layers = [sum(map(_bytes, layer.parameters())) for layer in layers_of(lm)]
        layer, rest = max(layers, default=0), sum(map(_bytes, lm.parameters())) - sum(layers)
        # forwards a layer and the next one; backwards also gradients on their way; at the end those of what is in none
        gathered = (rest + 2 * layer, rest + 3 * layer)
        if gradients // num_shards + 3 * rest + layer > backward + gathered[1] and settings.method == "full":
            backward, gathered = gradients // num_shards, (gathered[0], 3 * rest + layer)
    is_forward = forward + gathered[0] >= backward + gathered[1]
    peak = forward if is_forward else backward
    logits = peaks.head if is_forward else 0
    held = min(gradients // num_shards, peak - logits)
    return Estimate(
        weights // num_shards,
        adapters // num_shards,
        held,
        states // num_shards,
        peak - logits - held,
        logits,
        gathered[0] if is_forward else gathered[1],
    )


def checkpoint_layers(lm: Any) -> None:
    """Let each layer keep only its input, and compute the rest again in the backward pass."""
    lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations give, from when they are made until they are let go.

    Where a model asks for a value, and there are none, it hears `answer`: transformers asks only whether no row is
    packed.
    """

    def __init__(self, answer: bool = True) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._answer = answer
        self.now = 0
        self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return self._answer
        output = func(*args, **(kwargs or {}))
        given = {id(t.untyped_storage()) for t in _tensors((args, kwargs))}
        for tensor in _tensors(output):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if id(storage) in given or key in self._seen:
                continue
            self._seen.add(key)
            self._add(storage.nbytes())
            weakref.finalize(storage, self._remove, key, storage.nbytes())
        return output

    def let_go(self, size: float) -> None:
        """Count so many bytes less, of storages that stay."""
        self.now -= int(size)

    def _add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)

    def _remove(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def _unique(lm: Any) -> list[Tensor]:
    """Parameters and buffers, tied ones once."""
    return [*lm.parameters(), *lm.buffers()]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for part in value for tensor in _tensors(part)]
    if isinstance(value, dict):
        return [tensor for part in value.values() for tensor in _tensors(part)]
    return []
