"""The names of a remote store: records that are replaced only if they are still what was read, and what to make of
them while the service is away."""

import dataclasses
import random
import secrets
import time
from collections.abc import Callable

from adapters.bucket import RETRY_AFTER, Bucket, Conflict, Object
from adapters.errors import AdapterNotFound, StoreUnavailable
from adapters.ids import check_name, is_name
from adapters.manifest import canonical_json, decode_json
from adapters.records import NameRecord
from adapters.seen import Seen, SeenRecords

_MAX_TRIES = 30
_MAX_PAUSE = 0.1  # seconds, between tries
_REMEMBERED_WRITES = 32  # in a record: how many others may write between a writer's two tries


class RemoteRecords:
    """`fresh_seconds`: a record seen so lately is not asked for again; `max_stale_seconds`: while the service is
    away, one seen so lately is relied on. `clock` gives seconds since 1970."""

    def __init__(
        self,
        bucket: Bucket,
        seen: SeenRecords,
        *,
        fresh_seconds: float,
        max_stale_seconds: float,
        clock: Callable[[], float],
    ) -> None:
        self._bucket = bucket
        self._seen = seen
        self._fresh_seconds = fresh_seconds
        self._max_stale_seconds = max_stale_seconds
        self._clock = clock
        self._away_until = 0.0

    @property
    def is_away(self) -> bool:
        """Whether the service was found to be away a moment ago, so that names mean what they last meant."""
        return 0 < self._away_until - self._clock() <= RETRY_AFTER  # more: the clock was set back since

    def names(self) -> list[str]:
        """All names in the bucket, sorted."""
        keys = [stored.key.removeprefix("names/") for stored in self._bucket.find("names")]
        return sorted(name for key in keys if key.endswith(".json") and is_name(name := key.removesuffix(".json")))

    def used(self) -> set[str]:
        """The versions that the names in the bucket have now."""
        used: set[str] = set()
        for name in self.names():
            if source := self._bucket.read(_key(name)):  # else it has been removed since
                used.update(self._decode(name, source).versions)
        return used

    def look(self, name: str) -> Seen:
        """A name's record now, or as last seen while the service is away. Raises AdapterNotFound, StoreUnavailable."""
        key, now = _key(name), self._clock()
        seen = self._seen.get(name)
        if seen is not None and 0 <= now - seen.at < self._fresh_seconds:
            return seen
        if seen is not None and self.is_away and now - seen.at <= self._max_stale_seconds:
            return seen  # asked a moment ago
        asked = self._seen.num_changes
        try:
            source = self._bucket.read(key, seen.source if seen else None)
        except StoreUnavailable:
            self._away_until = now + RETRY_AFTER
            if seen is None:
                raise
            return self._last(seen, now)
        if source is None:
            self._seen.forget(name)
            raise self._not_found(name)
        is_same = seen is not None and source is seen.source
        record = seen.record if seen is not None and is_same else self._decode(name, source)
        found = Seen(record, source, now)
        self._seen.put(found, asked)
        return found

    def update(self, name: str, change: Callable[[NameRecord], NameRecord]) -> NameRecord:
        """`replace` for a name that is there. Raises AdapterNotFound."""

        def changed(record: NameRecord | None) -> NameRecord:
            if record is None:
                raise self._not_found(name)
            return change(record)

        return self.replace(name, changed)

    def replace(self, name: str, change: Callable[[NameRecord | None], NameRecord]) -> NameRecord:
        """Replace a record, None where there is none, by what `change` makes of it; from the start again whenever
        another writer came first."""
        key, nonces = _key(name), set[str]()
        for _ in range(_MAX_TRIES):
            source = self._bucket.read(key)
            record = self._decode(name, source) if source else None
            # What we wrote may be there already, others' changes on it, although the answer said otherwise or got lost.
            is_done = record is not None and not nonces.isdisjoint(record.nonces)
            updated = record if record is not None and is_done else change(record)
            if source is not None and updated is record:
                return self._remember(Seen(updated, source, self._clock())).record
            nonces.add(nonce := secrets.token_hex(8))
            updated = dataclasses.replace(updated, nonces=(*updated.nonces, nonce)[-_REMEMBERED_WRITES:])
            try:
                source = self._bucket.write(key, canonical_json(updated), source)
            except Conflict:
                time.sleep(random.uniform(0, _MAX_PAUSE))
            else:
                return self._remember(Seen(updated, source, self._clock())).record
        raise StoreUnavailable(f"too many write {self._bucket.location}/{key} at once", retry_after=RETRY_AFTER)

    def remove(self, name: str) -> None:
        """Raises AdapterNotFound."""
        if self._bucket.read(_key(name)) is None:
            raise self._not_found(name)
        self._bucket.delete(_key(name))
        self._seen.forget(name)

    def _last(self, seen: Seen, now: float) -> Seen:
        if now - seen.at > self._max_stale_seconds:
            raise StoreUnavailable(
                f"the adapter store at {self._bucket.location} is away, and {seen.record.name!r} was last looked up "
                f"{now - seen.at:.0f} s ago; at most {self._max_stale_seconds:.0f} s are relied on",
                retry_after=RETRY_AFTER,
            )
        return seen

    def _remember(self, seen: Seen) -> Seen:
        self._seen.put(seen)
        return seen

    def _decode(self, name: str, source: Object) -> NameRecord:
        try:
            record = decode_json(source.data, NameRecord)
            if record.name != name:
                raise ValueError(f"it is of {record.name!r}")
        except ValueError as error:
            raise StoreUnavailable(f"the record {self._bucket.location}/{_key(name)} is damaged: {error}") from None
        return record

    def _not_found(self, name: str) -> AdapterNotFound:
        return AdapterNotFound(f"no adapter {name!r} in the store at {self._bucket.location}")


def _key(name: str) -> str:
    return f"names/{check_name(name)}.json"
