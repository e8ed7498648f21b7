"""The adapter store on disk: immutable, content-addressed versions, and names whose labels point at them.

    versions/, staging/, lock   see `adapters.versions`
    names/<name>.json           the name's labels, versions and history; replaced whole, so always old or new

Any number of processes may read and write at once on one local file system. A process killed at any point
leaves the old or the new state; what it was preparing is swept up by the next one that writes.
"""

import time
from collections.abc import Mapping
from pathlib import Path

from adapters.errors import AdapterNotFound, StoreUnavailable
from adapters.files import make_directory, store_error, store_errors, sync_directory, user_directory, write_file
from adapters.ids import DEFAULT_LABEL, check_digest, check_label, check_name, is_name
from adapters.leases import Lease
from adapters.manifest import BaseReference, TrainingInfo, canonical_json, decode_json, utc_now
from adapters.names import Change, NamedVersions
from adapters.publication import Prepared, PublishOptions, prepared
from adapters.records import NameRecord, check_expected, published
from adapters.validation import Limits
from adapters.versions import Collected, Version, VersionFiles

__all__ = ["AdapterStore", "Version", "default_store_root"]

Stamp = tuple[int, int, int]


class AdapterStore(NamedVersions):
    """A store in the directory `root`."""

    is_remote = False
    is_away = False

    def __init__(self, root: Path) -> None:
        self.root = root
        self.location = str(root)
        self._names = root / "names"
        self._files = VersionFiles(root)

    # Reading

    def names(self) -> list[str]:
        """All names, sorted."""
        try:
            found = [path.name for path in self._names.iterdir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise store_error(error, self._names) from error
        return sorted(name for file in found if file.endswith(".json") and is_name(name := file.removesuffix(".json")))

    def record(self, name: str) -> NameRecord:
        """What a name points at. Raises AdapterNotFound."""
        path = self._record_path(name)
        try:
            record = decode_json(path.read_bytes(), NameRecord)
            if record.name != name:
                raise ValueError(f"it is of {record.name!r}")
        except FileNotFoundError:
            raise AdapterNotFound(f"no adapter {name!r} in the store at {self.root}") from None
        except OSError as error:
            raise store_error(error, path) from error
        except ValueError as error:
            raise StoreUnavailable(f"the record {path} is damaged: {error}", path=str(path)) from None
        return record

    def stamp(self, name: str) -> Stamp | None:
        """Changes whenever the name's record does; None when there is no such name. One stat, no read."""
        path = self._record_path(name)
        try:
            status = path.stat()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise store_error(error, path) from error
        return status.st_ino, status.st_mtime_ns, status.st_size

    def version(self, record: NameRecord, digest: str) -> Version:
        """A version of a record, with its manifest."""
        manifest = self._files.manifest(digest)
        return Version(record.name, digest, self._files.path(digest), record.labels_of(digest), manifest)

    def fetch(self, digest: str) -> Path:
        """The directory of a version's files, which are always here. Raises AdapterNotFound."""
        if not (path := self._files.path(digest)).is_dir():
            raise AdapterNotFound(f"no version {digest} in the store at {self.root}")
        return path

    def lease(self, digest: str) -> Lease:
        """Keeps a version's files from garbage collection until released. Raises AdapterNotFound."""
        return self._files.lease(digest)

    # Writing

    def publish(
        self,
        source: Path,
        name: str,
        *,
        base_digest: str,
        base_name: str,
        linears: Mapping[str, tuple[int, int]],
        label: str = DEFAULT_LABEL,
        expected: str | None = None,
        training: TrainingInfo | None = None,
        notes: str = "",
        limits: Limits = Limits(),  # noqa: B008  (frozen)
        allow_zero: bool = False,
        allow_base_mismatch: bool = False,
    ) -> Version:
        """Copy a PEFT directory into the store, check the copy, and point `name@label` at it; all or nothing.

        The same content for the same base is the same version: it keeps its first manifest, and only the label
        moves. A name's first publication sets `latest` too. `expected` is as in `move_label`, the other options
        are those of `PublishOptions`. Raises LabelMoved, InvalidAdapter and its kinds, StoreFull, StoreUnavailable.
        """
        check_name(name)
        check_label(label)
        check_expected(expected)
        base = BaseReference(digest=check_digest(base_digest), name=base_name)
        options = PublishOptions(training, notes, limits, allow_zero, allow_base_mismatch)
        with prepared(self._files, source, base, linears, options) as ready:
            make_directory(self._names)
            with self._files.locked():
                record = self._commit(ready, name, label, expected)
                return self.version(record, ready.manifest.digest)

    def remove(self, name: str) -> None:
        """Forget a name. Its versions' files stay until they are collected. Raises AdapterNotFound."""
        path = self._record_path(name)
        self.record(name)
        with store_errors(path), self._files.locked():
            path.unlink(missing_ok=True)
            sync_directory(self._names)

    def gc(self) -> Collected:
        """Remove the files of versions that no name has and nobody holds a lease on."""
        with store_errors(self.root):
            return self._files.collect(
                lambda: {digest for name in self.names() for digest in self.record(name).versions}
            )

    # Steps of a change, under the lock

    def _update(self, name: str, change: Change) -> NameRecord:
        self.record(name)  # refuse before anything is written
        with store_errors(self.root), self._files.staged() as stage, self._files.locked():
            record = self.record(name)
            updated = change(record)
            if updated is not record:
                self._write_record(stage, updated)
                (stage / "record").replace(self._record_path(name))
                sync_directory(self._names)
        return updated

    def _commit(self, ready: Prepared, name: str, label: str, expected: str | None) -> NameRecord:
        """Put a version into place and move the label. What needs room on the disk comes before what is seen."""
        digest = ready.manifest.digest
        record = self.record(name) if self.stamp(name) else None
        updated = published(record, name, label, digest, utc_now(), expected)
        if updated is not record:
            self._write_record(ready.stage, updated)
        is_new = self._files.place(ready.content, digest)
        try:
            sync_directory(self._files.directory)
            if updated is not record:
                (ready.stage / "record").replace(self._record_path(name))
        except OSError:
            if is_new:
                self._files.path(digest).rename(ready.content)
            raise
        sync_directory(self._names)
        return updated

    def _write_record(self, stage: Path, record: NameRecord) -> None:
        # Each record is later than the one before, so that `stamp` tells them apart though the clock be coarse.
        before = self.stamp(record.name)
        modified = max(time.time_ns(), before[1] + 1 if before else 0)
        write_file(stage / "record", canonical_json(record), mtime_ns=modified)

    def _faults(self, digest: str) -> list[str]:
        return self._files.faults(digest)

    # Paths: made of checked names and digests only

    def _record_path(self, name: str) -> Path:
        return self._names / f"{check_name(name)}.json"


def default_store_root() -> Path:
    """The store in the user's data directory: $XDG_DATA_HOME/lorikeet/adapters, by default under ~/.local/share."""
    return user_directory("XDG_DATA_HOME", ".local/share") / "lorikeet" / "adapters"
