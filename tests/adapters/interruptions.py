"""Stops a publication at any of the points where it asks something of the disk.

Run as a script, it publishes again and again, each time killed (SIGKILL) one point later, and checks after
each that the store holds the old or the new state and that the next publication works.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from adapters.errors import AdapterNotFound
from adapters.store import AdapterStore
from tests.adapters.builders import PUBLISH, write_adapter

_POINTS: list[tuple[Any, str]] = [
    (os, "write"),
    (os, "fsync"),
    (Path, "mkdir"),
    (Path, "rename"),
    (Path, "replace"),
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


def _publish_and_die(root: Path, source: Path, at: int) -> bool:
    """Whether the publication came to its end before point `at`."""
    child = os.fork()
    if child == 0:
        with interrupted(at, lambda: os.kill(os.getpid(), signal.SIGKILL)):
            AdapterStore(root).publish(source, "a", **PUBLISH)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def main(directory: Path) -> None:
    old, new, other = (write_adapter(directory / str(seed), seed=seed) for seed in range(3))
    for before in (None, old):
        at, outcomes = 0, set()
        while True:
            store = AdapterStore(directory / f"store-{before is None}-{at}")
            expected_old = store.publish(before, "a", **PUBLISH).digest if before else None
            ended = _publish_and_die(store.root, new, at)
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
        print(f"killed at {at} points")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
