"""Files that are either wholly there or not at all, and the store's errors for what the disk refuses."""

import contextlib
import errno
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from adapters.errors import AdapterError, StoreFull, StoreUnavailable

_COPY_BYTES = 4 << 20
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})  # EFBIG: the process's file size limit


def user_directory(variable: str, fallback: str) -> Path:
    """A directory of the XDG base directory specification: what `variable` says, or `fallback` in the home."""
    said = Path(os.environ.get(variable, ""))
    return said if said.is_absolute() else Path.home() / fallback  # a relative one is to be ignored, it says


def expand_user(text: str) -> Path:
    """A path that may begin with ~ or ~user; of a user that there is not, as it is."""
    return Path(os.path.expanduser(text))  # noqa: PTH111  (Path's raises RuntimeError then)


def store_error(error: OSError, path: Path, needed: int | None = None) -> AdapterError:
    """What the store says of an OSError at `path`; `needed` is how many bytes were to be written."""
    if error.errno in _FULL:
        size = "" if needed is None else f"; {needed} bytes are needed"
        return StoreFull(f"no room in the adapter store at {path} ({error.strerror}){size}", path=str(path))
    return StoreUnavailable(f"the adapter store at {path} cannot be used: {error.strerror}", path=str(path))


@contextlib.contextmanager
def store_errors(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turns the OSErrors of its block into the store's."""
    try:
        yield
    except OSError as error:
        raise store_error(error, path, needed) from error


def write_file(path: Path, data: bytes, mtime_ns: int | None = None) -> None:
    """A new read-only file, on disk when this returns; `mtime_ns` None is now."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444)
    try:
        _write_all(fd, data)
        if mtime_ns is not None:
            os.utime(fd, ns=(mtime_ns, mtime_ns))
        os.fsync(fd)
    finally:
        os.close(fd)


def replace_file(path: Path, data: bytes) -> None:
    """A file that is the old or the new one whenever it is read; the new one need not outlive a power cut."""
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=".")
    try:
        try:
            _write_all(fd, data)
        finally:
            os.close(fd)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def copy_file(source: int, path: Path) -> None:
    """The bytes of an open file as a new read-only file, on disk when this returns."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444)
    try:
        position = 0
        while chunk := os.pread(source, _COPY_BYTES, position):
            _write_all(fd, chunk)
            position += len(chunk)
        os.fsync(fd)
    finally:
        os.close(fd)


def write_chunks(path: Path, chunks: Iterable[bytes], size: int) -> str | None:
    """Chunks as a new read-only file, on disk when this returns; their sha256 in hex, None if they are over `size`."""
    digest, written = hashlib.sha256(), 0
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444)
    try:
        for chunk in chunks:
            written += len(chunk)
            if written > size:
                return None
            digest.update(chunk)
            _write_all(fd, chunk)
        os.fsync(fd)
    finally:
        os.close(fd)
    return digest.hexdigest()


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def hash_file(path: Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_directory(path: Path) -> None:
    """A directory, and those above it that there are not, on disk when this returns."""
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
        with contextlib.suppress(PermissionError):  # a parent that may be written and not read
            sync_directory(path.parent)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the exclusive lock of a lock file among processes and threads; the kernel drops it when one dies."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
