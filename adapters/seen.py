"""What a remote store said of its names, remembered in memory and on disk, for when it is away."""

import contextlib
import threading
from dataclasses import dataclass
from pathlib import Path

from adapters.bucket import Object
from adapters.files import replace_file
from adapters.manifest import canonical_json, decode_json
from adapters.records import NameRecord

_SAVE_SECONDS = 30.0  # how much older than in memory the time on disk may be


@dataclass(frozen=True, slots=True)
class Seen:
    """A name's record as it was in the bucket at `at` (seconds since 1970)."""

    record: NameRecord
    source: Object
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _OnDisk:
    etag: str
    at: float
    data: str


class SeenRecords:
    """One file a name in `directory`. A disk that fails costs the memory of an earlier process and nothing else.

    `num_changes` grows with what this process changes: an answer asked for before that may be of the time before.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._seen: dict[str, Seen] = {}
        self._saved: dict[str, Seen] = {}
        self._lock = threading.Lock()
        self.num_changes = 0

    def get(self, name: str) -> Seen | None:
        """What was seen last, by this process or an earlier one."""
        return self._seen.get(name) or self._load(name)

    def put(self, seen: Seen, asked: int | None = None) -> None:
        """Remembers a record that this process wrote, or (`asked`: `num_changes` then) asked for."""
        name = seen.record.name
        with self._lock:
            if asked is None:
                self.num_changes += 1
            elif asked != self.num_changes:
                return
            self._seen[name] = seen
            saved = self._saved.get(name)
            if saved is None or saved.source.etag != seen.source.etag or seen.at - saved.at > _SAVE_SECONDS:
                self._saved[name] = seen
                on_disk = _OnDisk(etag=seen.source.etag, at=seen.at, data=seen.source.data.decode())
                with contextlib.suppress(OSError):
                    self._directory.mkdir(parents=True, exist_ok=True)
                    replace_file(self._path(name), canonical_json(on_disk))

    def forget(self, name: str) -> None:
        with self._lock:
            self.num_changes += 1
            self._seen.pop(name, None)
            self._saved.pop(name, None)
            with contextlib.suppress(OSError):
                self._path(name).unlink()

    def _load(self, name: str) -> Seen | None:
        try:
            found = decode_json(self._path(name).read_bytes(), _OnDisk)
            data = found.data.encode()
            record = decode_json(data, NameRecord)
        except (OSError, ValueError):
            return None
        return Seen(record, Object(data, found.etag), found.at) if record.name == name else None

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}.json"
