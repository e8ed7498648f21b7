"""Leases and garbage collection: what is held stays, whoever holds it, until it is let go or its holder dies."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Event

import pytest

from adapters import versions
from adapters.errors import AdapterNotFound, InvalidAdapterId, StoreUnavailable
from adapters.layout import read_layout
from adapters.records import NameRecord
from adapters.registry import AdapterRegistry
from adapters.store import AdapterStore
from adapters.versions import Version
from tests.adapters.builders import BASE_DIGEST, LINEARS, PUBLISH, write_adapter

ROOT = Path(__file__).parents[2]


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "store")


@pytest.fixture
def version(store: AdapterStore, tmp_path: Path) -> Version:
    return store.publish(write_adapter(tmp_path / "source"), "a", **PUBLISH)


def test_what_no_name_has_is_collected(store: AdapterStore, version: Version, tmp_path: Path) -> None:
    other = store.publish(write_adapter(tmp_path / "other", seed=1), "a", **PUBLISH)
    assert store.gc().removed == []
    store.remove_version("a", version.digest)
    assert version.path.exists()
    size = sum(file.stat().st_size for file in version.path.iterdir())
    collected = store.gc()
    assert (collected.removed, collected.leased, collected.freed_bytes) == ([version.digest], [], size)
    assert not version.path.exists()
    store.verify(store.resolve("a"))
    assert store.resolve("a").digest == other.digest
    assert list((store.root / "staging").iterdir()) == []
    store.remove("a")
    assert store.gc().removed == [other.digest]
    assert store.gc().removed == []


def test_an_empty_store_has_no_garbage(store: AdapterStore) -> None:
    assert store.gc().removed == []
    assert not store.root.exists()


def test_what_two_names_have_is_not_garbage_of_one(store: AdapterStore, version: Version, tmp_path: Path) -> None:
    store.publish(tmp_path / "source", "b", **PUBLISH)
    store.remove("a")
    assert store.gc().removed == []
    store.verify(store.resolve("b"))


def test_a_lease_keeps_the_files(store: AdapterStore, version: Version) -> None:
    first, second = store.lease(version.digest), store.lease(version.digest)
    store.remove("a")
    assert store.gc().leased == [version.digest]
    first.release()
    first.release()
    assert store.gc().leased == [version.digest], "the other still holds it"
    assert len(read_layout(version.path, LINEARS).modules) == 4
    with second:
        assert store.gc().removed == []
    assert store.gc().removed == [version.digest]
    with pytest.raises(AdapterNotFound, match=f"no version {version.digest}"):
        store.lease(version.digest)
    with pytest.raises(InvalidAdapterId):
        store.lease("sha256:../..")


HOLDER = """
import sys
from pathlib import Path
from adapters.store import AdapterStore
lease = AdapterStore(Path(sys.argv[1])).lease(sys.argv[2])
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, None])
def test_a_lease_ends_with_its_process_however_that_ends(
    how: signal.Signals | None, store: AdapterStore, version: Version
) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, store.root, version.digest],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    store.remove("a")
    assert store.gc().leased == [version.digest]
    if how is not None:
        holder.send_signal(how)
    holder.communicate(timeout=240)
    assert store.gc().removed == [version.digest]


def test_programs_that_are_started_do_not_inherit_leases(store: AdapterStore, version: Version) -> None:
    with store.lease(version.digest):
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
    try:
        store.remove("a")
        assert store.gc().removed == [version.digest]
    finally:
        child.communicate(b"\n")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_reader_without_permission_to_write_gets_a_lease(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as open_to_all:  # pytest's own are closed, and closed again by other runs
        Path(open_to_all).chmod(0o755)
        store = AdapterStore(Path(open_to_all) / "store")
        version = store.publish(write_adapter(tmp_path / "source"), "a", **PUBLISH)
        child = os.fork()
        if child == 0:
            code = 1
            with contextlib.suppress(BaseException):
                os.setuid(65534)
                with store.lease(version.digest):
                    code = 0 if (version.path / "manifest.json").exists() else 2
            os._exit(code)
        assert os.waitpid(child, 0)[1] == 0


def test_mending_a_damaged_version_keeps_its_leases(store: AdapterStore, version: Version, tmp_path: Path) -> None:
    with store.lease(version.digest):
        weights = version.path / "adapter_model.safetensors"
        weights.chmod(0o644)
        weights.write_bytes(b"rot")
        store.publish(tmp_path / "source", "a", **PUBLISH)
        store.verify(version)
        store.remove("a")
        assert store.gc().leased == [version.digest]


def test_a_damaged_record_stops_collection(store: AdapterStore, version: Version) -> None:
    """What it refers to cannot be told, and must not be taken for garbage."""
    record = store.root / "names" / "a.json"
    record.unlink()
    record.write_text("{")
    with pytest.raises(StoreUnavailable, match="damaged"):
        store.gc()
    assert version.path.exists()


def test_what_is_not_a_version_is_left_alone(store: AdapterStore, version: Version) -> None:
    strays = [version.path.parent / name for name in ("notes.txt", "sha256-xyz", "sha256-" + "0" * 64)]
    for stray in strays:
        stray.write_text("")
    assert store.gc().removed == []
    assert all(stray.exists() for stray in strays)


class Passing(AdapterStore):
    """Someone publishes `a` after the first look at its stamp; it is removed and collected when its record was read."""

    source: Path | None = None

    def stamp(self, name: str) -> tuple[int, int, int] | None:
        found = super().stamp(name)
        if self.source is not None:
            AdapterStore(self.root).publish(self.source, "a", **PUBLISH)
            self.source = None
        return found

    def record(self, name: str) -> NameRecord:
        found = super().record(name)
        others = AdapterStore(self.root)
        others.remove(name)
        others.gc()
        return found


@pytest.mark.parametrize("through", [lambda store: store, lambda store: AdapterRegistry(store, BASE_DIGEST)])
def test_what_comes_and_goes_while_it_is_looked_for_was_not_there(
    through: Callable[[AdapterStore], AdapterStore | AdapterRegistry], tmp_path: Path
) -> None:
    store = Passing(tmp_path / "store")
    store.source = write_adapter(tmp_path / "source")
    with pytest.raises(AdapterNotFound, match="no adapter 'a'"):
        through(store).resolve("a")


def test_a_publication_is_told_though_it_is_removed_at_once(
    store: AdapterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, others = versions.locked, [partial(store.remove, "a"), store.gc]

    @contextlib.contextmanager
    def locked(path: Path) -> Iterator[None]:
        with real(path):
            yield
        while others:  # as soon as the lock is free
            others.pop(0)()

    monkeypatch.setattr(versions, "locked", locked)
    version = store.publish(write_adapter(tmp_path / "source"), "a", **PUBLISH)
    assert (version.labels, version.manifest.base_digest) == (("latest",), BASE_DIGEST)
    assert store.names() == []
    assert not version.path.exists()


def test_leases_while_names_come_and_go(store: AdapterStore, tmp_path: Path) -> None:
    """Readers take leases and read while two names are removed, collected and published again, over and over."""
    sources = {name: write_adapter(tmp_path / name, seed=seed) for seed, name in enumerate(("a", "b"))}
    for name, source in sources.items():
        store.publish(source, name, **PUBLISH)
    registry = AdapterRegistry(store, BASE_DIGEST)
    done = Event()

    def read(name: str) -> int:
        reads = 0
        while not done.is_set():
            with contextlib.suppress(AdapterNotFound):
                store.resolve(name)
                version = registry.resolve(name)
                with store.lease(version.digest):
                    store.verify(version)
                    reads += 1
                    has_read[name].set()
        return reads

    has_read = {name: Event() for name in sources}
    removed = 0
    with ThreadPoolExecutor(len(sources)) as readers:
        reading = [readers.submit(read, name) for name in sources]
        try:
            while removed < 50 or not all(event.is_set() for event in has_read.values()):
                for name, source in sources.items():
                    store.remove(name)
                    removed += len(store.gc().removed)
                    store.publish(source, name, **PUBLISH)
                if any(future.done() for future in reading):
                    break  # one has failed, and says so below
        finally:
            done.set()
        assert all(future.result() for future in reading)
