"""Which tensors of an adapter belong to which layers of the base, established by checking everything.

`layout_of` is the one gate: publishing and loading both go through it. With the values looked at, what it returns can
be served as it is; whatever could make the result silently wrong raises, with all faults listed.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from adapters.errors import UnsupportedAdapter
from adapters.patterns import UnsafePattern
from adapters.peft_config import EMBEDDINGS, LoraSettings, parse_settings, unsupported_settings
from adapters.validation import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Limits,
    RawHeader,
    TensorEntry,
    common_dtype,
    opened,
    parse_header,
    parse_json,
    read_bounded,
    read_raw_header,
    refuse,
    scan,
)

__all__ = ["AdapterHead", "AdapterLayout", "Limits", "LoraModule", "layout_of", "read_head", "read_layout"]

_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class LoraModule:
    """The adaptation of one linear layer: y += scaling · (x @ Aᵀ) @ Bᵀ, with A [rank, in] and B [out, rank].

    `a_key` and `b_key` are the tensors' names in adapter_model.safetensors.
    """

    rank: int
    scaling: float
    a_key: str
    b_key: str


@dataclass(frozen=True, slots=True)
class AdapterLayout:
    """Module path in the base ("model.layers.0.self_attn.q_proj") → its LoraModule, in the base's order.

    `dtype` is the safetensors dtype of the tensors ("F32", "F16", "BF16"); "F32" where they are mixed. `tensors` says
    where each lies in the file.
    """

    modules: Mapping[str, LoraModule]
    dtype: str
    tensors: Mapping[str, TensorEntry] = field(repr=False)


@dataclass(frozen=True, slots=True)
class AdapterHead:
    """All that a layout follows from: the config, and the header of the weights with the length of their file."""

    config: bytes
    weights: RawHeader


def read_head(config_fd: int, weights_fd: int, limits: Limits = Limits()) -> AdapterHead:  # noqa: B008  (frozen)
    """The head of an adapter's open files. Nothing is parsed. Raises InvalidAdapter where a limit is passed."""
    config = read_bounded(config_fd, CONFIG_FILE, limits.max_config_bytes)
    return AdapterHead(config, read_raw_header(weights_fd, limits))


def read_layout(
    directory: Path,
    linears: Mapping[str, tuple[int, int]],
    limits: Limits = Limits(),  # noqa: B008  (frozen)
    *,
    allow_zero: bool = False,
) -> AdapterLayout:
    """Check an adapter's directory against a base and say where each tensor goes. Reads every byte once.

    `linears` are the base's linear layers: path → (out_features, in_features). `allow_zero` takes an adapter
    that changes nothing (its B, A or scaling is zero everywhere). Raises InvalidAdapter, or UnsupportedAdapter when
    the files are well formed and ask for what is not honoured.
    """
    with opened(directory / CONFIG_FILE) as config_fd, opened(directory / WEIGHTS_FILE) as fd:
        layout = layout_of(read_head(config_fd, fd, limits), linears, limits)
        _check_values(fd, layout.modules, layout.tensors, allow_zero)
    return layout


def layout_of(
    head: AdapterHead,
    linears: Mapping[str, tuple[int, int]],
    limits: Limits = Limits(),  # noqa: B008  (frozen)
) -> AdapterLayout:
    """All of `read_layout` but the values, which are for the caller to look at."""
    config = parse_json(head.config, CONFIG_FILE)
    entries = {entry.name: entry for entry in parse_header(head.weights, limits)}
    unsupported = unsupported_settings(config)
    settings = parse_settings(config, limits.max_rank) if not unsupported else None
    if isinstance(settings, LoraSettings):
        unsupported += [
            f"{CONFIG_FILE}: target_modules takes in {path}, and adapters of embeddings are not supported"
            for path in _targets(settings, EMBEDDINGS)
        ]
    unsupported += [f"{name}: {kind} is not supported" for name in entries if (kind := _unsupported_kind(name))]
    if unsupported:
        raise refuse(*unsupported, kind=UnsupportedAdapter)
    if not isinstance(settings, LoraSettings):
        raise refuse(*(settings or ()))
    modules = _bind(settings, entries, linears)
    dtype = common_dtype({entry.dtype for entry in entries.values()})
    return AdapterLayout(modules=modules, dtype=dtype, tensors=entries)


def _targets(settings: LoraSettings, modules: Iterable[str]) -> dict[str, tuple[int, float]]:
    try:
        return settings.targets(modules)
    except UnsafePattern as error:
        raise refuse(f"{CONFIG_FILE}: the patterns of target_modules, rank_pattern or alpha_pattern: {error}") from None


def _unsupported_kind(name: str) -> str:
    """What a tensor is, if it is a kind of PEFT's that is not honoured; else the empty string."""
    if ".lora_magnitude_vector" in name:
        return "a DoRA magnitude"
    if ".lora_embedding_" in name or any(name.startswith(f"{_PREFIX}{path}.") for path in EMBEDDINGS):
        return "an adapted or saved embedding"
    if name.endswith((".lora_A.bias", ".lora_B.bias")):
        return "a bias of LoRA"
    if name.endswith(".bias"):
        return "a trained bias"
    return ""


def _bind(
    settings: LoraSettings, entries: Mapping[str, TensorEntry], linears: Mapping[str, tuple[int, int]]
) -> dict[str, LoraModule]:
    """A LoraModule for each layer that the config adapts, with every tensor of the file used exactly once."""
    modules: dict[str, LoraModule] = {}
    faults: list[str] = []
    unbound = dict(entries)
    for path, (rank, scaling) in _targets(settings, linears).items():
        out_features, in_features = linears[path]
        keys = f"{_PREFIX}{path}.lora_A.weight", f"{_PREFIX}{path}.lora_B.weight"
        modules[path] = LoraModule(rank, scaling, *keys)
        for key, shape in zip(keys, ((rank, in_features), (out_features, rank)), strict=True):
            entry = unbound.pop(key, None)
            if entry is None:
                faults.append(f"{key}: missing; {CONFIG_FILE} adapts {path}")
            elif entry.shape != shape:
                faults.append(f"{key}: has shape {list(entry.shape)}; rank {rank} on {path} needs {list(shape)}")
    faults += [f"{name}: {_why_unbound(name, linears)}" for name in unbound]
    if not modules:
        faults.insert(0, f"{CONFIG_FILE}: target_modules matches no linear layer of the base")
    if faults:
        raise refuse(*faults)
    return modules


def _why_unbound(name: str, linears: Mapping[str, tuple[int, int]]) -> str:
    path = name.removeprefix(_PREFIX).removesuffix(".weight").removesuffix(".lora_A").removesuffix(".lora_B")
    if path not in linears:
        return "belongs to no linear layer of the base"
    if name not in (f"{_PREFIX}{path}.lora_A.weight", f"{_PREFIX}{path}.lora_B.weight"):
        return f"is not lora_A.weight or lora_B.weight of {path}"
    return f"{CONFIG_FILE} does not adapt {path}"


def _check_values(
    fd: int, modules: Mapping[str, LoraModule], entries: Mapping[str, TensorEntry], allow_zero: bool
) -> None:
    faults: list[str] = []
    has_effect = False
    for module in modules.values():
        scans = {key: scan(fd, entries[key]) for key in (module.a_key, module.b_key)}
        faults += [
            f"{key}: holds NaN or infinity (first at element {found.first_bad})"
            for key, found in scans.items()
            if found.first_bad is not None
        ]
        has_effect = has_effect or (module.scaling != 0 and not any(found.is_zero for found in scans.values()))
    if faults:
        raise refuse(*faults)
    if not has_effect and not allow_zero:
        raise refuse(f"{WEIGHTS_FILE}: changes nothing: lora_A or lora_B is zero in every layer (was it trained?)")
