"""Directories in which a publication is prepared, out of everyone's sight, and swept up when its process died."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from adapters.files import locked

_OWNER = ".owner"


@contextlib.contextmanager
def staging_directory(parent: Path, lock: Path) -> Iterator[Path]:
    """A new directory under `parent`, gone afterwards; what dead processes left there goes first.

    While it is in use its owner file is locked, which tells it from an abandoned one.
    """
    with locked(lock):
        _sweep(parent)
        stage = Path(tempfile.mkdtemp(dir=parent))
        try:
            owner = os.open(stage / _OWNER, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError:
            stage.rmdir()
            raise
        fcntl.flock(owner, fcntl.LOCK_EX)
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        os.close(owner)


def _sweep(parent: Path) -> None:
    for stage in parent.iterdir():
        if _is_abandoned(stage / _OWNER):
            shutil.rmtree(stage, ignore_errors=True)


def _is_abandoned(owner: Path) -> bool:
    try:
        fd = os.open(owner, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True  # killed between making the directory and its owner file
    except OSError:
        return False  # another user's, or nothing of ours
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        return True
    finally:
        os.close(fd)
