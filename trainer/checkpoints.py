"""Exact checkpoints: a directory each, that is there whole or not at all.

checkpoints/step-00000012/
    weights.safetensors     the parameters that are trained
    optimizer.safetensors   the optimizer's tensors
    state.json              counters, the place in the data, the optimizer's numbers
    adapter_config.json     PEFT's, of an adapter
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.errors import DiskFull, RunError

NAME = re.compile(r"step-(\d{8})")
BEST = "best"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a run is at a step: enough to go on as if it had never stopped. `state` is plain JSON."""

    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: Mapping[str, Any]
    adapter_config: str | None = None


class Checkpoints:
    """The checkpoints of a run, in `directory`; the latest `keep` stay, and the best."""

    def __init__(self, directory: Path, keep: int = 2) -> None:
        self._directory = directory
        self._keep = keep

    def save(self, step: int, checkpoint: Checkpoint) -> Path:
        """Write the checkpoint of `step`, then remove older ones. Raises DiskFull, the earlier ones untouched."""
        path = self._write(f"step-{step:08d}", checkpoint)
        for old in self.steps()[: -self._keep]:
            shutil.rmtree(self._path(old))
        return path

    def save_best(self, checkpoint: Checkpoint) -> None:
        """Write the weights that did best so far, in place of those that did before."""
        self._write(BEST, Checkpoint(checkpoint.weights, {}, checkpoint.state, checkpoint.adapter_config))

    def steps(self) -> list[int]:
        """The steps of which there are checkpoints, rising."""
        if not self._directory.is_dir():
            return []
        matches = (NAME.fullmatch(path.name) for path in self._directory.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def load(self, step: int) -> Checkpoint:
        """The checkpoint of `step`. Raises RunError if it is damaged."""
        return self._read(self._path(step))

    def load_best(self) -> Checkpoint | None:
        """The best weights, None if none were saved."""
        path = self._directory / BEST
        return self._read(path) if path.is_dir() else None

    def _path(self, step: int) -> Path:
        return self._directory / f"step-{step:08d}"

    def _write(self, name: str, checkpoint: Checkpoint) -> Path:
        path, partial = self._directory / name, self._directory / f".{name}.partial"
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            save_file(
                {k: v.detach().cpu().contiguous() for k, v in checkpoint.weights.items()},
                partial / "weights.safetensors",
            )
            save_file(
                {k: v.cpu().contiguous() for k, v in checkpoint.optimizer.items()}, partial / "optimizer.safetensors"
            )
            (partial / "state.json").write_text(json.dumps(checkpoint.state), encoding="utf-8")
            if checkpoint.adapter_config is not None:
                (partial / "adapter_config.json").write_text(checkpoint.adapter_config, encoding="utf-8")
            for file in partial.iterdir():
                sync(file)
            replace_directory(partial, path)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise _write_error(path, error) from error
        return path

    def _read(self, path: Path) -> Checkpoint:
        config = path / "adapter_config.json"
        try:
            return Checkpoint(
                weights=load_file(path / "weights.safetensors"),
                optimizer=load_file(path / "optimizer.safetensors"),
                state=json.loads((path / "state.json").read_text(encoding="utf-8")),
                adapter_config=config.read_text(encoding="utf-8") if config.is_file() else None,
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise RunError(
                f"{path}: the checkpoint cannot be read ({error}); remove it to resume from the one before"
            ) from error


def replace_directory(new: Path, path: Path) -> None:
    """Put `new` where `path` is. After a crash one of them is there whole; a `path` that gave way is removed."""
    if path.exists():
        old = path.with_name(f".{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
        new.rename(path)
        shutil.rmtree(old)
    else:
        new.rename(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until `path` is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """For what writes `path`. Raises DiskFull or RunError where that fails."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise _write_error(path, error) from error


def _write_error(path: Path, error: Exception) -> Exception:
    """What a failure to write `path` means to the user."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if full or any(words in str(error) for words in ("No space left", "File too large", "quota")):
        return DiskFull(f"{path}: no room on the disk; free some and run `trainer resume` from the last checkpoint")
    return RunError(f"{path}: cannot be written ({error})")
