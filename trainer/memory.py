"""The memory of a training step, known before any of it is taken: the step is run on torch's fake tensors, which have
shapes and no contents, and the bytes that would be alive are counted operation by operation.

What a library takes inside an operation is not seen (a few MiB), nor what an allocator rounds up.
"""

import weakref
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.batches import Batch, Segments
from trainer.devices import choose_attention
from trainer.fused import fuse
from trainer.loss import CausalLoss
from trainer.methods.adapter import add_adapter, choose_targets, linear_layers
from trainer.methods.base import known_attention
from trainer.optim import choose_optimizer
from trainer.settings import Settings

OPTIMIZER_BYTES = {"adamw": 8.0, "paged_adamw": 8.0, "adamw_8bit": 2.04, "paged_adamw_8bit": 2.04}  # a weight
FOUR_BITS = {True: 0.5 + 1 / 64 + 4 / (64 * 256), False: 0.5 + 4 / 64}  # bytes a weight, by double quantization
SMALL = 4096  # weights: bitsandbytes keeps fp32 states for tensors below this


CRUDE = 400  # bytes of activations a token, layer and unit of width: far above any step's, where rows are not long


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes at the moment that most are held. `activations` are what the backward pass needs and what operations hold
    for a moment, of the body; `logits` those of the head and the loss."""

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of them."""
        parts = (self.weights, self.adapters, self.gradients, self.optimizer, self.activations, self.logits)
        return sum(parts)


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
    )
    split = found.weights + found.adapters + found.gradients + found.optimizer
    return found.total - split + split / num_shards > 0.9 * available


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
) -> Estimate:
    """Of a step on `rows` rows at once of `length` tokens, `learned` of which are learned, for the base at `path`."""
    lm = meta_model(path, settings, dtype, choose_attention(length, device))
    with FakeTensorMode(allow_non_fake_inputs=True):
        materialise(lm)
        return _count(lm, settings, rows, length, learned, dtype, device, checkpointing)


def _count(
    lm: Any,
    settings: Settings,
    rows: int,
    length: int,
    learned: int,
    dtype: torch.dtype,
    device: torch.device,
    checkpointing: bool,
) -> Estimate:
    trained = [p for p in lm.parameters() if p.requires_grad]
    adapters = 0 if settings.method == "full" else sum(_bytes(p) for p in trained)
    weights = sum(_bytes(p) for p in _unique(lm)) - adapters
    if checkpointing:
        checkpoint_layers(lm)
    lm.train()
    gradients = sum(_bytes(p) for p in trained)
    with (
        LiveBytes(not settings.packing) as live,
        torch.autocast("cpu", dtype=dtype, enabled=dtype is not torch.float32),
    ):
        batch = fake_batch(rows, length, learned, packed=settings.packing)
        fuses = device.type == "cuda" and dtype is torch.bfloat16 and settings.method != "full"
        fused = fuse(lm, tries=False)[0] if fuses else None
        loss = CausalLoss(lm, fused)
        if settings.packing:
            loss.require_positions()
        hidden = loss.hidden(batch.ids, batch.position_ids, batch.segments)
        body_held = live.now
        live.peak = live.now
        total = loss.at(hidden, batch.places, batch.targets)
        head_peak = live.peak - body_held
        forward_peak = live.peak
        del hidden
        live.peak = live.now
        total.backward()
        backward_peak = live.peak
    peak = max(forward_peak, backward_peak)  # gradients are among what is alive at the end of the backward pass
    logits = head_peak if forward_peak >= backward_peak else 0
    kind = choose_optimizer(settings, device)
    optimizer = sum(int(p.numel() * (8.0 if p.numel() < SMALL else OPTIMIZER_BYTES[kind])) for p in trained)
    held = min(gradients, peak)
    return Estimate(weights, adapters, held, optimizer, peak - logits - held, logits)


def meta_model(path: Path, settings: Settings, dtype: torch.dtype, attention: str) -> Any:
    """The model that a run would train, without contents."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path, local_files_only=True)
    attention = known_attention(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], attention)
    weights = torch.float32 if settings.method == "full" else dtype
    with torch.device("meta"):
        lm: Any = AutoModelForCausalLM.from_config(config, dtype=weights, attn_implementation=attention)  # type: ignore[no-untyped-call]
        lm.tie_weights()
        if settings.method != "full":
            lm.requires_grad_(False)
            if settings.method == "qlora":
                _quantize(lm, settings)
            add_adapter(lm, settings, choose_targets(linear_layers(lm), settings.target_modules))
    return lm


def materialise(lm: Any) -> None:
    """Put fake tensors on the CPU in place of those on `meta`, so that autocast and kernels' choices are the CPU's."""
    made: dict[int, Tensor] = {}
    for module in lm.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is None:
                    continue
                if id(old) not in made:
                    new: Tensor = torch.empty(old.shape, dtype=old.dtype)
                    made[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                    if hasattr(old, "logical_shape"):
                        made[id(old)].logical_shape = old.logical_shape  # type: ignore[attr-defined]
                        made[id(old)].quant_state = old.quant_state  # type: ignore[attr-defined]
                tensors[name] = made[id(old)]


def fake_batch(rows: int, length: int, learned: int, *, packed: bool) -> Batch:
    """A batch of that shape."""
    ids = torch.zeros(rows, length, dtype=torch.int64)
    places = torch.zeros(learned, dtype=torch.int64)
    segments = Segments(torch.zeros(2, dtype=torch.int32), length) if packed else None
    return Batch(ids, ids if packed else None, places, places, rows * length, segments)


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

    def _add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)

    def _remove(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


class _FourBitLinear(nn.Linear):
    """Stands for bitsandbytes's: half a byte a weight at rest, the whole weight in 16 bits while it is multiplied."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = _Dequantized.apply(x, self.weight)  # type: ignore[no-untyped-call]
        return result if self.bias is None else result + self.bias


class _Dequantized(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor) -> Tensor:
        ctx.save_for_backward(packed)
        whole = torch.empty(packed.logical_shape, dtype=x.dtype, device=x.device)  # type: ignore[attr-defined]
        return x @ whole.t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (packed,) = ctx.saved_tensors
        return grads[0] @ torch.empty(packed.logical_shape, dtype=grads[0].dtype, device=grads[0].device), None


def _quantize(lm: Any, settings: Settings) -> None:
    """Put 4-bit weights in place of those of the linear layers."""
    for path in linear_layers(lm):
        layer = lm.get_submodule(path)
        layer.__class__ = _FourBitLinear
        shape = tuple(layer.weight.shape)
        size = int(layer.weight.numel() * FOUR_BITS[settings.double_quantization])
        layer.weight = nn.Parameter(torch.empty(size, dtype=torch.uint8), requires_grad=False)
        layer.weight.logical_shape = shape
        layer.weight.quant_state = SimpleNamespace(shape=shape, dtype=lm.dtype)


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
