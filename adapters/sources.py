"""The files of a PEFT directory that someone wants published."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from adapters.errors import InvalidAdapter
from adapters.manifest import MANIFEST_FILE, MAX_MANIFEST_BYTES, Manifest, decode_json
from adapters.validation import opened, refuse


@contextlib.contextmanager
def open_source(directory: Path, name: str) -> Iterator[int]:
    """A read-only descriptor of a file of `directory`. Links are followed inside the directory, and from a Hugging
    Face cache's `snapshots` into its `blobs`; a link that leads elsewhere is refused. Raises InvalidAdapter."""
    if not directory.is_dir():
        raise refuse(f"{directory}: is not a directory")
    with opened(_resolved(directory, name)) as fd:
        yield fd


def read_origin(directory: Path) -> Manifest | None:
    """The manifest that a store left in a directory, as `export` does; None without one, or when it is not ours."""
    if not os.path.lexists(directory / MANIFEST_FILE):
        return None
    try:
        with open_source(directory, MANIFEST_FILE) as fd:
            return decode_json(os.pread(fd, MAX_MANIFEST_BYTES, 0), Manifest)
    except (InvalidAdapter, ValueError):
        return None


def _resolved(directory: Path, name: str) -> Path:
    path = directory / name
    if not path.is_symlink():
        return path
    home = directory.resolve()
    target = Path(os.path.realpath(path))
    homes = [home, *(parent.parent / "blobs" for parent in home.parents if parent.name == "snapshots")]
    if not any(target.is_relative_to(allowed) for allowed in homes):
        raise refuse(f"{name}: is a symbolic link out of {directory}; copy the file there instead")
    return target
