"""Versions on this machine's disk: a directory of immutable, content-addressed directories, and who holds them.

    versions/sha256-<hex>/   adapter_config.json (canonical), adapter_model.safetensors, manifest.json
    staging/                 what is in the making, or on its way out
    lock                     held while something is put into place or moved away, and for nothing slow

A store on disk is this and its names; the cache of a remote store is this alone.
"""

import contextlib
import os
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from adapters.content import damage, manifest_faults
from adapters.errors import AdapterNotFound, StoreUnavailable
from adapters.files import locked, make_directory, store_error, sync_directory
from adapters.ids import check_digest, is_digest
from adapters.leases import Lease, lease_directory, unleased
from adapters.manifest import MANIFEST_FILE, Manifest, decode_json
from adapters.staging import staging_directory
from adapters.validation import CONFIG_FILE, WEIGHTS_FILE


@dataclass(frozen=True, slots=True)
class Version:
    """A published version under one of its names. `path` holds the PEFT files; `labels` point at it, sorted."""

    name: str
    digest: str
    path: Path
    labels: tuple[str, ...]
    manifest: Manifest


@dataclass(slots=True)
class Collected:
    """What garbage collection did: the digests it removed, those it left as they are leased, or too recent to tell
    from a publication under way (in a remote store), and the bytes freed."""

    removed: list[str] = field(default_factory=list)
    leased: list[str] = field(default_factory=list)
    recent: list[str] = field(default_factory=list)
    freed_bytes: int = 0


@dataclass(frozen=True, slots=True)
class LocalVersion:
    """A version's directory, when it was last put or leased here (seconds since 1970), and its files' bytes."""

    digest: str
    used_at: float
    size_bytes: int


class VersionFiles:
    """Raises StoreUnavailable from any method when the disk fails."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.directory = root / "versions"
        self._staging = root / "staging"
        self._lock = root / "lock"

    def path(self, digest: str) -> Path:
        return self.directory / check_digest(digest).replace(":", "-")

    def manifest(self, digest: str) -> Manifest:
        """Raises StoreUnavailable when it is missing or damaged."""
        file = self.path(digest) / MANIFEST_FILE
        try:
            manifest = decode_json(file.read_bytes(), Manifest)
            if faults := manifest_faults(manifest, digest):
                raise ValueError("; ".join(faults))
        except OSError as error:
            raise store_error(error, file) from error
        except ValueError as error:
            raise StoreUnavailable(f"the manifest {file} is damaged: {error}", path=str(file)) from None
        return manifest

    def faults(self, digest: str) -> list[str]:
        """What is not as it was published, one line a fault; empty when intact. Reads every byte."""
        try:
            return damage(self.path(digest), self.manifest(digest), digest)
        except StoreUnavailable as error:
            return [error.message]

    def lease(self, digest: str) -> Lease:
        """Keeps the version's files in place until released. Raises AdapterNotFound when they are not here."""
        path = self.path(digest)
        try:
            lease = lease_directory(path, digest)
        except OSError as error:
            raise store_error(error, path) from error
        if lease is None:
            raise AdapterNotFound(f"no version {digest} in the store at {self.root}")
        with contextlib.suppress(OSError):  # another user's, or read-only: then nothing here goes by age
            os.utime(path)
        return lease

    def present(self) -> list[LocalVersion]:
        """What is here, the least recently used first."""
        found = []
        with contextlib.suppress(FileNotFoundError):
            for path in self.directory.iterdir():
                digest = path.name.replace("-", ":", 1)
                if is_digest(digest):
                    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                        size = sum(file.stat().st_size for file in path.iterdir())
                        found.append(LocalVersion(digest, path.stat().st_mtime, size))
        return sorted(found, key=lambda version: (version.used_at, version.digest))

    # Writing. OSErrors are the caller's to translate: it knows how many bytes were to be written.

    @contextlib.contextmanager
    def staged(self) -> Iterator[Path]:
        """A directory on the same disk in which to prepare something, gone afterwards."""
        for directory in (self.directory, self._staging):
            make_directory(directory)
        with staging_directory(self._staging, self._lock) as stage:
            yield stage

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Holds the lock of this directory, which serialises all that others can see."""
        return locked(self._lock)

    def place(self, content: Path, digest: str) -> bool:
        """Under the lock: move the complete directory `content` to its place, or mend what is there with its files;
        whether there was nothing. What is intact stays as it is."""
        destination = self.path(digest)
        if destination.is_dir():
            if self.faults(digest):  # file by file: whoever holds a lease on the directory goes on holding it
                for name in (CONFIG_FILE, WEIGHTS_FILE, MANIFEST_FILE):
                    (content / name).replace(destination / name)
                sync_directory(destination)
            return False
        content.rename(destination)
        return True

    def collect(self, used: Callable[[], Container[str]]) -> Collected:
        """Remove every version that is not in `used()`, asked for under the lock, and that nobody has leased."""
        collected = Collected()
        if not self.directory.is_dir():
            return collected
        with self.staged() as stage, self.locked():
            keep = used()
            for version in self.present():
                if version.digest not in keep:
                    self._discard(version, stage, collected)
            sync_directory(self.directory)
        return collected

    def _discard(self, version: LocalVersion, stage: Path, collected: Collected) -> None:
        path = self.path(version.digest)
        with unleased(path) as is_free:
            if not is_free:
                collected.leased.append(version.digest)
                return
            path.rename(stage / path.name)
        collected.removed.append(version.digest)
        collected.freed_bytes += version.size_bytes
