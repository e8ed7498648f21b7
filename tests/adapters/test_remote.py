"""A store in a bucket, on a real server: what every store does, many writers at once, and the server being away."""

import contextlib
import itertools
import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters import versions
from adapters.bucket import Bucket, Conflict, open_bucket
from adapters.errors import (
    AdapterError,
    AdapterInUse,
    AdapterNotFound,
    BaseMismatch,
    InvalidAdapter,
    LabelMoved,
    StoreUnavailable,
)
from adapters.layout import read_layout
from adapters.records import ABSENT
from adapters.registry import AdapterRegistry
from adapters.remote import RemoteStore, default_cache, open_remote
from adapters.store import AdapterStore
from adapters.stores import open_store
from tests.adapters.builders import BASE_DIGEST, LINEARS, PUBLISH, tensors, write_adapter
from tests.adapters.s3_server import S3Server

WEIGHTS = "adapter_model.safetensors"
_numbers = itertools.count()


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    server = S3Server()
    yield server
    server.stop()


@pytest.fixture
def location(server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    server.tell(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg-cache"))
    bucket = f"adapters-{next(_numbers)}"
    server.make_bucket(bucket)
    return f"s3://{bucket}/some/prefix"


class Clock:
    """Seconds since 1970 that pass when told."""

    def __init__(self) -> None:
        self.now = 2e9

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def machine(location: str, clock: Clock, tmp_path: Path) -> Callable[..., RemoteStore]:
    """A store at the location as another machine has it: with a cache of its own, unless it is named."""

    def make(cache: str | None = None, bucket: Any = None, **options: Any) -> RemoteStore:
        directory = tmp_path / (cache or f"cache{next(_numbers)}")
        return RemoteStore(
            bucket or open_bucket(location), directory, **{"fresh_seconds": 0.0, "clock": clock, **options}
        )

    return make


@pytest.fixture
def store(machine: Callable[..., RemoteStore]) -> RemoteStore:
    return machine()


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    return [write_adapter(tmp_path / f"source{seed}", seed=seed) for seed in range(3)]


def test_what_one_machine_publishes_another_serves(
    store: RemoteStore, machine: Callable[..., RemoteStore], sources: list[Path]
) -> None:
    published = store.publish(sources[0], "pirate", notes="ahoy", **PUBLISH)
    other = machine()
    version = other.resolve("pirate")
    assert version.manifest == published.manifest
    assert version.manifest.notes == "ahoy"
    assert (version.digest, version.labels) == (published.digest, ("latest",))
    assert not version.path.exists(), "not before it is needed"
    assert other.fetch(version.digest) == version.path
    assert (version.path / WEIGHTS).read_bytes() == (sources[0] / WEIGHTS).read_bytes()
    assert len(read_layout(version.path, LINEARS).modules) == 4
    other.verify(version)
    assert other.names() == ["pirate"]


def test_the_same_content_has_the_same_digest_everywhere(
    store: RemoteStore, sources: list[Path], tmp_path: Path
) -> None:
    on_disk = AdapterStore(tmp_path / "on-disk").publish(sources[0], "a", **PUBLISH)
    first = store.publish(sources[0], "a", **PUBLISH)
    assert first.digest == on_disk.digest
    again = store.publish(sources[0], "b", notes="other", **PUBLISH)
    assert again.manifest == first.manifest, "the first manifest stays"


def test_labels_as_on_disk(store: RemoteStore, machine: Callable[..., RemoteStore], sources: list[Path]) -> None:
    digests = [store.publish(source, "a", **PUBLISH).digest for source in sources]
    other = machine()
    assert other.record("a").versions == tuple(digests)
    assert other.move_label("a", "prod", digests[0], expected=ABSENT).digest == digests[0]
    with pytest.raises(LabelMoved):
        store.move_label("a", "prod", digests[1], expected=digests[2])
    assert store.rollback("a").digest == digests[1]
    assert other.record("a").labels == {"latest": digests[1], "prod": digests[0]}
    with pytest.raises(AdapterInUse):
        store.remove_version("a", digests[0])
    store.remove_label("a", "prod")
    store.remove_version("a", digests[0])
    assert other.record("a").versions == tuple(digests[1:])
    with pytest.raises(AdapterNotFound):
        other.resolve(f"a@{digests[0]}")
    store.remove("a")
    for call in (other.resolve, other.remove, other.record, lambda name: other.rollback(name, "prod")):
        with pytest.raises(AdapterNotFound, match="no adapter 'a' in the store at s3://"):
            call("a")
    assert other.stamp("a") is None
    assert other.names() == []
    assert store.publish(sources[0], "a", **PUBLISH).digest == digests[0]


def test_what_does_not_fit_never_gets_there(store: RemoteStore, sources: list[Path], tmp_path: Path) -> None:
    broken = write_adapter(tmp_path / "broken", {key: np.full_like(value, np.nan) for key, value in tensors().items()})
    with pytest.raises(InvalidAdapter, match="NaN"):
        store.publish(broken, "a", **PUBLISH)
    version = AdapterStore(tmp_path / "on-disk").publish(sources[0], "a", **PUBLISH)
    with pytest.raises(BaseMismatch):
        store.publish(version.path, "a", **{**PUBLISH, "base_digest": "sha256:" + "00" * 32})
    assert store.names() == []
    assert store.gc().removed == []


def test_the_registry_sees_moves_and_serves_from_the_cache(
    store: RemoteStore, machine: Callable[..., RemoteStore], sources: list[Path]
) -> None:
    first = store.publish(sources[0], "a", **PUBLISH).digest
    registry = AdapterRegistry(machine(), BASE_DIGEST)
    assert registry.resolve("a").digest == first
    second = store.publish(sources[1], "a", **PUBLISH).digest
    assert registry.resolve("a").digest == second
    assert registry.get("a").digests == (second, first)
    assert [entry.name for entry in registry.list(10, "")[0]] == ["a"]


def test_a_record_seen_lately_is_not_asked_for_again(
    store: RemoteStore, machine: Callable[..., RemoteStore], clock: Clock, sources: list[Path]
) -> None:
    first = store.publish(sources[0], "a", **PUBLISH).digest
    reader = machine(fresh_seconds=1.0)
    assert reader.resolve("a").digest == first
    second = store.publish(sources[1], "a", **PUBLISH).digest
    assert reader.resolve("a").digest == first
    clock.now += 1.0
    assert reader.resolve("a").digest == second
    assert reader.rollback("a").digest == first
    assert reader.resolve("a").digest == first, "its own moves it sees at once"


def test_while_the_service_is_away_what_is_here_goes_on(
    server: S3Server, machine: Callable[..., RemoteStore], clock: Clock, sources: list[Path]
) -> None:
    writer = machine()
    warm, cold = (
        writer.publish(source, name, **PUBLISH) for source, name in zip(sources, ("warm", "cold"), strict=False)
    )
    reader = machine("shared", max_stale_seconds=60.0)
    reader.resolve("cold")
    path = reader.fetch(reader.resolve("warm").digest)
    server.stop()
    try:
        for some in (reader, machine("shared", max_stale_seconds=60.0)):  # the second is a process that starts now
            assert some.resolve("warm").digest == warm.digest
            assert AdapterRegistry(some, BASE_DIGEST).resolve("warm").path == path
            assert some.fetch(warm.digest) == path
            with some.lease(warm.digest):
                pass
            calls: list[Callable[[], object]] = [
                lambda some=some: some.fetch(cold.digest),  # type: ignore[misc]
                lambda some=some: some.resolve("never-seen"),  # type: ignore[misc]
                some.names,
                lambda some=some: some.rollback("warm"),  # type: ignore[misc]
                lambda some=some: some.publish(sources[2], "new", **PUBLISH),  # type: ignore[misc]
            ]
            for call in calls:
                with pytest.raises(StoreUnavailable) as caught:
                    call()
                assert caught.value.code == "UNAVAILABLE"
                assert caught.value.retry_after
                assert "\n" not in caught.value.message
        clock.now += 61
        with pytest.raises(StoreUnavailable, match="last looked up 61 s ago; at most 60 s are relied on"):
            reader.resolve("warm")
        assert reader.fetch(warm.digest) == path, "a digest always means the same"
    finally:
        server.start()
    assert reader.resolve("warm").digest == warm.digest
    assert reader.fetch(cold.digest).is_dir()
    writer.publish(sources[2], "new", **PUBLISH)
    assert sorted(reader.names()) == ["cold", "new", "warm"]


def test_a_clock_that_is_set_back_does_not_prolong_an_outage(
    location: str, store: RemoteStore, machine: Callable[..., RemoteStore], clock: Clock, sources: list[Path]
) -> None:
    bucket = Guarded(open_bucket(location))
    reader = machine(bucket=bucket)
    reader.publish(sources[0], "a", **PUBLISH)
    bucket.fails_from = bucket.calls
    reader.resolve("a")
    bucket.fails_from = None
    second = store.publish(sources[1], "a", **PUBLISH).digest
    clock.now -= 3000
    assert reader.resolve("a").digest == second
    assert not reader.is_away


def test_an_outage_is_asked_about_once_and_not_at_every_request(
    location: str, machine: Callable[..., RemoteStore], clock: Clock, sources: list[Path]
) -> None:
    bucket = Guarded(open_bucket(location))
    reader = machine(bucket=bucket)
    reader.publish(sources[0], "a", **PUBLISH)
    bucket.fails_from = bucket.calls
    assert not reader.is_away
    for _ in range(5):
        reader.resolve("a")
        assert reader.is_away
    assert bucket.calls - bucket.fails_from == 1
    clock.now += 5
    reader.resolve("a")
    assert bucket.calls - bucket.fails_from == 2


class Guarded:
    """A bucket that goes away at call `fails_from`, before it is made."""

    def __init__(self, bucket: Bucket, fails_from: int | None = None) -> None:
        self._bucket = bucket
        self.fails_from = fails_from
        self.location = bucket.location
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._bucket, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.fails_from is not None and self.calls > self.fails_from:
                raise StoreUnavailable("it went away", retry_after=1.0)
            return real(*args, **kwargs)

        return call


CHANGES: dict[str, Callable[[RemoteStore, list[str], Path], object]] = {
    "publish": lambda store, digests, new: store.publish(new, "a", **PUBLISH),
    "publish a new name": lambda store, digests, new: store.publish(new, "b", **PUBLISH),
    "move_label": lambda store, digests, new: store.move_label("a", "prod", digests[0], expected=ABSENT),
    "rollback": lambda store, digests, new: store.rollback("a"),
    "remove_version": lambda store, digests, new: store.remove_version("a", digests[0]),
    "remove": lambda store, digests, new: store.remove("a"),
    "gc": lambda store, digests, new: store.gc(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_writer_that_dies_at_any_call_leaves_the_old_or_the_new_state(
    change: Callable[[RemoteStore, list[str], Path], object],
    location: str,
    machine: Callable[..., RemoteStore],
    sources: list[Path],
    server: S3Server,
) -> None:
    def state(store: RemoteStore) -> dict[str, tuple[dict[str, str], tuple[str, ...]]]:
        found = {name: store.record(name) for name in store.names()}
        for record in found.values():
            for digest in record.versions:
                store.verify(store.version(record, digest))
        return {name: (dict(record.labels), record.versions) for name, record in found.items()}

    at, outcomes = 0, []
    while True:
        bucket_location = f"{location}/{at}"
        made = machine(bucket=open_bucket(bucket_location), min_garbage_seconds=-3e9)
        digests = [made.publish(source, "a", **PUBLISH).digest for source in sources[:2]]
        made.publish(sources[2], "gone", **PUBLISH)
        made.remove("gone")
        before = state(made)
        doomed = machine(bucket=Guarded(open_bucket(bucket_location), at), min_garbage_seconds=-3e9)
        try:
            change(doomed, digests, sources[2])
        except StoreUnavailable:
            is_done = False
        else:
            is_done = True
        after = state(machine(bucket=open_bucket(bucket_location)))
        outcomes.append(after)
        survivor = machine(bucket=open_bucket(bucket_location), min_garbage_seconds=-3e9)
        survivor.publish(sources[2], "c", **PUBLISH)
        survivor.gc()
        assert state(survivor).keys() == {*after, "c"}
        if is_done:
            break
        at += 1
    assert outcomes[0] == before
    assert all(outcome in (before, outcomes[-1]) for outcome in outcomes)
    assert at >= 2


def test_of_many_writers_none_overwrites_another(machine: Callable[..., RemoteStore], sources: list[Path]) -> None:
    """Each moves a label on by one step; a lost update would leave it elsewhere."""
    stores = [machine() for _ in range(4)]
    digests = [stores[0].publish(source, "a", **PUBLISH).digest for source in sources]
    stores[0].move_label("a", "count", digests[0])

    def step(store: RemoteStore) -> None:
        for _ in range(5):
            while True:
                now = store.resolve("a@count").digest
                try:
                    store.move_label("a", "count", digests[(digests.index(now) + 1) % 3], expected=now)
                    break
                except LabelMoved:
                    continue

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(step, stores))
    assert stores[0].resolve("a@count").digest == digests[20 % 3]
    moves = [move for move in stores[1].record("a").history if move.label == "count"]
    assert len(moves) == 21
    assert all(later.previous == earlier.digest for earlier, later in itertools.pairwise(moves))


def test_publications_of_one_name_at_once_all_count(machine: Callable[..., RemoteStore], sources: list[Path]) -> None:
    stores = [machine() for _ in sources]
    with ThreadPoolExecutor(3) as pool:
        found = list(
            pool.map(lambda pair: pair[0].publish(pair[1], "a", **PUBLISH).digest, zip(stores, sources, strict=True))
        )
    assert set(stores[0].record("a").versions) == set(found)
    assert len(stores[0].record("a").history) == 3


class LosingAnswers(Guarded):
    """Writes, and then says that it has not: the answer got lost and the call was made again."""

    def write(self, *args: Any) -> Any:
        self._bucket.write(*args)
        raise Conflict("412 from the second try")


def test_a_lost_answer_is_not_taken_for_another_writer(
    location: str, store: RemoteStore, machine: Callable[..., RemoteStore], sources: list[Path]
) -> None:
    first, second = (store.publish(source, "a", **PUBLISH).digest for source in sources[:2])
    unlucky = machine(bucket=LosingAnswers(open_bucket(location)))
    assert unlucky.move_label("a", "latest", first, expected=second).digest == first
    assert len(store.record("a").history) == 3


class LosingAnAnswer(Guarded):
    """As `LosingAnswers`, the first alone; by the time of the second try someone else has written too."""

    def __init__(self, bucket: Bucket, other: Callable[[], object]) -> None:
        super().__init__(bucket)
        self._others = [other]

    def write(self, *args: Any) -> Any:
        written = self._bucket.write(*args)
        while self._others:
            self._others.pop()()
            raise Conflict("412 from the second try")
        return written


def test_a_lost_answer_is_known_under_what_others_wrote_since(
    location: str, store: RemoteStore, machine: Callable[..., RemoteStore], sources: list[Path]
) -> None:
    first, second = (store.publish(source, "a", **PUBLISH).digest for source in sources[:2])
    other = partial(store.move_label, "a", "prod", second)
    unlucky = machine(bucket=LosingAnAnswer(open_bucket(location), other))
    assert unlucky.rollback("a").digest == first, "a second one would undo it"
    assert store.record("a").labels == {"latest": first, "prod": second}
    assert len(store.record("a").history) == 4


class Slow(Guarded):
    """What is read first arrives when something else has been done."""

    meanwhile: Callable[[], object] | None = None

    def read(self, *args: Any) -> Any:
        found = self._bucket.read(*args)
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            meanwhile()
        return found


@pytest.mark.parametrize("was_seen", [False, True])
def test_what_was_asked_before_a_change_does_not_hide_it(
    was_seen: bool,
    location: str,
    store: RemoteStore,
    machine: Callable[..., RemoteStore],
    clock: Clock,
    sources: list[Path],
) -> None:
    first, _ = (store.publish(source, "a", **PUBLISH).digest for source in sources[:2])
    bucket = Slow(open_bucket(location))
    mine = machine(bucket=bucket, fresh_seconds=1.0)
    if was_seen:
        mine.resolve("a")
        clock.now += 2
    bucket.meanwhile = partial(mine.rollback, "a")
    mine.record("a")
    assert mine.resolve("a").digest == first
    clock.now += 2
    bucket.meanwhile = partial(mine.remove, "a")
    mine.record("a")
    with pytest.raises(AdapterNotFound):
        mine.resolve("a")


class Overtaken(Guarded):
    """Another writer comes in before the first write."""

    def __init__(self, bucket: Bucket, other: Callable[[], object]) -> None:
        super().__init__(bucket)
        self._others = [other]

    def write(self, *args: Any) -> Any:
        while self._others:
            self._others.pop()()
        return self._bucket.write(*args)


def test_another_who_does_the_same_at_the_same_moment_is_another(
    location: str,
    store: RemoteStore,
    machine: Callable[..., RemoteStore],
    sources: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second = (store.publish(source, "a", **PUBLISH).digest for source in sources[:2])
    monkeypatch.setattr("adapters.names.utc_now", lambda: "2026-01-01T00:00:00.000Z")
    same = partial(store.move_label, "a", "latest", first, expected=second)
    late = machine(bucket=Overtaken(open_bucket(location), same))
    with pytest.raises(LabelMoved):
        late.move_label("a", "latest", first, expected=second)


@pytest.mark.parametrize("what", ["flipped", "longer", "shorter", "gone"])
def test_what_is_damaged_on_the_way_is_refused(
    what: str, location: str, store: RemoteStore, machine: Callable[..., RemoteStore], sources: list[Path]
) -> None:
    version = store.publish(sources[0], "a", **PUBLISH)
    raw = (sources[0] / WEIGHTS).read_bytes()
    key = f"versions/{version.digest.replace(':', '-')}/{WEIGHTS}"
    bad = {"flipped": bytes([*raw[:-1], raw[-1] ^ 1]), "longer": raw + b"x", "shorter": raw[:-1]}
    bucket = open_bucket(location)
    bucket.overwrite(key, bad[what]) if what in bad else bucket.delete(key)
    other = machine()
    with pytest.raises(InvalidAdapter, match=rf"is damaged: {WEIGHTS}: .*(sha256|larger|not in the bucket)"):
        other.fetch(version.digest)
    assert not version.path.is_relative_to(other.resolve("a").path)
    assert not other.resolve("a").path.exists()
    with pytest.raises(InvalidAdapter):
        store.verify(version)
    store.fetch(version.digest)  # the cache's own copy is good
    if what != "flipped":
        store.publish(sources[0], "a", **PUBLISH)  # mends it
        other.fetch(version.digest)


@pytest.mark.parametrize(
    "damage", [lambda bucket, key: bucket.delete(key), lambda bucket, key: bucket.overwrite(key, b"{")]
)
def test_a_manifest_that_only_the_cache_still_has_is_told_and_mended(
    damage: Callable[[Bucket, str], None],
    location: str,
    store: RemoteStore,
    machine: Callable[..., RemoteStore],
    sources: list[Path],
) -> None:
    version = store.publish(sources[0], "a", **PUBLISH)
    damage(open_bucket(location), f"versions/{version.digest.replace(':', '-')}/manifest.json")
    with pytest.raises(InvalidAdapter, match=r"is damaged: manifest\.json: "):
        store.verify(version)
    store.publish(sources[0], "a", **PUBLISH)
    store.verify(version)
    machine().fetch(version.digest)


def test_what_is_being_published_is_not_collected_from_the_cache(
    machine: Callable[..., RemoteStore], sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even the moment after it was put there, by another process that makes room."""
    real, others = versions.locked, [partial(versions.VersionFiles(tmp_path / "shared").collect, set)]

    @contextlib.contextmanager
    def locked(path: Path) -> Iterator[None]:
        with real(path):
            yield
        while others:  # as soon as the lock is free
            others.pop()()

    monkeypatch.setattr(versions, "locked", locked)
    store = machine("shared")
    version = store.publish(sources[0], "a", **PUBLISH)
    store.verify(version)
    assert version.path.is_dir()


def test_verifying_mends_the_cache(store: RemoteStore, sources: list[Path]) -> None:
    """A server refuses to load what is damaged there, and would go on to."""
    version = store.publish(sources[0], "a", **PUBLISH)
    weights = version.path / WEIGHTS
    weights.chmod(0o644)
    weights.write_bytes(bytes(weights.stat().st_size))
    with store.lease(version.digest):
        store.verify(version)
        assert weights.read_bytes() == (sources[0] / WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    "edit",
    [
        lambda manifest: manifest.update(digest="sha256:" + "11" * 32),
        lambda manifest: manifest.update(base_digest="sha256:" + "11" * 32),
        lambda manifest: manifest["files"].update({"../../evil": {"sha256": "0" * 64, "size_bytes": 1}}),
        lambda manifest: manifest["files"].pop(WEIGHTS),
        lambda manifest: manifest.pop("rank"),
    ],
)
def test_a_manifest_cannot_lie_about_files_or_base(
    edit: Callable[[dict[str, Any]], object],
    location: str,
    store: RemoteStore,
    machine: Callable[..., RemoteStore],
    sources: list[Path],
) -> None:
    version = store.publish(sources[0], "a", **PUBLISH)
    key = f"versions/{version.digest.replace(':', '-')}/manifest.json"
    bucket = open_bucket(location)
    source = bucket.read(key)
    assert source is not None
    manifest = json.loads(source.data)
    edit(manifest)
    bucket.overwrite(key, json.dumps(manifest).encode())
    with pytest.raises(InvalidAdapter, match=r"manifest\.json"):
        machine().resolve("a")


def test_a_damaged_record_is_told_and_hurts_no_other(location: str, store: RemoteStore, sources: list[Path]) -> None:
    for name in ("a", "b"):
        store.publish(sources[0], name, **PUBLISH)
    for raw in (b"", b"{}", b"\xff", open_bucket(location).read("names/b.json").data):  # type: ignore[union-attr]
        open_bucket(location).overwrite("names/a.json", raw)
        with pytest.raises(StoreUnavailable, match=r"names/a\.json is damaged"):
            store.resolve("a")
        with pytest.raises(StoreUnavailable, match="damaged"):
            store.gc()
    assert store.resolve("b").name == "b"


def test_collection_leaves_what_is_used_leased_or_young(
    store: RemoteStore, machine: Callable[..., RemoteStore], sources: list[Path]
) -> None:
    used, unused, held = (store.publish(source, "a", **PUBLISH).digest for source in sources)
    store.move_label("a", "latest", used)
    for digest in (unused, held):
        store.remove_version("a", digest)
    careful, eager = machine(clock=lambda: 0.0), machine(min_garbage_seconds=-3e9)
    assert careful.gc().recent == sorted([unused, held])
    with store.lease(held):
        collected = eager.gc()
        assert collected.removed == sorted([unused, held])
        assert collected.freed_bytes > 2 * (sources[1] / WEIGHTS).stat().st_size
        assert store.gc().leased == [held]
        assert store.fetch(held).is_dir(), "served on here although it is gone there"
    machine().fetch(used)
    assert store.gc().leased == []
    with pytest.raises(AdapterNotFound):
        store.lease(held)
    with pytest.raises(AdapterNotFound, match=r"no version sha256:\w+ in the store at s3://"):
        machine().fetch(held)


def test_the_cache_stays_within_its_budget(
    store: RemoteStore, machine: Callable[..., RemoteStore], sources: list[Path]
) -> None:
    versions = [store.publish(source, "a", **PUBLISH) for source in sources]
    size = sum(file.stat().st_size for file in versions[0].path.iterdir())
    reader = machine(max_cache_bytes=2 * size + 100)
    paths = [reader.fetch(version.digest) for version in versions[:2]]
    os.utime(paths[1], (1, 1))
    with reader.lease(versions[0].digest):  # used last, and held
        third = reader.fetch(versions[2].digest)
        assert [path.exists() for path in (*paths, third)] == [True, False, True]
        reader.fetch(versions[1].digest)
        assert paths[0].exists(), "held, and so over the budget"
    assert reader.fetch(versions[1].digest).exists()


def test_room_is_not_made_of_what_came_meanwhile(
    store: RemoteStore,
    machine: Callable[..., RemoteStore],
    sources: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fourth = write_adapter(tmp_path / "fourth", seed=4)
    *old, newest, other = (store.publish(source, "a", **PUBLISH) for source in (*sources, fourth))
    size = sum(file.stat().st_size for file in newest.path.iterdir())
    reader, another = (machine("shared", max_cache_bytes=budget) for budget in (2 * size + 100, 9 * size))
    for version in old:
        os.utime(reader.fetch(version.digest), (1, 1))
    arriving = [partial(another.fetch, other.digest)]
    present = versions.VersionFiles.present

    def looking(files: versions.VersionFiles) -> list[versions.LocalVersion]:
        found = present(files)
        while arriving:  # another process brings one just after this one has looked what is there
            arriving.pop()()
        return found

    monkeypatch.setattr(versions.VersionFiles, "present", looking)
    reader.fetch(newest.digest)
    here = {version.digest for version in present(versions.VersionFiles(tmp_path / "shared"))}
    assert here == {newest.digest, other.digest}


def test_many_threads_fetch_a_version_once(
    location: str, store: RemoteStore, machine: Callable[..., RemoteStore], sources: list[Path]
) -> None:
    digest = store.publish(sources[0], "a", **PUBLISH).digest
    bucket = Guarded(open_bucket(location))
    reader = machine(bucket=bucket)
    barrier = threading.Barrier(6)

    def fetch(_: int) -> Path:
        barrier.wait()
        return reader.fetch(digest)

    with ThreadPoolExecutor(6) as pool:
        paths = set(pool.map(fetch, range(6)))
    assert len(paths) == 1
    assert bucket.calls == 3, "the manifest and two files"


def test_locations(location: str, tmp_path: Path, server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(open_store(tmp_path), AdapterStore)
    assert open_store(str(tmp_path)).location == str(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert open_store().location == str(tmp_path / "lorikeet" / "adapters")
    remote = open_store(location + "/")
    assert (remote.location, remote.is_remote) == (location, True)
    for odd in (
        "s3://",
        "s3://a",
        "s3://Bucket/x",
        "s3://bucket//x",
        "s3://bucket/../x",
        "s3://bucket/./x",
        "gs://bucket",
        "http://x/y",
    ):
        with pytest.raises(StoreUnavailable, match="--store"):
            open_store(odd)
    assert default_cache("s3://a-b/x") != default_cache("s3://a-b/y")


def test_a_bucket_that_is_not_there_is_said_to_be(location: str, sources: list[Path]) -> None:
    store = open_remote("s3://no-such-bucket/x")
    calls: list[Callable[[], object]] = [
        store.names,
        lambda: store.resolve("a"),
        lambda: store.publish(sources[0], "a", **PUBLISH),
    ]
    for call in calls:
        with pytest.raises(AdapterError, match=r"no such bucket|NoSuchBucket"):
            call()
