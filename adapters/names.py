"""What stores have in common: ids become versions by a name's record, and every change replaces a record whole."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable

from adapters.errors import InvalidAdapter, StoreUnavailable
from adapters.ids import DEFAULT_LABEL, check_digest, check_label, parse_adapter_id
from adapters.manifest import utc_now
from adapters.records import NameRecord, check_expected
from adapters.versions import Version

Change = Callable[[NameRecord], NameRecord]


class NamedVersions(ABC):
    """The part of a store that is said in terms of records. Raises StoreUnavailable from any method when the store
    fails, InvalidAdapterId for a malformed name, label, digest or id."""

    @abstractmethod
    def record(self, name: str) -> NameRecord:
        """What a name points at. Raises AdapterNotFound."""

    @abstractmethod
    def stamp(self, name: str) -> Hashable | None:
        """Changes whenever the name's record does; None when there is no such name."""

    @abstractmethod
    def version(self, record: NameRecord, digest: str) -> Version:
        """A version of a record, with its manifest."""

    @abstractmethod
    def _update(self, name: str, change: Change) -> NameRecord:
        """Replace a name's record by what `change` makes of it, if that is another; all others' changes come before
        or after. Raises AdapterNotFound, what `change` does."""

    @abstractmethod
    def _faults(self, digest: str) -> list[str]:
        """What of a version's files is not as it was published, one line a fault."""

    # Reading

    def resolve(self, adapter_id: str) -> Version:
        """The version that `name`, `name@label` or `name@sha256:…` means now. Raises AdapterNotFound."""
        parsed = parse_adapter_id(adapter_id)
        while True:
            stamp = self.stamp(parsed.name)
            record = self.record(parsed.name)
            try:
                return self.version(record, record.digest_of(parsed))
            except StoreUnavailable:
                if stamp is not None and self.stamp(parsed.name) == stamp:
                    raise  # else it was removed and collected in between: look again

    def verify(self, version: Version) -> None:
        """Hashes a version's files again. Raises InvalidAdapter that names each file that is not what was published."""
        if faults := self._faults(version.digest):
            raise InvalidAdapter(
                f"version {version.digest} of adapter {version.name!r} is damaged: {'; '.join(faults)}", faults=faults
            )

    # Changing

    def move_label(self, name: str, label: str, digest: str, *, expected: str | None = None) -> Version:
        """Point `name@label` at one of the name's versions, in one step. Returns that version.

        `expected` is the digest that the label points at now, or ABSENT; None moves it from wherever it is.
        Raises AdapterNotFound, LabelMoved when it is elsewhere.
        """
        target = parse_adapter_id(f"{name}@{check_digest(digest)}")
        check_label(label)
        check_expected(expected)

        def move(record: NameRecord) -> NameRecord:
            record.expect(label, expected)
            return record.with_label(label, record.digest_of(target), utc_now())

        return self.version(self._update(name, move), digest)

    def rollback(self, name: str, label: str = DEFAULT_LABEL, *, expected: str | None = None) -> Version:
        """Point `name@label` where it pointed before its last move; a second rollback undoes the first.

        Raises AdapterNotFound when there is no such version, LabelMoved as `move_label` does.
        """
        check_label(label)
        check_expected(expected)

        def move(record: NameRecord) -> NameRecord:
            record.expect(label, expected)
            return record.rolled_back(label, utc_now())

        record = self._update(name, move)
        return self.version(record, record.labels[label])

    def remove_label(self, name: str, label: str) -> None:
        """Raises AdapterNotFound, AdapterInUse for `latest`, which every name has."""
        check_label(label)
        self._update(name, lambda record: record.without_label(label, utc_now()))

    def remove_version(self, name: str, digest: str) -> None:
        """Forget one version of a name; its files stay until they are collected.

        Raises AdapterNotFound, AdapterInUse while labels point at it.
        """
        check_digest(digest)
        self._update(name, lambda record: record.without_version(digest))
