"""Leases: what keeps a version's files in place while a process serves or loads it.

A lease is a shared lock (flock) on the version's directory, so it ends with the process that holds it, however
that ends, needs no permission to write, and leaves nothing behind. Garbage collection takes the exclusive lock,
without waiting, before it moves a version away.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType


class Lease:
    """A hold on a version's files until `release`, which may be called again; also a context manager.

    Any number may be held on one digest, in one process or in many. Not inherited by programs that are started.
    """

    __slots__ = ("_fd", "digest")

    def __init__(self, digest: str, fd: int) -> None:
        self.digest = digest
        self._fd: int | None = fd

    def release(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def __enter__(self) -> "Lease":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def lease_directory(path: Path, digest: str) -> Lease | None:
    """A lease on the directory at `path`; None when there is none. Waits at most for a rename."""
    while True:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_SH)
            is_there = _is_at(fd, path)
        except BaseException:
            os.close(fd)
            raise
        if is_there:
            return Lease(digest, fd)
        os.close(fd)  # moved away between the two calls: look again


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def unleased(path: Path) -> Iterator[bool]:
    """Whether nobody holds a lease on the directory at `path`; if so, nobody gets one within the block."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(fd)
