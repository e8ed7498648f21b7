"""An adapter's files as tensors ready for the pool. Runs off the step loop."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from adapters.errors import InvalidAdapter
from adapters.layout import Limits, LoraModule, read_layout
from adapters.validation import WEIGHTS_FILE, opened, read_header, refuse
from server.base.spec import ModelSpec

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class LinearGroup:
    """Projections computed as one product: they share an input of `in_features`, `widths` are their outputs."""

    name: str
    modules: tuple[str, ...]
    in_features: int
    widths: tuple[int, ...]


def linear_groups(spec: ModelSpec) -> tuple[LinearGroup, ...]:
    """The four products of a decoder layer."""
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    hidden, inter = spec.hidden_size, spec.intermediate_size
    return (
        LinearGroup("qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), hidden, (q, kv, kv)),
        LinearGroup("o", ("self_attn.o_proj",), q, (hidden,)),
        LinearGroup("gate_up", ("mlp.gate_proj", "mlp.up_proj"), hidden, (inter, inter)),
        LinearGroup("down", ("mlp.down_proj",), inter, (hidden,)),
    )


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """An adapter of `rank` (its largest) in the pool's layout, on the host.

    a[group]     [layers, rank, slices, in]
    b[group][s]  [layers, rank, out_s], scaling multiplied in
    Projections that the adapter does not change, and rows past a module's own rank, are zero.
    """

    rank: int
    a: Mapping[str, Tensor]
    b: Mapping[str, tuple[Tensor, ...]]


def load_adapter(directory: Path, spec: ModelSpec, dtype: torch.dtype) -> PackedAdapter:
    """Read, check and pack a PEFT directory. Raises InvalidAdapter or UnsupportedAdapter listing the faults."""
    # Whether an adapter without effect is wanted was decided when it was published.
    layout = read_layout(directory, spec.linears(), allow_zero=True)
    rank = max(module.rank for module in layout.modules.values())
    a: dict[str, Tensor] = {}
    b: dict[str, tuple[Tensor, ...]] = {}
    with opened(directory / WEIGHTS_FILE) as fd:
        file = TensorFile(fd)
        for group in linear_groups(spec):
            slices = len(group.modules)
            group_a = torch.zeros(spec.num_layers, rank, slices, group.in_features, dtype=dtype)
            group_b = tuple(torch.zeros(spec.num_layers, rank, width, dtype=dtype) for width in group.widths)
            for layer in range(spec.num_layers):
                for s, name in enumerate(group.modules):
                    module = layout.modules.get(f"model.layers.{layer}.{name}")
                    if module is not None:
                        _pack(file, module, group_a[layer, :, s], group_b[s][layer])
            a[group.name], b[group.name] = group_a, group_b
    _check_finite(directory, dtype, a, b)
    return PackedAdapter(rank, a, b)


class TensorFile:
    """The tensors of an open safetensors file, read and not mapped: one cut short under a map ends the process."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._entries = {entry.name: entry for entry in read_header(fd, Limits())}

    def tensor(self, name: str, shape: tuple[int, int]) -> Tensor:
        """Raises InvalidAdapter if the file is no longer what was checked."""
        entry = self._entries.get(name)
        if entry is None or entry.shape != shape:
            raise refuse(f"{name}: changed while it was read")
        data = memoryview(bytearray(entry.stop - entry.start))
        position = 0
        while position < len(data):  # one read takes 2 GiB at most
            count = os.preadv(self._fd, [data[position:]], entry.start + position)
            if count == 0:
                raise refuse(f"{name}: truncated while it was read")
            position += count
        return torch.frombuffer(data, dtype=_DTYPES[entry.dtype]).view(shape)


def _pack(file: TensorFile, module: LoraModule, a: Tensor, b: Tensor) -> None:
    """Copy one module's A [r, in] and B [out, r] into rows [:r] of a [rank, in] and b [rank, out]."""
    rank = module.rank
    a[:rank] = file.tensor(module.a_key, (rank, a.shape[1]))
    # Scaled in float32, so that a scaling that is no power of two is rounded once.
    b[:rank] = (file.tensor(module.b_key, (b.shape[1], rank)).float() * module.scaling).t()


def _check_finite(
    directory: Path, dtype: torch.dtype, a: Mapping[str, Tensor], b: Mapping[str, tuple[Tensor, ...]]
) -> None:
    """The files are finite, but narrowing to float16, or the scaling, may overflow."""
    overflowed = [name for name in a if not all(bool(torch.isfinite(tensor).all()) for tensor in (a[name], *b[name]))]
    if overflowed:
        raise InvalidAdapter(
            f"{directory}: values overflow {dtype} once scaled, in {', '.join(overflowed)}; use bfloat16 or float32",
            faults=[f"{name}: not finite in {dtype}" for name in overflowed],
        )
