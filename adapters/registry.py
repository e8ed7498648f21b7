"""The serving process's view of the store: ids to versions, at the cost of one stat a request."""

import base64
import binascii
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from adapters.errors import AdapterNotFound, BaseMismatch, InvalidAdapterId, InvalidPage, StoreUnavailable
from adapters.ids import DEFAULT_LABEL, check_name, parse_adapter_id
from adapters.records import NameRecord
from adapters.stores import Stamp, Store
from adapters.versions import Version

DEFAULT_PAGE_SIZE = 50
MAX_PAGE_SIZE = 1000


@dataclass(frozen=True, slots=True)
class AdapterEntry:
    """A name in the store. `version` is what the bare name means (its label `latest`); `labels` maps label → digest;
    `digests` are all versions, the newest first; `matches_base` is whether `version` was made for the base served."""

    name: str
    version: Version
    labels: Mapping[str, str]
    digests: tuple[str, ...]
    matches_base: bool


@dataclass(slots=True)
class _Known:
    """A record as last read, and the versions looked up in it. `stamp` was taken before reading, so that a change
    in between is seen the next time."""

    stamp: Stamp | None
    record: NameRecord
    versions: dict[str, Version] = field(default_factory=dict)


class AdapterRegistry:
    """Sees a publication from the moment its label has moved. `base_name` only makes messages readable.

    May be used from several threads. Its methods wait for the network if the store is remote. Raises
    StoreUnavailable when the store fails.
    """

    def __init__(self, store: Store, base_digest: str, base_name: str = "the base being served") -> None:
        self.store = store
        self.base_digest = base_digest
        self._base_name = base_name
        self._known: dict[str, _Known] = {}

    def resolve(self, adapter_id: str) -> Version:
        """The version an id means now. Raises InvalidAdapterId, AdapterNotFound, BaseMismatch."""
        parsed = parse_adapter_id(adapter_id)
        _, version = self._look_up(parsed.name, lambda record: record.digest_of(parsed))
        made_for = version.manifest
        if made_for.base_digest != self.base_digest:
            raise BaseMismatch(
                f"adapter {adapter_id!r} was made for {made_for.base_name} ({made_for.base_digest}), "
                f"not for {self._base_name} ({self.base_digest})"
            )
        return version

    def get(self, name: str) -> AdapterEntry:
        """One name, whatever base it was made for. Raises InvalidAdapterId, AdapterNotFound."""
        record, version = self._look_up(check_name(name), lambda record: record.labels[DEFAULT_LABEL])
        return AdapterEntry(
            name=name,
            version=version,
            labels=record.labels,
            digests=tuple(reversed(record.versions)),
            matches_base=version.manifest.base_digest == self.base_digest,
        )

    def list(self, page_size: int, page_token: str) -> tuple[list[AdapterEntry], str]:
        """A page of what `get` gives, in the order of names, and the next page's token, "" after the last (AIP-158).

        `page_size` 0 means 50, more than 1000 means 1000. Raises InvalidPage for a negative size or a token that
        this method did not make.
        """
        if page_size < 0:
            raise InvalidPage("page_size", f"{page_size} is negative")
        size = min(page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)
        after = _decode_token(page_token)
        names = [name for name in self.store.names() if name > after]
        entries = [entry for name in names[:size] if (entry := self._get_if_there(name))]
        return entries, _encode_token(names[size - 1]) if len(names) > size else ""

    def _get_if_there(self, name: str) -> AdapterEntry | None:
        try:
            return self.get(name)
        except AdapterNotFound:  # removed since the names were read
            return None

    def _look_up(self, name: str, pick: Callable[[NameRecord], str]) -> tuple[NameRecord, Version]:
        """A name's record now, and the version of it that `pick` chooses."""
        while True:
            known = self._current(name)
            try:
                return known.record, self._version(known, pick(known.record))
            except StoreUnavailable:
                if known.stamp is not None and self.store.stamp(name) == known.stamp:
                    raise  # else it was removed and collected in between: look again

    def _current(self, name: str) -> _Known:
        stamp = self.store.stamp(name)
        known = self._known.get(name)
        if known is None or stamp is None or known.stamp != stamp:  # None: it came after that look, or is gone
            self._known.pop(name, None)
            known = self._known[name] = _Known(stamp, self.store.record(name))
        return known

    def _version(self, known: _Known, digest: str) -> Version:
        if (version := known.versions.get(digest)) is None:
            version = known.versions[digest] = self.store.version(known.record, digest)
        return version


def _encode_token(name: str) -> str:
    return base64.urlsafe_b64encode(f"after:{name}".encode()).decode()


def _decode_token(token: str) -> str:
    """The name that a page begins after; "" for the first page."""
    if not token:
        return ""
    try:
        kind, _, name = base64.b64decode(token, altchars=b"-_", validate=True).decode().partition(":")
        if kind == "after":
            return check_name(name)
    except (binascii.Error, ValueError, InvalidAdapterId):  # ValueError: not ASCII, not UTF-8
        pass
    raise InvalidPage("page_token", "is not one that this server gave out")
