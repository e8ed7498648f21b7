"""The store as the churn changes it, and what each label may have meant at which time."""

import itertools
import random
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from adapters.errors import AdapterInUse, AdapterNotFound
from adapters.store import AdapterStore, Version
from server.base.resolve import BaseModel
from tests.support.churn.contents import Contents

LABELS = ("latest", "prod")
MAX_VERSIONS = 4  # of a name; the oldest without a label go, and their files with them


@dataclass(frozen=True, slots=True)
class Move:
    """A label pointed to `digest` from some moment between `began` and `ended` on (time.monotonic)."""

    began: float
    ended: float
    digest: str


@dataclass(slots=True)
class _Name:
    lock: threading.Lock = field(default_factory=threading.Lock)  # one change at a time, so that moves have an order
    sources: dict[str, Path] = field(default_factory=dict)  # every content that it ever had
    moves: defaultdict[str, list[Move]] = field(default_factory=lambda: defaultdict(list))  # of each label


class Catalog:
    """The names and every change to them. Methods may be called from several threads; `contents` is used under a
    lock."""

    def __init__(self, store: AdapterStore, base: BaseModel, contents: Contents, num_names: int) -> None:
        self._store = store
        self._base = base
        self._contents = contents
        self._making = threading.Lock()
        self._names = {f"adapter-{i}": _Name() for i in range(num_names)}
        self.names = tuple(self._names)
        for name in self.names:
            version = self._publish(name, self._new_source())
            self._move(name, "prod", version.digest)

    # What requests may name, and what must come of it

    def may_mean(self, name: str, label: str, since: float, until: float) -> set[str]:
        """What the label can have meant to a request that looked between `since` and `until`."""
        moves = self._names[name].moves[label]
        followed_at = [move.ended for move in moves[1:]] + [float("inf")]
        return {m.digest for m, end in zip(moves, followed_at, strict=True) if m.began <= until and end >= since}

    def known(self, name: str) -> list[str]:
        """Digests that the name has or had not long ago."""
        return list(self._names[name].sources)[-2 * MAX_VERSIONS :]

    def sources(self) -> dict[str, Path]:
        """Digest → the PEFT directory it was published from."""
        return {digest: path for entry in self._names.values() for digest, path in entry.sources.items()}

    @property
    def num_swaps(self) -> int:
        """How often a label came to mean another digest."""
        moves = [moves for entry in self._names.values() for moves in entry.moves.values()]
        return sum(one.digest != other.digest for each in moves for one, other in itertools.pairwise(each))

    # Changes

    def relabel(self, rng: random.Random) -> None:
        """Point one label to another version of its name, or back."""
        name, label = rng.choice(self.names), rng.choice(LABELS)
        with self._names[name].lock:
            if rng.random() < 0.2:
                self._roll_back(name, label)
            else:
                self._move(name, label, rng.choice(self._store.record(name).versions[::-1]))

    def import_again(self, rng: random.Random) -> None:
        """Publish under a name what it never had, or had before; forget the oldest that is too much."""
        name = rng.choice(self.names)
        entry = self._names[name]
        with entry.lock:
            self._publish(name, self._new_source() if rng.random() < 0.5 else rng.choice(list(entry.sources.values())))
            for digest in self._store.record(name).versions[:-MAX_VERSIONS]:
                try:
                    self._store.remove_version(name, digest)
                except AdapterInUse:
                    continue  # a label points to it

    def collect(self) -> None:
        """Remove the files that no name has any more, but for those in use."""
        self._store.gc()

    def _new_source(self) -> Path:
        with self._making:
            return self._contents.make()

    def _publish(self, name: str, source: Path) -> Version:
        began = time.monotonic()
        version = self._store.publish(
            source,
            name,
            base_digest=self._base.digest,
            base_name=self._base.name,
            linears=self._base.spec.linears(),
        )
        self._names[name].sources[version.digest] = source
        self._names[name].moves["latest"].append(Move(began, time.monotonic(), version.digest))
        return version

    def _move(self, name: str, label: str, digest: str) -> None:
        began = time.monotonic()
        self._store.move_label(name, label, digest)
        self._names[name].moves[label].append(Move(began, time.monotonic(), digest))

    def _roll_back(self, name: str, label: str) -> None:
        began = time.monotonic()
        try:
            digest = self._store.rollback(name, label).digest
        except AdapterNotFound:
            return  # it was nowhere before, or that version is gone
        self._names[name].moves[label].append(Move(began, time.monotonic(), digest))
