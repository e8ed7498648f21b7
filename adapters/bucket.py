"""A bucket of an S3-compatible service, through obstore: the only place that knows it, and its errors.

Endpoint, region and credentials come from the environment as AWS's own tools take them: AWS_ENDPOINT_URL,
AWS_REGION, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN; or from the machine's role.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.errors import AdapterError, StoreUnavailable

if TYPE_CHECKING:
    from obstore.store import S3Store

_LOCATION = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])((?:/[A-Za-z0-9!_.*'()-]+)*)/?", re.ASCII)
_ENDPOINT = re.compile(
    r"https?://(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::(\d{1,5}))?(?:/[A-Za-z0-9._~/-]*)?", re.ASCII
)
_CHUNK_BYTES = 4 << 20
_MAX_OBJECT_BYTES = 16 << 20  # of what is read whole: records and manifests
# What one try of a call may take. A file may be large; for all else it is how soon an outage is noticed.
_QUICK_SECONDS = 3
_FILE_SECONDS = 900
_SILENT_SECONDS = 30  # in the middle of a file; also what one part of an upload may take
_PARTS_AT_ONCE = 4  # of 5 MiB, which share the line
RETRY_AFTER = 2.0


class Conflict(Exception):
    """An object is not what it was to replace: someone else has written it meanwhile."""


@dataclass(frozen=True, slots=True)
class Object:
    """An object's bytes, and the tag that changes when they do."""

    data: bytes
    etag: str


@dataclass(frozen=True, slots=True)
class Stored:
    """An object in a listing."""

    key: str
    size_bytes: int


class Bucket:
    """Keys are below the location's prefix. Any method raises StoreUnavailable when the service is away or refuses."""

    def __init__(self, location: str, quick: "S3Store", bulk: "S3Store") -> None:
        self.location = location
        self._quick = quick
        self._bulk = bulk

    def read(self, key: str, known: Object | None = None) -> Object | None:
        """The object, None if there is none; `known` itself if that is what is still there."""
        import obstore
        from obstore.exceptions import NotModifiedError

        try:
            with self._errors(key, may_be_missing=True):
                found = obstore.get(self._quick, key, options={"if_none_match": known.etag} if known else None)
                if found.meta["size"] > _MAX_OBJECT_BYTES:
                    raise StoreUnavailable(f"{self.location}/{key} is damaged: {found.meta['size']} bytes")
                return Object(bytes(found.bytes()), _etag(found.meta, key))
        except NotModifiedError:
            return known
        except FileNotFoundError:
            return None

    def write(self, key: str, data: bytes, replaces: Object | None) -> Object:
        """Write an object in the place of `replaces`, None for nothing. Raises Conflict when that is not there now."""
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        try:
            with self._errors(key):
                mode: Any = {"e_tag": replaces.etag} if replaces else "create"
                return Object(data, _etag(obstore.put(self._quick, key, data, mode=mode), key))
        except (AlreadyExistsError, PreconditionError) as error:
            raise Conflict(key) from error

    def overwrite(self, key: str, data: bytes | Path) -> None:
        """Write an object, or a file as one, whatever is there."""
        import obstore

        with self._errors(key):
            store = self._bulk if isinstance(data, Path) else self._quick
            obstore.put(store, key, data, max_concurrency=_PARTS_AT_ONCE)

    def chunks(self, key: str) -> Iterator[bytes]:
        """The bytes of an object, in order. Raises FileNotFoundError."""
        import obstore

        with self._errors(key, may_be_missing=True):
            for chunk in obstore.get(self._bulk, key).stream(min_chunk_size=_CHUNK_BYTES):
                yield bytes(chunk)

    def find(self, folder: str) -> list[Stored]:
        """All objects below `folder`."""
        import obstore

        with self._errors(folder):
            return [Stored(item["path"], item["size"]) for chunk in obstore.list(self._quick, folder) for item in chunk]

    def modified(self, key: str) -> float | None:
        """When the object was last written, in seconds since 1970; None if there is none."""
        import obstore

        try:
            with self._errors(key, may_be_missing=True):
                when: datetime = obstore.head(self._quick, key)["last_modified"]
                return when.timestamp()
        except FileNotFoundError:
            return None

    def delete(self, key: str) -> None:
        """What is not there is fine."""
        import obstore

        with contextlib.suppress(FileNotFoundError), self._errors(key, may_be_missing=True):
            obstore.delete(self._quick, key)

    @contextlib.contextmanager
    def _errors(self, key: str, *, may_be_missing: bool = False) -> Iterator[None]:
        """Turns obstore's errors into the store's, but for those that are answers."""
        from obstore.exceptions import AlreadyExistsError, BaseError, NotModifiedError, PreconditionError

        try:
            yield
        except (AlreadyExistsError, NotModifiedError, PreconditionError):
            raise
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise self._unavailable(key, "there is no such bucket") from error
            if not may_be_missing:
                raise self._unavailable(key, _reason(str(error))) from error
            raise
        except BaseError as error:
            raise self._unavailable(key, _reason(str(error))) from error

    def _unavailable(self, key: str, reason: str) -> AdapterError:
        return StoreUnavailable(
            f"the adapter store at {self.location} cannot be used ({key}): {reason}", retry_after=RETRY_AFTER
        )


def _etag(meta: Any, key: str) -> str:
    etag: str | None = meta["e_tag"]
    if etag is None:
        raise StoreUnavailable(f"the service gives no ETag for {key}: it cannot hold an adapter store")
    return etag


def _reason(text: str) -> str:
    """The one line of obstore's error that a person needs."""
    if found := re.search(r"<Code>(\w+)</Code><Message>([^<]*)</Message>", text):
        return f"{found[1]}: {found[2]}"
    return text.splitlines()[0].strip()[:300] if text.strip() else "no reason was given"


def open_bucket(location: str) -> Bucket:
    """The bucket and prefix of an `s3://bucket/prefix`; nothing is sent yet. Raises StoreUnavailable."""
    match = _LOCATION.fullmatch(location)
    if match is None or ".." in location:
        raise StoreUnavailable(f"--store {location}: is not s3://bucket or s3://bucket/prefix")
    try:
        from obstore.exceptions import BaseError
        from obstore.store import S3Store
    except ImportError:
        raise StoreUnavailable(f"--store {location}: needs obstore; pip install 'lorikeet[remote]'") from None
    is_plain = _endpoint().startswith("http://")

    def store(seconds: int) -> S3Store:
        return S3Store(
            match[1],
            prefix=match[2].strip("/") or None,
            client_options={
                "allow_http": is_plain,
                "connect_timeout": "2s",
                "read_timeout": f"{_SILENT_SECONDS}s",
                "timeout": f"{seconds}s",
            },
            retry_config={"max_retries": 1, "retry_timeout": timedelta(seconds=seconds)},
        )

    try:
        return Bucket(location.rstrip("/"), store(_QUICK_SECONDS), store(_FILE_SECONDS))
    except (BaseError, ValueError) as error:  # a variable, or the prefix, that it does not take
        raise StoreUnavailable(f"--store {location}: {_reason(str(error))}") from error


def _endpoint() -> str:
    """The service's URL as the environment says it; empty: AWS. Raises StoreUnavailable: obstore panics at no URL."""
    found = ""
    for variable in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        if (said := os.environ.get(variable)) is not None:
            match = _ENDPOINT.fullmatch(said)
            if match is None or int(match[1] or 0) > 65535:
                raise StoreUnavailable(f"{variable}={said!r:.80}: is not the URL of a service, http://… or https://…")
            found = said
    return found
