"""An adapter store in an S3-compatible bucket, with a cache on this machine's disk.

    versions/sha256-<hex>/<file>   a version's files, as on disk; the manifest is written last
    names/<name>.json              a name's record; replaced only if it is still what was read (If-Match)

Any number of machines may read and write at once. A writer that dies leaves the old or the new state; objects
that no name refers to go with `gc`. What is read is checked: a version's digest speaks for all its files.

When the service is away: versions in the cache can be used on; a name means what it last meant if that was seen
within MAX_STALE_SECONDS, be it by an earlier process; all else is StoreUnavailable, with a time to try again.
"""

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from adapters.bucket import Bucket, open_bucket
from adapters.errors import AdapterNotFound
from adapters.files import user_directory
from adapters.ids import DEFAULT_LABEL, check_digest, check_label, check_name
from adapters.leases import Lease
from adapters.manifest import BaseReference, TrainingInfo, utc_now
from adapters.names import Change, NamedVersions
from adapters.publication import PublishOptions, prepared
from adapters.records import NameRecord, check_expected, published
from adapters.remote_records import RemoteRecords
from adapters.remote_versions import RemoteVersions
from adapters.seen import SeenRecords
from adapters.validation import Limits
from adapters.versions import Collected, Version, VersionFiles

FRESH_SECONDS = 1.0
MAX_STALE_SECONDS = 3600.0
MAX_CACHE_BYTES = 32 << 30
# Unused objects younger than this may belong to a publication that has not reached its record yet.
MIN_GARBAGE_SECONDS = 3600.0


class RemoteStore(NamedVersions):
    """May be used from several threads, and several processes may share a cache directory on one file system."""

    is_remote = True

    def __init__(
        self,
        bucket: Bucket,
        cache: Path,
        *,
        fresh_seconds: float = FRESH_SECONDS,
        max_stale_seconds: float = MAX_STALE_SECONDS,
        max_cache_bytes: int = MAX_CACHE_BYTES,
        min_garbage_seconds: float = MIN_GARBAGE_SECONDS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.location = bucket.location
        self._min_garbage_seconds = min_garbage_seconds
        self._clock = clock
        self._files = VersionFiles(cache)
        self._versions = RemoteVersions(bucket, self._files, max_cache_bytes)
        self._records = RemoteRecords(
            bucket,
            SeenRecords(cache / "names"),
            fresh_seconds=fresh_seconds,
            max_stale_seconds=max_stale_seconds,
            clock=clock,
        )

    @property
    def is_away(self) -> bool:
        """Whether the service was found to be away a moment ago, so that names mean what they last meant."""
        return self._records.is_away

    # Reading

    def names(self) -> list[str]:
        """All names, sorted. Needs the service."""
        return self._records.names()

    def record(self, name: str) -> NameRecord:
        return self._records.look(name).record

    def stamp(self, name: str) -> str | None:
        try:
            return self._records.look(name).source.etag
        except AdapterNotFound:
            return None

    def version(self, record: NameRecord, digest: str) -> Version:
        """Its files need not be at `path` before `fetch`."""
        manifest = self._versions.manifest(digest)
        return Version(record.name, digest, self._files.path(digest), record.labels_of(digest), manifest)

    def fetch(self, digest: str) -> Path:
        """The directory of a version's files, brought here if they are not, and checked when they come.

        Raises AdapterNotFound, InvalidAdapter when they are not what was published, StoreFull.
        """
        return self._versions.fetch(digest)

    def lease(self, digest: str) -> Lease:
        """Keeps fetched files in the cache until released. Raises AdapterNotFound when they are not there."""
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
        """As `AdapterStore.publish`; checked and put into the cache here, then brought to the bucket."""
        check_name(name)
        check_label(label)
        check_expected(expected)
        base = BaseReference(digest=check_digest(base_digest), name=base_name)
        options = PublishOptions(training, notes, limits, allow_zero, allow_base_mismatch)
        with prepared(self._files, source, base, linears, options) as ready:
            digest = ready.manifest.digest
            with self._files.locked():
                self._files.place(ready.content, digest)
                lease = self._files.lease(digest)  # before anyone can collect it
        with lease:
            self._versions.upload(digest)
            record = self._records.replace(name, lambda now: published(now, name, label, digest, utc_now(), expected))
            self._versions.upload(digest)  # again, in case it was taken for garbage before the record spoke for it
        return self.version(record, digest)

    def remove(self, name: str) -> None:
        """Forget a name. Its versions' objects stay until they are collected. Raises AdapterNotFound."""
        self._records.remove(name)

    def gc(self) -> Collected:
        """Remove the versions that no name has and that nobody has published lately, from the bucket; and from this
        cache unless leased. Other machines' caches keep theirs: what they serve, they serve on."""
        return self._versions.collect(self._records.used, self._clock() - self._min_garbage_seconds)

    def _update(self, name: str, change: Change) -> NameRecord:
        return self._records.update(name, change)

    def _faults(self, digest: str) -> list[str]:
        return self._versions.faults(digest)


def open_remote(location: str) -> RemoteStore:
    """The store at `s3://bucket/prefix`, with its cache in the user's cache directory. Raises StoreUnavailable."""
    bucket = open_bucket(location)
    return RemoteStore(bucket, default_cache(bucket.location))


def default_cache(location: str) -> Path:
    """Where the cache of a location is: one directory for each service, bucket and prefix."""
    service = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    key = hashlib.sha256(f"{service}\n{location}".encode()).hexdigest()[:16]
    return user_directory("XDG_CACHE_HOME", ".cache") / "lorikeet" / "adapters" / key
