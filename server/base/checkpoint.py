"""A base model's directory: which files it must hold, and a digest over what they say.

Reads headers and bytes only; tensors are the loader's (`server.model`).
"""

import contextlib
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from server.base.cache import write_whole
from server.base.origin import Origin, read_origin
from server.base.spec import ModelSpec
from server.errors import BaseModelError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def read_config(directory: Path) -> dict[str, Any]:
    """`config.json`. Raises BaseModelError."""
    path = directory / "config.json"
    if not path.is_file():
        raise BaseModelError(f"{directory}: no config.json; a base model is a Hugging Face model directory")
    return _read_json(path)


def read_spec(directory: Path) -> ModelSpec:
    """The model's shape from `config.json`. Raises BaseModelError (broken file) or UnsupportedModel."""
    path = directory / "config.json"
    config = read_config(directory)
    try:
        return ModelSpec.from_config(config)
    except KeyError as error:
        raise BaseModelError(f"{path}: {error.args[0]} is missing") from error
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise BaseModelError(f"{path}: a field has a value of the wrong kind ({error})") from error


def weight_files(directory: Path) -> tuple[Path, ...]:
    """The safetensors files with the weights, sorted by name. Raises BaseModelError naming what is missing or cut."""
    index = directory / INDEX
    if index.is_file():
        shards = _read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise BaseModelError(f"{index}: weight_map is missing or empty")
        names = sorted({str(name) for name in shards.values()})
        if strange := [name for name in names if Path(name).name != name]:
            raise BaseModelError(f"{index}: {strange[0]!r} is not a file name")
    elif (directory / SINGLE).is_file():
        names = [SINGLE]
    else:
        raise BaseModelError(_no_weights(directory))
    if missing := [name for name in names if not (directory / name).is_file()]:
        raise BaseModelError(
            f"{directory}: {len(missing)} of {len(names)} weight files are missing, first {missing[0]}"
        )
    files = tuple(directory / name for name in names)
    for file in files:
        _header(file)
    return files


def tensor_headers(directory: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Each tensor's dtype, as safetensors names it, and shape. Raises BaseModelError as `weight_files` does."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in weight_files(directory):
        found |= _header(file)
    return found


def checkpoint_digest(spec: ModelSpec, files: tuple[Path, ...], cache: Path, progress: Callable[[str], None]) -> str:
    """Return `sha256:…` over the spec and every weight file's own sha256, in the order of their names.

    The same weights under the same settings give the same digest wherever they lie, and whatever else
    config.json says; a checkpoint that `lorikeet quantize` wrote has the digest of the base it was made from.
    Hashes are kept under `cache`, so a file is read again only when it has changed.
    """
    weights = [_file_sha256(file, cache, progress) for file in files]
    if (origin := read_origin(files[0].parent, weights)) is not None:
        return origin.digest
    content = {"spec": asdict(spec), "weights": weights}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()


def record_origin(directory: Path, digest: str, name: str) -> None:
    """Leave the record that the checkpoint in `directory` is the base `digest`, quantized."""
    weights = []
    for file in weight_files(directory):
        with file.open("rb") as opened:
            weights.append(hashlib.file_digest(opened, "sha256").hexdigest())
    Origin(digest, name, tuple(weights)).write(directory)


def _file_sha256(file: Path, cache: Path, progress: Callable[[str], None]) -> str:
    """sha256 of a file's bytes; remembered by path, size, mtime and inode."""
    real = file.resolve()
    note = cache / "digests" / f"{hashlib.sha256(str(real).encode()).hexdigest()}.json"
    before = _identity(real)
    try:
        known = json.loads(note.read_text(encoding="utf-8"))
        if known["identity"] == before and isinstance(known["sha256"], str):
            return str(known["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # never hashed, or the note is not ours to trust: hash
    progress(f"hashing {file.name} ({real.stat().st_size / 2**20:.0f} MiB, once)")
    try:
        with real.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise BaseModelError(f"{file}: cannot be read ({error.strerror})") from error
    if _identity(real) == before:
        with contextlib.suppress(OSError):  # a read-only cache only costs the next start a second reading
            write_whole(note, json.dumps({"identity": before, "sha256": digest}))
    return digest


def _identity(file: Path) -> list[int | str]:
    stat = file.stat()
    return [str(file), stat.st_size, stat.st_mtime_ns, stat.st_ino]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BaseModelError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise BaseModelError(f"{path}: is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise BaseModelError(f"{path}: is not a JSON object")
    return value


def _header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Each tensor's dtype and shape. Refuses a file that is not safetensors (a Git LFS pointer, say) or ends before its
    last tensor does."""
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length) if 8 + length <= size else b"")
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        found = {name: (str(entry["dtype"]), tuple(map(int, entry["shape"]))) for name, entry in entries.items()}
        end = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
    except OSError as error:
        raise BaseModelError(f"{file}: cannot be read ({error.strerror})") from error
    except (ValueError, AttributeError, TypeError, KeyError, IndexError) as error:
        raise BaseModelError(f"{file}: is not a safetensors file; download it again") from error
    if size != 8 + length + end:
        raise BaseModelError(f"{file}: is cut short or has extra bytes; download it again")
    return found


def _no_weights(directory: Path) -> str:
    message = f"{directory}: no weights; needs {SINGLE}, or {INDEX} and the files it names"
    if pickles := sorted(file.name for file in [*directory.glob("*.bin"), *directory.glob("*.pt*")]):
        message += f" ({pickles[0]} is a pickle, which is never loaded: save the model as safetensors)"
    elif others := sorted(file.name for file in directory.glob("*.gguf")):
        message += f" ({others[0]} is GGUF, which is not loaded: save the model as safetensors)"
    return message
