"""Stops a change of a store at any of the points where it asks something of the disk.

Run as a script, it makes each change again and again, each time killed (SIGKILL) one point later, and checks after
each that the store holds the old or the new state and that the next change works.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from adapters.errors import AdapterNotFound
from adapters.records import ABSENT, NameRecord
from adapters.store import AdapterStore
from adapters.versions import Version
from tests.adapters.builders import PUBLISH, write_adapter

_POINTS: list[tuple[Any, str]] = [
    (os, "write"),
    (os, "fsync"),
    (Path, "mkdir"),
    (Path, "rename"),
    (Path, "replace"),
    (Path, "unlink"),
    (os, "unlink"),
    (os, "rmdir"),
]


@contextlib.contextmanager
def interrupted(at: int, stop: Callable[[], None]) -> Iterator[None]:
    """Calls `stop` instead of the call to the disk with index `at`; the calls before and after go through."""
    passed = 0

    def guarded(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal passed
            passed += 1
            if passed == at + 1:
                stop()
            return real(*args, **kwargs)

        return call

    with contextlib.ExitStack() as patches:
        for owner, name in _POINTS:
            patches.enter_context(mock.patch.object(owner, name, guarded(getattr(owner, name))))
        yield


def digest_of(store: AdapterStore, adapter_id: str) -> str | None:
    try:
        version = store.resolve(adapter_id)
    except AdapterNotFound:
        return None
    store.verify(version)
    return version.digest


def _die_in(change: Callable[[], object], at: int) -> bool:
    """Whether the change came to its end before point `at`."""
    child = os.fork()
    if child == 0:
        with interrupted(at, lambda: os.kill(os.getpid(), signal.SIGKILL)):
            change()
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def _publications(directory: Path, old: Path, new: Path, other: Path) -> None:
    for before in (None, old):
        at, outcomes = 0, set()
        while True:
            store = AdapterStore(directory / f"store-{before is None}-{at}")
            expected_old = store.publish(before, "a", **PUBLISH).digest if before else None
            ended = _die_in(lambda store=store: store.publish(new, "a", **PUBLISH), at)
            found = digest_of(store, "a")
            published = store.publish(other, "b", **PUBLISH)
            assert list((store.root / "staging").iterdir()) == [], "what a dead process left is swept up"
            assert digest_of(store, "b") == published.digest
            assert digest_of(store, "a") == found, "another's publication changes nothing"
            new_digest = store.publish(new, "a", **PUBLISH).digest
            assert found in (expected_old, new_digest), f"killed at {at}: neither old nor new"
            assert digest_of(store, "a") == new_digest
            outcomes.add(found == new_digest)
            if ended:
                break
            at += 1
        assert outcomes == {False, True}
        print(f"publish: killed at {at} points")


def _made(root: Path, sources: list[Path]) -> AdapterStore:
    """`a` with three versions and the label `old` on the second; the first has no label."""
    store = AdapterStore(root)
    for source in sources:
        store.publish(source, "a", **PUBLISH)
    digests = store.record("a").versions
    store.move_label("a", "old", digests[1])
    return store


CHANGES: dict[str, Callable[[AdapterStore, tuple[str, ...]], object]] = {
    "move_label": lambda store, digests: store.move_label("a", "old", digests[0], expected=digests[1]),
    "new label": lambda store, digests: store.move_label("a", "new", digests[0], expected=ABSENT),
    "rollback": lambda store, digests: store.rollback("a"),
    "remove_label": lambda store, digests: store.remove_label("a", "old"),
    "remove_version": lambda store, digests: store.remove_version("a", digests[0]),
    "remove": lambda store, digests: store.remove("a"),
}


def _record_of(store: AdapterStore) -> NameRecord | None:
    try:
        return store.record("a")
    except AdapterNotFound:
        return None


def _without_times(record: NameRecord | None) -> object:
    return record and replace(record, history=tuple(replace(move, at="") for move in record.history))


def _moves(directory: Path, sources: list[Path]) -> None:
    for kind, change in CHANGES.items():
        at, outcomes = 0, set()
        while True:
            store = _made(directory / f"{kind}-{at}", sources)
            old = _record_of(store)
            assert old is not None
            digests = old.versions
            ended = _die_in(partial(change, store, digests), at)
            found = _record_of(store)
            if found == old:
                change(store, digests)
                outcomes.add("old")
            else:
                outcomes.add("new")
                found_again, expected = found, _made(directory / f"{kind}-{at}-expected", sources)
                change(expected, digests)
                assert _without_times(found_again) == _without_times(_record_of(expected)), f"{kind} killed at {at}"
            store.publish(sources[0], "b", **PUBLISH)
            assert list((store.root / "staging").iterdir()) == []
            for digest in digests:
                store.verify(Version("a", digest, store.fetch(digest), (), store.resolve("b").manifest))
            if ended:
                break
            at += 1
        assert outcomes == {"old", "new"}, kind
        print(f"{kind}: killed at {at} points")


def _collections(directory: Path, sources: list[Path]) -> None:
    at = 0
    while True:
        store = _made(directory / f"gc-{at}", sources)
        garbage, kept, latest = store.record("a").versions
        store.remove_version("a", garbage)
        ended = _die_in(store.gc, at)
        for adapter_id in ("a", f"a@{kept}"):
            assert digest_of(store, adapter_id) in (kept, latest)
        store.gc()
        assert not (store.root / "versions" / garbage.replace(":", "-")).exists()
        assert len(list((store.root / "versions").iterdir())) == 2
        assert list((store.root / "staging").iterdir()) == []
        assert store.publish(sources[0], "a", **PUBLISH).digest == garbage
        assert digest_of(store, "a") == garbage
        if ended:
            break
        at += 1
    print(f"gc: killed at {at} points")


def main(directory: Path) -> None:
    old, new, other = sources = [write_adapter(directory / str(seed), seed=seed) for seed in range(3)]
    _publications(directory, old, new, other)
    _moves(directory, sources)
    _collections(directory, sources)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
