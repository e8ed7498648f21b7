"""An adapter's files as tensors ready for the pool. Runs off the step loop."""

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from adapters.content import content_digest
from adapters.errors import InvalidAdapter
from adapters.layout import AdapterLayout, LoraModule, read_layout
from adapters.validation import CONFIG_FILE, WEIGHTS_FILE, TensorEntry, opened, refuse
from server.base.spec import ModelSpec
from server.kernels import Scratch, reserve
from server.lora.pace import Pace

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

    @property
    def num_bytes(self) -> int:
        tensors = [*self.a.values(), *(tensor for slices in self.b.values() for tensor in slices)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass(frozen=True, slots=True)
class Identity:
    """What an adapter's files have to amount to: the version `digest`, made for a base."""

    digest: str
    base_digest: str


def load_adapter(
    directory: Path,
    spec: ModelSpec,
    dtype: torch.dtype,
    identity: Identity | None = None,
    pin: bool = False,
    pace: Pace | None = None,
    scratch: Scratch | None = None,
) -> PackedAdapter:
    """Read, check and pack a PEFT directory, in page-locked memory with `pin`. Raises InvalidAdapter or
    UnsupportedAdapter listing the faults; also when the bytes that were read are not those of `identity`. What
    computes keeps to `pace`; what waits for a disk does not. Files are read into `scratch`.
    """
    pace, scratch = pace or Pace(), scratch or Scratch()
    with pace:
        # Whether an adapter without effect is wanted was decided when it was published; values are looked at below.
        layout = read_layout(directory, spec.linears(), allow_zero=True, scan_values=False)
    entries = list(layout.tensors.values())
    rank = max(module.rank for module in layout.modules.values())
    with scratch.take(_data_bytes(entries)) as data:
        with opened(directory / WEIGHTS_FILE) as fd:
            _read_data(fd, entries, data)
            header = _read_header_bytes(fd, entries)
        with pace, ThreadPoolExecutor(1, "adapter-hasher") as beside:
            hashing = beside.submit(_digest, identity.base_digest, directory, header, data) if identity else None
            flat, packed = _allocate(spec, rank, dtype, pin)
            _fill(packed, spec, layout, _as_tensors(data, entries), pace)
            low, high = torch.aminmax(flat)  # NaN shows in both
            digest = hashing.result() if hashing is not None else None
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        raise _not_finite(directory, spec, packed, dtype)
    if identity is not None and digest != identity.digest:  # last: other faults say more
        raise refuse(
            f"adapter {identity.digest}: the files in the store are not those that were published; "
            "`lorikeet adapters verify` says which, importing the adapter again mends them"
        )
    return packed


def read_tensors(fd: int, entries: Sequence[TensorEntry]) -> dict[str, Tensor]:
    """The tensors of an open safetensors file, whose entries lie one behind the other, by one read into private
    memory. Not mapped: a file cut short under a map ends the process. Raises InvalidAdapter if it is cut short."""
    data = torch.empty(_data_bytes(entries), dtype=torch.uint8)
    _read_data(fd, entries, data)
    return _as_tensors(data, entries)


def _data_bytes(entries: Sequence[TensorEntry]) -> int:
    return entries[-1].stop - entries[0].start if entries else 0


def _read_data(fd: int, entries: Sequence[TensorEntry], data: Tensor) -> None:
    """All bytes after the header."""
    if entries:
        _read_into(fd, data.numpy().data, entries[0].start, entries)


def _read_header_bytes(fd: int, entries: Sequence[TensorEntry]) -> bytes:
    """All bytes before the data, and so the whole of a file without tensors."""
    return os.pread(fd, entries[0].start if entries else os.fstat(fd).st_size, 0)


def _as_tensors(data: Tensor, entries: Sequence[TensorEntry]) -> dict[str, Tensor]:
    dtypes = {entry.dtype for entry in entries}
    if len(dtypes) == 1:
        whole = data.view(_DTYPES[dtypes.pop()])
        parts = whole.split([math.prod(entry.shape) for entry in entries])
    else:  # a view needs its start aligned
        pieces = data.split([entry.stop - entry.start for entry in entries])
        parts = tuple(piece.clone().view(_DTYPES[entry.dtype]) for piece, entry in zip(pieces, entries, strict=True))
    return {entry.name: part.view(entry.shape) for entry, part in zip(entries, parts, strict=True)}


def _read_into(fd: int, buffer: memoryview, start: int, entries: Sequence[TensorEntry]) -> None:
    position = 0
    while position < len(buffer):  # one read takes 2 GiB at most
        count = os.preadv(fd, [buffer[position:]], start + position)
        if count == 0:
            name = next(entry.name for entry in entries if entry.stop > start + position)
            raise refuse(f"{name}: truncated while it was read")
        position += count


def _digest(base_digest: str, directory: Path, header: bytes, data: Tensor) -> str:
    """The digest of what was read: the weights, which are `header` and `data`, and the config."""
    weights = hashlib.sha256(header)
    weights.update(data.numpy().data)
    config = hashlib.sha256((directory / CONFIG_FILE).read_bytes())
    return content_digest(base_digest, {CONFIG_FILE: config.hexdigest(), WEIGHTS_FILE: weights.hexdigest()})


def _allocate(spec: ModelSpec, rank: int, dtype: torch.dtype, pin: bool) -> tuple[Tensor, PackedAdapter]:
    """All of an adapter's memory as one tensor of zeros, and the parts of it."""
    groups = linear_groups(spec)
    rows = spec.num_layers * rank
    sizes = [rows * width for g in groups for width in (len(g.modules) * g.in_features, *g.widths)]
    if pin:
        flat = torch.zeros(sum(sizes), dtype=dtype, pin_memory=True)
    else:
        flat = reserve((sum(sizes),), dtype, torch.device("cpu"), is_sparse=False)
    parts = iter(flat.split(sizes))
    a: dict[str, Tensor] = {}
    b: dict[str, tuple[Tensor, ...]] = {}
    for g in groups:
        a[g.name] = next(parts).view(spec.num_layers, rank, len(g.modules), g.in_features)
        b[g.name] = tuple(next(parts).view(spec.num_layers, rank, width) for width in g.widths)
    return flat, PackedAdapter(rank, a, b)


def _fill(
    packed: PackedAdapter, spec: ModelSpec, layout: AdapterLayout, tensors: Mapping[str, Tensor], pace: Pace
) -> None:
    """Copy every module's A [r, in] and scaled B [out, r] into rows [:r] of its a [rank, in] and b [rank, out]. The
    file's tensors stay as they are: they may still be being hashed."""
    for group in linear_groups(spec):
        for s, name in enumerate(group.modules):
            rows_a, rows_b = packed.a[group.name][:, :, s].unbind(0), packed.b[group.name][s].unbind(0)
            from_a, from_b, to_a, to_b, scalings = [], [], [], [], []
            for layer, (a, b) in enumerate(zip(rows_a, rows_b, strict=True)):
                module = layout.modules.get(f"model.layers.{layer}.{name}")
                if module is None:
                    continue
                rank = module.rank
                from_a.append(_tensor(tensors, module.a_key, (rank, a.shape[1])))
                # Scaled in float32, or in the dtype that it stays in: rounded once.
                file_b = _tensor(tensors, module.b_key, (b.shape[1], rank)).t()
                from_b.append(file_b.to(_scaling_dtype(tensors, module, b)))
                to_a.append(a if rank == packed.rank else a[:rank])
                to_b.append(b if rank == packed.rank else b[:rank])
                scalings.append(module.scaling)
            if from_a:
                torch._foreach_copy_(to_a + to_b, from_a + list(torch._foreach_mul(from_b, scalings)))
            pace.breathe()


def _scaling_dtype(tensors: Mapping[str, Tensor], module: LoraModule, target: Tensor) -> torch.dtype:
    return target.dtype if tensors[module.b_key].dtype == target.dtype else torch.float32


def _tensor(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, int]) -> Tensor:
    """Raises InvalidAdapter if the file is no longer what was checked."""
    tensor = tensors.get(name)
    if tensor is None or tensor.shape != shape:
        raise refuse(f"{name}: changed while it was read")
    return tensor


def _not_finite(directory: Path, spec: ModelSpec, packed: PackedAdapter, dtype: torch.dtype) -> InvalidAdapter:
    """Why: NaN or infinity in the files, or values that narrowing to float16, or the scaling, made too large."""
    try:
        read_layout(directory, spec.linears(), allow_zero=True)
    except InvalidAdapter as error:
        return error
    found = [name for name in packed.a if not all(bool(t.isfinite().all()) for t in (packed.a[name], *packed.b[name]))]
    return InvalidAdapter(
        f"{directory}: values overflow {dtype} once scaled, in {', '.join(found)}; use bfloat16 or float32",
        faults=[f"{name}: not finite in {dtype}" for name in found],
    )
