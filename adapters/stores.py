"""What every adapter store can do, and which one a location means."""

import os
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Protocol

from adapters.errors import StoreUnavailable
from adapters.files import expand_user
from adapters.layout import Limits
from adapters.leases import Lease
from adapters.manifest import TrainingInfo
from adapters.records import NameRecord
from adapters.store import AdapterStore, default_store_root
from adapters.versions import Collected, Version

__all__ = ["Stamp", "Store", "default_store_root", "open_store"]

Stamp = Hashable


class Store(Protocol):
    """A store on disk (`adapters.store.AdapterStore`, whose docstrings say what each method does and raises) or on
    an S3-compatible service (`adapters.remote.RemoteStore`, where any of them may wait for the network)."""

    @property
    def location(self) -> str: ...

    @property
    def is_remote(self) -> bool: ...

    @property
    def is_away(self) -> bool: ...

    def resolve(self, adapter_id: str) -> Version: ...

    def names(self) -> list[str]: ...

    def record(self, name: str) -> NameRecord: ...

    def stamp(self, name: str) -> Stamp | None: ...

    def version(self, record: NameRecord, digest: str) -> Version: ...

    def verify(self, version: Version) -> None: ...

    def fetch(self, digest: str) -> Path: ...

    def lease(self, digest: str) -> Lease: ...

    def publish(
        self,
        source: Path,
        name: str,
        *,
        base_digest: str,
        base_name: str,
        linears: Mapping[str, tuple[int, int]],
        label: str = ...,
        expected: str | None = None,
        training: TrainingInfo | None = None,
        notes: str = "",
        limits: Limits = ...,
        allow_zero: bool = False,
        allow_base_mismatch: bool = False,
    ) -> Version: ...

    def move_label(self, name: str, label: str, digest: str, *, expected: str | None = None) -> Version: ...

    def rollback(self, name: str, label: str = ..., *, expected: str | None = None) -> Version: ...

    def remove(self, name: str) -> None: ...

    def remove_label(self, name: str, label: str) -> None: ...

    def remove_version(self, name: str, digest: str) -> None: ...

    def gc(self) -> Collected: ...


def open_store(location: str | os.PathLike[str] | None = None) -> Store:
    """The store at a directory, or at `s3://bucket/prefix`; None is the one in the user's data directory.

    Reads and writes nothing yet. Raises StoreUnavailable for an empty text, another scheme, one without its library.
    """
    text = str(default_store_root() if location is None else os.fspath(location))
    if not text:  # a variable that is not set: not the directory that one happens to be in
        raise StoreUnavailable("--store is empty; use a directory or s3://bucket/prefix")
    scheme, separator, _ = text.partition("://")
    if not separator:
        return AdapterStore(expand_user(text))
    if scheme != "s3":
        raise StoreUnavailable(f"--store {text}: {scheme}:// is not supported; use a directory or s3://bucket/prefix")
    from adapters.remote import open_remote

    return open_remote(text)
