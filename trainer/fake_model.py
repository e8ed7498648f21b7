"""Models without contents: the shapes and types of all that a run would hold, and nothing in them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from trainer.batches import Batch, Segments
from trainer.methods.adapter import add_adapter, choose_targets, linear_layers
from trainer.methods.base import read_causal_config
from trainer.settings import Settings

FOUR_BITS = {True: 0.5 + 1 / 64 + 4 / (64 * 256), False: 0.5 + 4 / 64}  # bytes a weight, by double quantization


def meta_model(path: Path, settings: Settings, dtype: torch.dtype, attention: str) -> Any:
    """The model that a run would train, without contents. Raises SettingsError for what is none."""
    from transformers import AutoModelForCausalLM

    config, attention = read_causal_config(path, attention)
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
