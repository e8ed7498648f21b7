"""The adapter store: a directory of immutable, content-addressed versions, and names whose labels point at them.

    versions/sha256-<hex>/   adapter_config.json (canonical), adapter_model.safetensors, manifest.json
    names/<name>.json        the name's labels, versions and history; replaced whole, so always old or new
    staging/                 publications in the making
    lock                     held while a version is put into place and a label moves, and for nothing slow

Any number of processes may read and write at once on one local file system. A process killed at any point
leaves the old or the new state; what it was preparing is swept up by the next publication.
"""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from adapters.content import damage, describe
from adapters.errors import AdapterNotFound, InvalidAdapter, StoreUnavailable
from adapters.files import copy_file, locked, store_error, store_errors, sync_directory, write_file
from adapters.ids import DEFAULT_LABEL, check_digest, check_label, check_name, is_name, parse_adapter_id
from adapters.layout import Limits, read_layout
from adapters.manifest import MANIFEST_FILE, Manifest, TrainingInfo, canonical_json, decode_json, utc_now
from adapters.peft_config import canonical_config
from adapters.records import NameRecord, new_record
from adapters.sources import open_source
from adapters.staging import staging_directory
from adapters.validation import CONFIG_FILE, WEIGHTS_FILE, read_header, read_json

Stamp = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Version:
    """A published version under one of its names. `path` holds the PEFT files; `labels` point at it, sorted."""

    name: str
    digest: str
    path: Path
    labels: tuple[str, ...]
    manifest: Manifest


class AdapterStore:
    """Raises StoreUnavailable from any method when the disk fails, InvalidAdapterId for a malformed name or id."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._names = root / "names"
        self._versions = root / "versions"
        self._staging = root / "staging"
        self._lock = root / "lock"

    # Reading

    def resolve(self, adapter_id: str) -> Version:
        """The version that `name`, `name@label` or `name@sha256:…` means now. Raises AdapterNotFound."""
        parsed = parse_adapter_id(adapter_id)
        record = self.record(parsed.name)
        return self.version(record, record.digest_of(parsed))

    def names(self) -> list[str]:
        """All names, sorted."""
        try:
            found = [path.name for path in self._names.iterdir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise store_error(error, self._names) from error
        return sorted(name for file in found if file.endswith(".json") and is_name(name := file.removesuffix(".json")))

    def versions(self, name: str) -> list[Version]:
        """All versions of a name, the newest first. Raises AdapterNotFound."""
        record = self.record(name)
        return [self.version(record, digest) for digest in reversed(record.versions)]

    def labels(self, name: str) -> dict[str, str]:
        """Label → digest. Raises AdapterNotFound."""
        return dict(self.record(name).labels)

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
        path = self._version_path(digest)
        return Version(record.name, digest, path, record.labels_of(digest), self._manifest(path))

    def verify(self, version: Version) -> None:
        """Hashes a version's files again. Raises InvalidAdapter that names each file that is not what was published."""
        faults = damage(version.path, version.manifest)
        if version.manifest.digest != version.digest:
            faults.append(f"{MANIFEST_FILE}: does not belong to {version.digest}")
        if faults:
            raise InvalidAdapter(f"{version.path} is damaged: {'; '.join(faults)}", faults=faults)

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
        training: TrainingInfo | None = None,
        limits: Limits = Limits(),  # noqa: B008  (frozen)
        allow_zero: bool = False,
    ) -> Version:
        """Copy a PEFT directory into the store, check the copy, and point `name@label` at it; all or nothing.

        The same content for the same base is the same version: it keeps its first manifest, and only the label
        moves. A name's first publication sets `latest` too. `allow_zero` takes an adapter without effect.
        Raises InvalidAdapter and its kinds, StoreFull, StoreUnavailable.
        """
        check_name(name)
        check_label(label)
        if training is not None and (names := training.not_finite()):
            raise InvalidAdapter(f"training: {', '.join(names)} must be finite", faults=names)
        with open_source(source, CONFIG_FILE) as config_fd, open_source(source, WEIGHTS_FILE) as weights_fd:
            config = canonical_config(read_json(config_fd, CONFIG_FILE, limits.max_config_bytes))
            read_header(weights_fd, limits)  # refuse early what would be copied in vain
            needed = len(config) + os.fstat(weights_fd).st_size
            with store_errors(self.root, needed):
                for directory in (self._names, self._versions, self._staging):
                    directory.mkdir(parents=True, exist_ok=True)
                with staging_directory(self._staging, self._lock) as stage:
                    content = stage / "content"
                    content.mkdir()
                    write_file(content / CONFIG_FILE, config)
                    copy_file(weights_fd, content / WEIGHTS_FILE)
                    layout = read_layout(content, linears, limits, allow_zero=allow_zero)
                    manifest = describe(content, layout, linears, base_digest, base_name, training)
                    write_file(content / MANIFEST_FILE, canonical_json(manifest))
                    sync_directory(content)
                    with locked(self._lock):
                        record = self._commit(stage, content, name, label, manifest.digest)
        return self.version(record, manifest.digest)

    def remove(self, name: str) -> None:
        """Forget a name. Its versions' files stay: a server may be reading them. Raises AdapterNotFound."""
        path = self._record_path(name)
        self.record(name)
        with store_errors(path), locked(self._lock):
            path.unlink(missing_ok=True)
            sync_directory(self._names)

    # Steps of a publication, under the lock

    def _commit(self, stage: Path, content: Path, name: str, label: str, digest: str) -> NameRecord:
        """Put `content` into place and move the label. What needs room on the disk comes before what is seen."""
        stamp, now = self.stamp(name), utc_now()
        record = self.record(name) if stamp else None
        updated = record.with_label(label, digest, now) if record else new_record(name, label, digest, now)
        if updated is not record:
            # Each record is later than the one before, so that `stamp` tells them apart though the clock be coarse.
            modified = max(time.time_ns(), stamp[1] + 1 if stamp else 0)
            write_file(stage / "record", canonical_json(updated), mtime_ns=modified)
        destination = self._version_path(digest)
        is_new = self._place(stage, content, destination)
        try:
            sync_directory(self._versions)
            if updated is not record:
                (stage / "record").replace(self._record_path(name))
        except OSError:
            if is_new:
                destination.rename(content)
            raise
        sync_directory(self._names)
        return updated

    def _place(self, stage: Path, content: Path, destination: Path) -> bool:
        """Move `content` to its place unless an intact copy is there; whether there was none."""
        is_new = not destination.exists()
        if not is_new:
            if self._is_intact(destination):
                return False
            destination.rename(stage / "damaged")
        content.rename(destination)
        return is_new

    def _is_intact(self, path: Path) -> bool:
        try:
            return not damage(path, self._manifest(path))
        except StoreUnavailable:
            return False

    # Paths: made of checked names and digests only

    def _record_path(self, name: str) -> Path:
        return self._names / f"{check_name(name)}.json"

    def _version_path(self, digest: str) -> Path:
        return self._versions / check_digest(digest).replace(":", "-")

    def _manifest(self, path: Path) -> Manifest:
        file = path / MANIFEST_FILE
        try:
            return decode_json(file.read_bytes(), Manifest)
        except OSError as error:
            raise store_error(error, file) from error
        except ValueError as error:
            raise StoreUnavailable(f"the manifest {file} is damaged: {error}", path=str(file)) from None


def default_store_root() -> Path:
    """The store in the user's data directory: $XDG_DATA_HOME/lorikeet/adapters, by default under ~/.local/share."""
    data = Path(os.environ.get("XDG_DATA_HOME", ""))
    if not data.is_absolute():  # to be ignored then, says the XDG specification
        data = Path.home() / ".local" / "share"
    return data / "lorikeet" / "adapters"
