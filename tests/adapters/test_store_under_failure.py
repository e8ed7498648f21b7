import errno
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest

from adapters.errors import AdapterError, StoreFull, StoreUnavailable
from adapters.store import AdapterStore
from tests.adapters.builders import PUBLISH, config, tensors, write_adapter
from tests.adapters.interruptions import CHANGES, digest_of, interrupted

ROOT = Path(__file__).parents[2]


def state(store: AdapterStore) -> tuple[list[str], list[str], list[str]]:
    """The names, versions and leftovers on disk."""
    found = (sorted(path.name for path in (store.root / part).glob("*")) for part in ("names", "versions", "staging"))
    names, versions, staging = found
    return names, versions, staging


def failing(number: int) -> Callable[[], None]:
    def stop() -> None:
        raise OSError(number, os.strerror(number))

    return stop


def outcome(store: AdapterStore, source: Path) -> str | AdapterError:
    try:
        return store.publish(source, "a", **PUBLISH).digest
    except AdapterError as error:
        return error


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, StoreFull),
        (errno.EDQUOT, StoreFull),
        (errno.EIO, StoreUnavailable),
        (errno.EROFS, StoreUnavailable),
    ],
)
@pytest.mark.parametrize("had_one", [False, True])
def test_a_failing_disk_leaves_the_old_state_wherever_it_fails(
    number: int, expected: type[AdapterError], had_one: bool, tmp_path: Path
) -> None:
    old, new = (write_adapter(tmp_path / f"source{seed}", seed=seed) for seed in range(2))
    store = AdapterStore(tmp_path / "store")
    old_digest = store.publish(old, "a", **PUBLISH).digest if had_one else None
    before = state(store)
    at = 0
    while True:
        with interrupted(at, failing(number)):
            result = outcome(store, new)
        if isinstance(result, str):
            break
        assert type(result) is expected
        assert str(store.root) in result.message
        assert expected is not StoreFull or re.search(r"; \d+ bytes are needed", result.message)
        names, versions, staging = state(store)
        assert staging == []
        if digest_of(store, "a") == old_digest:
            assert (names, versions) == before[:2]
        else:  # the label moved, and only making that durable failed
            assert len(names) == 1
            store = AdapterStore(tmp_path / "another")
            old_digest = store.publish(old, "a", **PUBLISH).digest if had_one else None
        at += 1
    assert at > 10
    assert digest_of(store, "a") == result


def test_a_first_publication_is_on_disk_with_all_directories_above_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut takes what was put into a directory after that was last synced."""
    put: set[Path] = set()
    lost: set[Path] = set()
    mkdir, fsync, rename, replace = Path.mkdir, os.fsync, Path.rename, Path.replace

    def putting(path: Path) -> None:
        put.add(path)
        lost.add(path)

    def making(path: Path, *args: Any, **kwargs: Any) -> None:
        if not path.exists():
            putting(path)
        mkdir(path, *args, **kwargs)

    def moving(move: Callable[[Path, Path], Path], path: Path, target: Path) -> Path:
        putting(target)
        return move(path, target)

    def syncing(fd: int) -> None:
        synced = Path(f"/proc/self/fd/{fd}").readlink()
        lost.difference_update([path for path in lost if path.parent == synced])
        fsync(fd)

    monkeypatch.setattr(Path, "mkdir", making)
    monkeypatch.setattr(Path, "rename", lambda path, target: moving(rename, path, target))
    monkeypatch.setattr(Path, "replace", lambda path, target: moving(replace, path, target))
    monkeypatch.setattr(os, "fsync", syncing)
    store = AdapterStore(tmp_path / "new" / "store")
    version = store.publish(write_adapter(tmp_path / "source"), "a", **PUBLISH)
    wanted = {version.path, store.root / "names" / "a.json"}
    wanted |= {parent for path in wanted for parent in path.parents if parent.is_relative_to(tmp_path / "new")}
    assert wanted <= put
    assert not wanted & lost


def test_a_full_disk(tmp_path: Path) -> None:
    """On a file system of 256 KiB, where this user may mount one."""
    mount = tmp_path / "small"
    mount.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", mount], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("may not mount a file system here; the cases above inject the same error")
    try:
        store = AdapterStore(mount / "store")
        store.publish(write_adapter(tmp_path / "small_one"), "a", **PUBLISH)
        before = state(store)
        wide = {name: np.ones((4, 8000), dtype=np.float32) for name in tensors() if "lora_A" in name}
        wide |= {name: value for name, value in tensors().items() if "lora_B" in name}
        source = write_adapter(tmp_path / "large_one", wide, config())
        linears = {path: (out, 8000) for path, (out, _) in PUBLISH["linears"].items()}
        with pytest.raises(StoreFull, match=r"No space left on device\); \d{6} bytes are needed"):
            store.publish(source, "a", **{**PUBLISH, "linears": linears})
        assert state(store) == before
        store.publish(write_adapter(tmp_path / "another", seed=3), "a", **PUBLISH)
    finally:
        subprocess.run(["umount", mount], check=True)


def test_a_file_size_limit_is_a_full_store(tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "source")
    store = AdapterStore(tmp_path / "store")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
    try:
        with pytest.raises(StoreFull, match="File too large"):
            store.publish(source, "a", **PUBLISH)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert state(store) == ([], [], [])


def test_a_root_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("")
    store = AdapterStore(tmp_path / "store")
    with pytest.raises(StoreUnavailable, match=str(store.root)):
        store.publish(write_adapter(tmp_path / "source"), "a", **PUBLISH)
    with pytest.raises(StoreUnavailable, match="Not a directory"):
        store.resolve("a")
    with pytest.raises(StoreUnavailable):
        store.names()


def test_a_version_that_went_away(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "store")
    version = store.publish(write_adapter(tmp_path / "source"), "a", **PUBLISH)
    version.path.rename(tmp_path / "gone")
    with pytest.raises(StoreUnavailable, match=r"manifest\.json cannot be used: No such file"):
        store.resolve("a")


def run(*arguments: str | Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )


def test_killed_at_each_point_the_old_or_the_new_state_is_left(tmp_path: Path) -> None:
    ran = run(ROOT / "tests/adapters/interruptions.py", tmp_path)
    output, _ = ran.communicate(timeout=240)
    assert ran.returncode == 0
    points = dict(re.findall(r"(.*): killed at (\d+) points", output))
    assert points.keys() == {"publish", "gc", *CHANGES}
    assert all(int(count) > (1 if change == "remove" else 5) for change, count in points.items())


def publish_two_at_once(store: AdapterStore, mine: Path, other: Path, at: int) -> tuple[str, str | None]:
    """Publishes `other` while the publication of `mine` is at its point `at`; None: it has no such point."""
    found: list[str] = []
    thread = Thread(target=lambda: found.append(store.publish(other, "a", label="other", **PUBLISH).digest))

    def meet() -> None:
        thread.start()
        thread.join(0.2)  # it comes to its end, or waits for the lock that this one holds

    with interrupted(at, meet):
        digest = store.publish(mine, "a", label="mine", **PUBLISH).digest
    if thread.ident is None:
        return digest, None
    thread.join()
    return digest, found[0]


def test_another_publication_at_any_point_loses_nothing(tmp_path: Path) -> None:
    first, second, third = (write_adapter(tmp_path / f"source{seed}", seed=seed) for seed in range(3))
    at = 0
    while True:
        store = AdapterStore(tmp_path / f"store{at}")
        old = store.publish(third, "a", **PUBLISH).digest
        mine, other = publish_two_at_once(store, first, second, at)
        if other is None:
            break
        assert store.record("a").labels == {"latest": old, "mine": mine, "other": other}
        assert len(store.record("a").history) == 3
        assert state(store)[2] == []
        at += 1
    assert at > 10


PUBLISHER = """
import sys
from pathlib import Path
from threading import Thread
from adapters.store import AdapterStore
from tests.adapters.builders import PUBLISH
store = AdapterStore(Path(sys.argv[1]))
for source in map(Path, sys.argv[2:]):
    print(store.publish(source, "shared", **PUBLISH).digest, store.publish(source, source.name, **PUBLISH).digest)
"""


def test_publishers_and_readers_at_once(tmp_path: Path) -> None:
    """Four processes publish to one name and to names of their own; half of the content is the same in two of them."""
    sources = [write_adapter(tmp_path / f"s{seed}", seed=seed) for seed in range(8)]
    store = AdapterStore(tmp_path / "store")
    shares = [sources[0:4], sources[2:6], sources[4:8], sources[6:8] + sources[0:2]]
    publishers = [run("-c", PUBLISHER, store.root, *share, *share) for share in shares]
    seen = set()
    while any(publisher.poll() is None for publisher in publishers):
        for name in store.names():
            version = store.resolve(name)
            store.verify(version)
            seen.add(version.digest)
    digests: set[str] = set()
    for publisher in publishers:
        output, _ = publisher.communicate()
        assert publisher.returncode == 0
        digests |= set(output.split())

    assert len(digests) == 8
    assert seen <= digests
    record = store.record("shared")
    assert set(record.versions) == digests
    assert len(record.versions) == 8
    for earlier, later in zip(record.history, record.history[1:], strict=False):
        assert later.previous == earlier.digest
    assert record.labels == {"latest": record.history[-1].digest}
    names, versions, staging = state(store)
    assert names == sorted(["shared.json", *(f"{source.name}.json" for source in sources)])
    assert versions == sorted(digest.replace(":", "-") for digest in digests)
    assert staging == []
