"""What a name of the store points at: its labels, its versions, and how the labels moved. Plain values, no files."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from adapters.errors import AdapterInUse, AdapterNotFound, LabelMoved
from adapters.ids import DEFAULT_LABEL, AdapterId, check_digest, is_digest, is_name

ABSENT = "absent"  # what to expect of a label that is not to exist yet
_HISTORY_LENGTH = 256


def check_expected(expected: str | None) -> None:
    """Of a label: a digest, ABSENT, or None for whatever. Raises InvalidAdapterId."""
    if expected is not None and expected != ABSENT:
        check_digest(expected)


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelMove:
    """A label came to point at `digest`; `previous` is where it pointed before. None is nowhere: a label that was
    removed, or was not there. `at` is RFC 3339."""

    label: str
    digest: str | None
    previous: str | None
    at: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NameRecord:
    """All of one name. `versions` are digests in the order they were first published, `history` the last moves.

    There is always a label `latest`, and every label points at one of the versions: else ValueError. `nonces`, in a
    remote store, are of the last writes, so that a writer knows whether its own was one of them.
    """

    name: str
    labels: Mapping[str, str]
    versions: tuple[str, ...]
    history: tuple[LabelMove, ...]
    nonces: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not is_name(self.name) or not all(map(is_digest, self.versions)):
            raise ValueError("its name or a digest is malformed")
        if DEFAULT_LABEL not in self.labels or not set(self.labels.values()) <= set(self.versions):
            raise ValueError("its labels do not fit its versions")

    def digest_of(self, adapter_id: AdapterId) -> str:
        """The version an id of this name means. Raises AdapterNotFound."""
        if adapter_id.digest is not None:
            if adapter_id.digest not in self.versions:
                raise AdapterNotFound(f"adapter {self.name!r} has no version {adapter_id.digest}")
            return adapter_id.digest
        assert adapter_id.label is not None, "an id has a label or a digest"
        if (digest := self.labels.get(adapter_id.label)) is None:
            known = ", ".join(sorted(self.labels)) or "none"
            raise AdapterNotFound(f"adapter {self.name!r} has no label {adapter_id.label!r}; it has: {known}")
        return digest

    def labels_of(self, digest: str) -> tuple[str, ...]:
        """The labels that point at a version, sorted."""
        return tuple(sorted(label for label, target in self.labels.items() if target == digest))

    def expect(self, label: str, expected: str | None) -> None:
        """Raises LabelMoved unless `label` points at `expected`; ABSENT is that there is none, None is whatever."""
        found = self.labels.get(label, ABSENT)
        if expected is not None and expected != found:
            raise LabelMoved(f"label {label!r} of adapter {self.name!r} is {found}, not {expected} as expected")

    def with_label(self, label: str, digest: str, at: str) -> "NameRecord":
        """The record after `label` moved to `digest`, be it a new version; the same record when it is there already."""
        previous = self.labels.get(label)
        if previous == digest:
            return self
        return replace(
            self,
            labels={**self.labels, label: digest},
            versions=self.versions if digest in self.versions else (*self.versions, digest),
            history=self._history(label, digest, at),
        )

    def rolled_back(self, label: str, at: str) -> "NameRecord":
        """The record after `label` went back to where it was before its last move. Raises AdapterNotFound."""
        last = next((move for move in reversed(self.history) if move.label == label), None)
        if last is None or last.previous is None:
            raise AdapterNotFound(f"label {label!r} of adapter {self.name!r} has no earlier version to go back to")
        if last.previous not in self.versions:
            raise AdapterNotFound(
                f"adapter {self.name!r} has no version {last.previous} any more, which its label {label!r} had before"
            )
        return self.with_label(label, last.previous, at)

    def without_label(self, label: str, at: str) -> "NameRecord":
        """The record after `label` was removed. Raises AdapterNotFound, AdapterInUse for `latest`."""
        if label not in self.labels:
            raise AdapterNotFound(f"adapter {self.name!r} has no label {label!r}")
        if label == DEFAULT_LABEL:
            raise AdapterInUse(
                f"label {DEFAULT_LABEL!r} is what the bare name {self.name!r} means: move it, or remove the adapter"
            )
        labels = {name: digest for name, digest in self.labels.items() if name != label}
        return replace(self, labels=labels, history=self._history(label, None, at))

    def without_version(self, digest: str) -> "NameRecord":
        """The record without one of its versions. Raises AdapterNotFound, AdapterInUse while labels point at it."""
        if digest not in self.versions:
            raise AdapterNotFound(f"adapter {self.name!r} has no version {digest}")
        if labels := self.labels_of(digest):
            raise AdapterInUse(f"version {digest} of adapter {self.name!r} is labelled {', '.join(labels)}: move that")
        return replace(self, versions=tuple(version for version in self.versions if version != digest))

    def _history(self, label: str, digest: str | None, at: str) -> tuple[LabelMove, ...]:
        move = LabelMove(label=label, digest=digest, previous=self.labels.get(label), at=at)
        return (*self.history, move)[-_HISTORY_LENGTH:]


def published(
    record: NameRecord | None, name: str, label: str, digest: str, at: str, expected: str | None
) -> NameRecord:
    """A name's record, None for a new name, after the publication of a version. Raises LabelMoved."""
    if record is not None:
        record.expect(label, expected)
        return record.with_label(label, digest, at)
    if expected not in (None, ABSENT):
        raise LabelMoved(f"label {label!r} of adapter {name!r} is {ABSENT}, not {expected} as expected")
    return new_record(name, label, digest, at)


def new_record(name: str, label: str, digest: str, at: str) -> NameRecord:
    """A name's first record. `latest` is set whatever the label, so that a bare name always means something."""
    move = LabelMove(label=DEFAULT_LABEL, digest=digest, previous=None, at=at)
    record = NameRecord(name=name, labels={DEFAULT_LABEL: digest}, versions=(digest,), history=(move,))
    return record.with_label(label, digest, at)
