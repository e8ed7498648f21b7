"""What a name of the store points at: its labels, its versions, and how the labels moved. Plain values, no files."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from adapters.errors import AdapterNotFound
from adapters.ids import DEFAULT_LABEL, AdapterId, is_digest, is_name

_HISTORY_LENGTH = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelMove:
    """A label came to point at `digest`; `previous` is where it pointed before, None for nowhere. `at` is RFC 3339."""

    label: str
    digest: str
    previous: str | None
    at: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NameRecord:
    """All of one name. `versions` are digests in the order they were first published, `history` the last moves.

    There is always a label `latest`, and every label points at one of the versions: else ValueError.
    """

    name: str
    labels: Mapping[str, str]
    versions: tuple[str, ...]
    history: tuple[LabelMove, ...]

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

    def with_label(self, label: str, digest: str, at: str) -> "NameRecord":
        """The record after `label` moved to `digest`; the same record when it is there already."""
        previous = self.labels.get(label)
        if previous == digest:
            return self
        move = LabelMove(label=label, digest=digest, previous=previous, at=at)
        return replace(
            self,
            labels={**self.labels, label: digest},
            versions=self.versions if digest in self.versions else (*self.versions, digest),
            history=(*self.history, move)[-_HISTORY_LENGTH:],
        )


def new_record(name: str, label: str, digest: str, at: str) -> NameRecord:
    """A name's first record. `latest` is set whatever the label, so that a bare name always means something."""
    move = LabelMove(label=DEFAULT_LABEL, digest=digest, previous=None, at=at)
    record = NameRecord(name=name, labels={DEFAULT_LABEL: digest}, versions=(digest,), history=(move,))
    return record.with_label(label, digest, at)
