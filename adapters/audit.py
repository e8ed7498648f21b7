"""Looking at what a store holds again: every byte against its digest, every tensor against the base."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from adapters.errors import AdapterNotFound, InvalidAdapter, LorikeetError, StoreUnavailable
from adapters.layout import Limits, read_layout
from adapters.stores import Store
from adapters.validation import WEIGHTS_FILE, opened, read_header
from adapters.versions import Version

_FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


@dataclass(frozen=True, slots=True)
class CheckedBase:
    """A base at hand: its digest, and its linear layers, path → (out_features, in_features)."""

    digest: str
    linears: Mapping[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found of a version; `digest` None stands for the name's record. `faults` is empty when all is well.

    `against_base` is whether its tensors were held against the base's layers, and not only against each other.
    """

    name: str
    digest: str | None
    faults: tuple[str, ...]
    against_base: bool


def audit(store: Store, name: str | None, base: CheckedBase | None) -> Iterator[Finding]:
    """A finding for each version of a name, or of all names, in the order of publication; one for each bad record.

    Versions that were not made for `base` are checked without a base. Raises AdapterNotFound for `name`,
    StoreUnavailable when a remote store is away.
    """
    known: dict[str, tuple[tuple[str, ...], bool]] = {}
    for each in store.names() if name is None else [name]:
        try:
            record = store.record(each)
        except AdapterNotFound:
            if name is not None:
                raise
            continue  # removed since the names were read
        except StoreUnavailable as error:
            if _is_away(error):
                raise
            yield Finding(each, None, (error.message,), against_base=False)
            continue
        for digest in record.versions:
            if digest not in known:
                try:
                    version = store.version(record, digest)
                except LorikeetError as error:
                    if _is_away(error):
                        raise
                    known[digest] = (_lines(error), False)
                else:
                    known[digest] = _check(store, version, base)
            yield Finding(each, digest, *known[digest])


def _check(store: Store, version: Version, base: CheckedBase | None) -> tuple[tuple[str, ...], bool]:
    """The faults of a version, and whether the base's layers were looked at."""
    fits = base is not None and base.digest == version.manifest.base_digest
    faults: list[str] = []
    try:
        store.verify(version)
    except InvalidAdapter as error:
        faults += _lines(error)
    try:
        with_files = store.fetch(version.digest)
        linears = base.linears if base is not None and fits else _own_linears(with_files)
        layout = read_layout(with_files, linears, allow_zero=True)
    except LorikeetError as error:
        if _is_away(error):
            raise
        faults += [fault for fault in _lines(error) if fault not in faults]
    else:
        ranks = tuple(sorted({module.rank for module in layout.modules.values()}))
        if (ranks, layout.dtype) != (version.manifest.ranks, version.manifest.dtype):
            faults.append(f"manifest.json: says ranks and dtype other than {list(ranks)} and {layout.dtype}")
    return tuple(faults), fits


def _own_linears(directory: Path) -> dict[str, tuple[int, int]]:
    """The layers that the adapter's own tensors imply."""
    outs: dict[str, int] = {}
    ins: dict[str, int] = {}
    with opened(directory / WEIGHTS_FILE) as fd:
        for entry in read_header(fd, Limits()):
            if (match := _FACTOR.fullmatch(entry.name)) and len(entry.shape) == 2:
                if match[2] == "A":
                    ins[match[1]] = entry.shape[1]
                else:
                    outs[match[1]] = entry.shape[0]
    return {path: (outs[path], ins[path]) for path in ins if path in outs}


def _lines(error: LorikeetError) -> tuple[str, ...]:
    return error.faults if isinstance(error, InvalidAdapter) and error.faults else (error.message,)


def _is_away(error: LorikeetError) -> bool:
    """Whether trying again later can help; a damaged file stays damaged."""
    return isinstance(error, StoreUnavailable) and error.retry_after is not None
