"""The checks of one adapter's files, which anyone may have written, made before anything is parsed in bulk.

Holds the limits, the reading of a safetensors header and the scan of its values. What the tensors mean to a
base model is in `adapters.layout`. Files are read, never mapped: one cut short under a map would end the process.
"""

import contextlib
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from adapters.errors import InvalidAdapter

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_CHUNK_BYTES = 1 << 20
_MAX_FAULT = 400  # characters
_MAX_DIMENSIONS = 8
_MAX_SIZE = 2**63 - 1
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
# dtype → (bytes, unsigned view, exponent bits: all set in NaN and infinity, all bits but the sign)
_DTYPES: dict[str, tuple[int, type[np.unsignedinteger[Any]], int, int]] = {
    "F32": (4, np.uint32, 0x7F80_0000, 0x7FFF_FFFF),
    "F16": (2, np.uint16, 0x7C00, 0x7FFF),
    "BF16": (2, np.uint16, 0x7F80, 0x7FFF),
}


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of what is read. All linear layers of a 126-layer model need 1,764 tensors and a 0.3 MiB header."""

    max_config_bytes: int = 1 << 20
    max_header_bytes: int = 1 << 20
    max_tensors: int = 16_384
    max_bytes: int = 8 << 30
    max_rank: int = 1024


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a safetensors file; its bytes are [start, stop) of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def refuse(*faults: str, kind: type[InvalidAdapter] = InvalidAdapter) -> InvalidAdapter:
    """The error for faults of an adapter: the first three and their number in the message, all of them in `faults`."""
    shown = [_shown(fault) for fault in faults]
    message = "; ".join(shown[:3])
    return kind(message if len(shown) <= 3 else f"{message}; … ({len(shown)} faults in all)", faults=shown)


def _shown(fault: str) -> str:
    """Names in a fault come from the file: on one line, of bounded length, and fit for a terminal."""
    short = fault if len(fault) <= _MAX_FAULT else f"{fault[:_MAX_FAULT]}…"
    return short if short.isprintable() else ascii(short)[1:-1]


def open_regular(path: Path) -> int:
    """A read-only descriptor of a regular file. Refuses links, devices, pipes, and what is missing or unreadable."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise refuse(_missing(path)) from None
    except OSError as error:
        if path.is_symlink():
            raise refuse(f"{path.name}: is a symbolic link; an adapter's files must be regular files") from None
        raise refuse(f"{path.name}: cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise refuse(f"{path.name}: is not a regular file")
    return fd


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """`open_regular` for a with block."""
    fd = open_regular(path)
    try:
        yield fd
    finally:
        os.close(fd)


def _missing(path: Path) -> str:
    pickled = path.with_name("adapter_model.bin")
    if path.name == WEIGHTS_FILE and pickled.exists():
        return (
            f"{pickled.name}: is a pickle, which can run code when read; "
            f"save the adapter again with safe_serialization=True to get {WEIGHTS_FILE}"
        )
    return f"{path.name}: not found in {path.parent}"


def read_json(fd: int, where: str, max_bytes: int) -> dict[str, Any]:
    """The JSON object in an open file, without doubled keys, NaN or infinity; `where` names it in the error."""
    return parse_json(read_bounded(fd, where, max_bytes), where)


def read_bounded(fd: int, where: str, max_bytes: int) -> bytes:
    """All of an open file."""
    size = os.fstat(fd).st_size
    if size > max_bytes:
        raise refuse(f"{where}: {size} bytes; at most {max_bytes} are taken")
    return os.pread(fd, size, 0)


def parse_json(raw: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `raw`; `where` names it in the error."""
    try:
        value = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite
        )
    except (ValueError, RecursionError) as error:  # JSON and UTF-8 errors are ValueErrors
        raise refuse(f"{where}: is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise refuse(f"{where}: is not a JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"key {name!r:.200} appears twice")
            seen.add(name)
    return found


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text:.40} is beyond any float")
    return value


def read_header(fd: int, limits: Limits) -> list[TensorEntry]:
    """The tensors of an open safetensors file, in file order, each checked against the format and the limits."""
    return parse_header(read_raw_header(fd, limits), limits)


@dataclass(frozen=True, slots=True)
class RawHeader:
    """All that precedes the data in a safetensors file, and the length of that file."""

    raw: bytes
    file_size: int


def read_raw_header(fd: int, limits: Limits) -> RawHeader:
    """Of an open file, which may be anything. Nothing is parsed."""
    size = os.fstat(fd).st_size
    if size > limits.max_bytes:
        raise refuse(f"{WEIGHTS_FILE}: {size} bytes; at most {limits.max_bytes} are taken")
    head = os.pread(fd, 64, 0)
    _refuse_other_formats(head, size)
    length = int.from_bytes(head[:8], "little")
    if length > limits.max_header_bytes:
        raise refuse(f"{WEIGHTS_FILE}: its header says {length} bytes; at most {limits.max_header_bytes} are taken")
    if 8 + length > size:
        raise refuse(f"{WEIGHTS_FILE}: truncated within its header ({size} bytes of {8 + length})")
    return RawHeader(os.pread(fd, 8 + length, 0), size)


def parse_header(header: RawHeader, limits: Limits) -> list[TensorEntry]:
    """The tensors that a header names, as `read_header`."""
    described = parse_json(header.raw[8:], f"{WEIGHTS_FILE}: header")
    metadata = described.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise refuse(f"{WEIGHTS_FILE}: __metadata__ must map strings to strings")
    if len(described) > limits.max_tensors:
        raise refuse(f"{WEIGHTS_FILE}: {len(described)} tensors; at most {limits.max_tensors} are taken")
    return _entries(described, data_start=len(header.raw), file_size=header.file_size)


def _refuse_other_formats(head: bytes, size: int) -> None:
    if size < 8:
        raise refuse(f"{WEIGHTS_FILE}: truncated: {size} bytes are no safetensors file")
    if head.startswith(b"version https://git-lfs"):
        raise refuse(f"{WEIGHTS_FILE}: is a Git LFS pointer; fetch the file itself (git lfs pull)")
    zipped = head.startswith(b"PK\x03\x04")  # torch.save
    if zipped or (head[0] == 0x80 and head[1] <= 5 and head[8:9] != b"{"):
        raise refuse(
            f"{WEIGHTS_FILE}: holds a pickle, which can run code when read; "
            "save the adapter again with safe_serialization=True"
        )


def _entries(header: Mapping[str, Any], data_start: int, file_size: int) -> list[TensorEntry]:
    faults: list[str] = []
    entries: list[TensorEntry] = []
    for name, description in header.items():
        entry = _entry(name, description, data_start)
        if isinstance(entry, str):
            faults.append(f"{name}: {entry}")
        else:
            entries.append(entry)
    if faults:
        raise refuse(*faults)
    entries.sort(key=lambda entry: (entry.start, entry.stop))
    end = data_start
    for entry in entries:
        if entry.start != end:
            raise refuse(f"{entry.name}: its data_offsets overlap another tensor's or leave a gap")
        end = entry.stop
    if end > file_size:
        raise refuse(f"{WEIGHTS_FILE}: truncated: its tensors end at byte {end}, the file at {file_size}")
    if end < file_size:
        raise refuse(f"{WEIGHTS_FILE}: {file_size - end} bytes after its last tensor")
    return entries


def _entry(name: str, description: Any, data_start: int) -> TensorEntry | str:
    """The entry, or what is wrong with it."""
    if not isinstance(description, dict) or description.keys() != _ENTRY_KEYS:
        return "its header entry must hold dtype, shape and data_offsets"
    dtype, shape, offsets = description["dtype"], description["shape"], description["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        return f"dtype {dtype!r:.80} is not supported; supported are {', '.join(_DTYPES)}"
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        return "shape and data_offsets must be lists of non-negative 64-bit integers, at most 8 of them"
    start, stop = offsets
    if stop - start != math.prod(shape) * _DTYPES[dtype][0]:
        return f"its data_offsets span {stop - start} bytes, which is not {dtype} of shape {shape}"
    return TensorEntry(name, dtype, tuple(shape), data_start + start, data_start + stop)


def _sizes(value: Any) -> bool:
    """Bounded in length and size: the product of a header full of large integers would take minutes."""
    if type(value) is not list or len(value) > _MAX_DIMENSIONS:
        return False
    for item in value:  # noqa: SIM110  (a generator costs more than the checks)
        if type(item) is not int or not 0 <= item <= _MAX_SIZE:
            return False
    return True


def common_dtype(dtypes: set[str]) -> str:
    """The narrowest supported dtype that holds values of all of `dtypes` exactly."""
    return next(iter(dtypes)) if len(dtypes) == 1 else "F32"


@dataclass(frozen=True, slots=True)
class Scan:
    """What the values of a tensor are like; `first_bad` is the flat index of the first NaN or infinity."""

    is_zero: bool
    first_bad: int | None


def scan(fd: int, entry: TensorEntry) -> Scan:
    """Reads every value of a tensor once, in bounded memory."""
    itemsize, view, exponent, magnitude = _DTYPES[entry.dtype]
    buffer = bytearray(min(_CHUNK_BYTES, entry.stop - entry.start))
    is_zero, position = True, entry.start
    while position < entry.stop:
        count = os.preadv(fd, [memoryview(buffer)[: entry.stop - position]], position)
        count -= count % itemsize
        if count <= 0:
            raise refuse(f"{entry.name}: truncated while it was read")
        # Without the sign, the bits of a float order as integers: the largest tells of zeros and NaN alike.
        bits = np.frombuffer(buffer, dtype=view, count=count // itemsize) & magnitude
        largest = int(bits.max())
        if largest >= exponent:
            first = int((bits >= exponent).argmax())
            return Scan(is_zero=False, first_bad=(position - entry.start) // itemsize + first)
        is_zero = is_zero and largest == 0
        position += count
    return Scan(is_zero=is_zero, first_bad=None)
