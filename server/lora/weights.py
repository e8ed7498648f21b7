"""An adapter's files as tensors ready for the pool. Runs off the step loop."""

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor

from adapters.content import content_digest
from adapters.errors import InvalidAdapter
from adapters.layout import AdapterHead, layout_of, read_head, read_layout
from adapters.validation import CONFIG_FILE, WEIGHTS_FILE, TensorEntry, opened, refuse
from server.base.spec import ModelSpec
from server.kernels import Scratch, reserve
from server.lora.pace import Pace

_RUN_ELEMENTS = 1 << 18  # packed at once: what stays in a core's cache, and takes less than a millisecond
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


@dataclass(frozen=True, slots=True)
class _Run:
    """One projection in neighbouring layers, `first` and on, that are packed alike. `a` and `b` say which of the file's
    tensors theirs are."""

    group: str
    slice: int
    rank: int
    scaling: float
    first: int
    a: list[int]
    b: list[int]


@dataclass(frozen=True, slots=True)
class _Plan:
    """How an adapter's file is packed: its tensors, in the order of the file, and what goes where."""

    entries: Sequence[TensorEntry]
    rank: int
    runs: Sequence[_Run]


def load_adapter(directory: Path, spec: ModelSpec, dtype: torch.dtype) -> PackedAdapter:
    """`AdapterLoader.load` for one adapter."""
    return AdapterLoader(spec, dtype).load(directory)


class AdapterLoader:
    """Reads, checks and packs adapters of one base, in page-locked memory with `pin`; safe from any thread. What
    computes keeps to `pace`; what waits for a disk does not. Memory that files are read into is used again, and what
    adapters with the same config and header have in common is worked out once.
    """

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, pin: bool = False, pace: Pace | None = None) -> None:
        self._spec, self._dtype, self._pin = spec, dtype, pin
        self._pace = pace or Pace()
        self._scratch = Scratch()
        self._plan = lru_cache(maxsize=8)(partial(_plan, spec))

    def load(self, directory: Path, identity: Identity | None = None) -> PackedAdapter:
        """A PEFT directory, packed. Raises InvalidAdapter or UnsupportedAdapter listing the faults; also when the bytes
        that were read, which are those that were checked, are not those of `identity`."""
        with opened(directory / CONFIG_FILE) as config_fd, opened(directory / WEIGHTS_FILE) as fd:
            head = read_head(config_fd, fd)
            # Whether an adapter without effect is wanted was decided when it was published; values are looked at below.
            with self._pace:
                plan = self._plan(head)
            with self._scratch.take(_data_bytes(plan.entries)) as data:
                _read_data(fd, plan.entries, data)
                packed, is_finite, digest = self._pack(plan, head, data, identity)
        if not is_finite:
            raise _not_finite(directory, self._spec, packed, self._dtype)
        if identity is not None and digest != identity.digest:  # last: other faults say more
            raise refuse(
                f"adapter {identity.digest}: the files in the store are not those that were published; "
                "`lorikeet adapters verify` says which, importing the adapter again mends them"
            )
        return packed

    def _pack(
        self, plan: _Plan, head: AdapterHead, data: Tensor, identity: Identity | None
    ) -> tuple[PackedAdapter, bool, str | None]:
        """The adapter, whether all of it is finite, and the digest of the bytes that it came from."""
        with self._pace, ThreadPoolExecutor(1, "adapter-hasher") as beside:
            hashing = beside.submit(_digest, identity.base_digest, head, data) if identity else None
            flat, packed = _allocate(self._spec, plan.rank, self._dtype, self._pin)
            _fill(packed, plan.runs, _split(data, plan.entries), self._pace)
            low, high = torch.aminmax(flat)  # NaN shows in both
            is_finite = bool(torch.isfinite(low) & torch.isfinite(high))
            return packed, is_finite, hashing.result() if hashing is not None else None


def _plan(spec: ModelSpec, head: AdapterHead) -> _Plan:
    """Raises InvalidAdapter or UnsupportedAdapter listing the faults."""
    layout = layout_of(head, spec.linears())
    entries = list(layout.tensors.values())
    place = {entry.name: number for number, entry in enumerate(entries)}
    runs: list[_Run] = []
    for group in linear_groups(spec):
        for s, (name, width) in enumerate(zip(group.modules, group.widths, strict=True)):
            before: object = None
            for layer in range(spec.num_layers):
                module = layout.modules.get(f"model.layers.{layer}.{name}")
                if module is None:
                    before = None
                    continue
                a, b = place[module.a_key], place[module.b_key]
                kind = module.rank, module.scaling, entries[a].dtype, entries[b].dtype
                size = module.rank * max(group.in_features, width)
                if kind != before or (len(runs[-1].a) + 1) * size > _RUN_ELEMENTS:
                    runs.append(_Run(group.name, s, module.rank, module.scaling, layer, [], []))
                before = kind
                runs[-1].a.append(a)
                runs[-1].b.append(b)
    return _Plan(entries, max(module.rank for module in layout.modules.values()), runs)


def read_tensors(fd: int, entries: Sequence[TensorEntry]) -> dict[str, Tensor]:
    """The tensors of an open safetensors file, whose entries lie one behind the other, by one read into private
    memory. Not mapped: a file cut short under a map ends the process. Raises InvalidAdapter if it is cut short."""
    data = reserve((_data_bytes(entries),), torch.uint8, torch.device("cpu"), is_sparse=False)
    _read_data(fd, entries, data)
    return _as_tensors(data, entries)


def _data_bytes(entries: Sequence[TensorEntry]) -> int:
    return entries[-1].stop - entries[0].start if entries else 0


def _read_data(fd: int, entries: Sequence[TensorEntry], data: Tensor) -> None:
    """All bytes after the header."""
    if entries:
        _read_into(fd, data.numpy().data, entries[0].start, entries)


def _as_tensors(data: Tensor, entries: Sequence[TensorEntry]) -> dict[str, Tensor]:
    return {entry.name: part.view(entry.shape) for entry, part in zip(entries, _split(data, entries), strict=True)}


def _split(data: Tensor, entries: Sequence[TensorEntry]) -> Sequence[Tensor]:
    """Each tensor's values, in one dimension."""
    dtypes = {entry.dtype for entry in entries}
    if len(dtypes) == 1:
        whole = data.view(_DTYPES[dtypes.pop()])
        return torch.split(whole, [math.prod(entry.shape) for entry in entries])
    pieces = data.split([entry.stop - entry.start for entry in entries])
    # A view needs its start aligned.
    return [piece.clone().view(_DTYPES[entry.dtype]) for piece, entry in zip(pieces, entries, strict=True)]


def _read_into(fd: int, buffer: memoryview, start: int, entries: Sequence[TensorEntry]) -> None:
    position = 0
    while position < len(buffer):  # one read takes 2 GiB at most
        count = os.preadv(fd, [buffer[position:]], start + position)
        if count == 0:
            name = next(entry.name for entry in entries if entry.stop > start + position)
            raise refuse(f"{name}: truncated while it was read")
        position += count


def _digest(base_digest: str, head: AdapterHead, data: Tensor) -> str:
    """The digest of what was read: the config, and the weights, which are their header and `data`."""
    weights = hashlib.sha256(head.weights.raw)
    weights.update(data.numpy().data)
    config = hashlib.sha256(head.config)
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


def _fill(packed: PackedAdapter, runs: Sequence[_Run], tensors: Sequence[Tensor], pace: Pace) -> None:
    """Copy every module's A [r, in] and scaled B [out, r] into rows [:r] of its a [rank, in] and b [rank, out]. The
    file's tensors stay as they are: they may still be being hashed."""
    for run in runs:
        layers = slice(run.first, run.first + len(run.a))
        to_a = packed.a[run.group][layers, : run.rank, run.slice]  # [n, r, in]
        to_b = packed.b[run.group][run.slice][layers, : run.rank]  # [n, r, out]
        to_a.copy_(torch.stack([tensors[number] for number in run.a]).view(to_a.shape))
        b = torch.stack([tensors[number] for number in run.b]).view(len(run.b), -1, run.rank)
        # Scaled in float32, or in the dtype that it stays in: rounded once.
        scaled = b.to(b.dtype if b.dtype == to_b.dtype else torch.float32).mul_(run.scaling)
        to_b.copy_(scaled.transpose(1, 2))
        pace.breathe()


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
