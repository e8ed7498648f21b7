import base64
from pathlib import Path

import pytest

from adapters.errors import AdapterNotFound, BaseMismatch, InvalidAdapterId, InvalidPage
from adapters.registry import MAX_PAGE_SIZE, AdapterRegistry
from adapters.store import AdapterStore
from tests.adapters.builders import BASE_DIGEST, PUBLISH, write_adapter

OTHER = "sha256:" + "0e" * 32


class CountingStore(AdapterStore):
    """Counts what is read; a stat is not a read."""

    reads = 0

    def record(self, name):  # type: ignore[no-untyped-def]
        self.reads += 1
        return super().record(name)

    def version(self, record, digest):  # type: ignore[no-untyped-def]
        self.reads += 1
        return super().version(record, digest)


@pytest.fixture
def store(tmp_path: Path) -> CountingStore:
    return CountingStore(tmp_path / "store")


def test_sees_each_publication_at_once(store: CountingStore, tmp_path: Path) -> None:
    """Publications in quick succession: coarse clocks and reused inodes must not hide one."""
    registry = AdapterRegistry(store, BASE_DIGEST)
    sources = [write_adapter(tmp_path / str(seed), seed=seed) for seed in range(3)]
    with pytest.raises(AdapterNotFound):
        registry.resolve("a")
    for turn in range(30):
        published = store.publish(sources[turn % 3], "a", **PUBLISH)
        assert registry.resolve("a") == published


def test_stamps_only_grow(store: CountingStore, tmp_path: Path) -> None:
    sources = [write_adapter(tmp_path / str(seed), seed=seed) for seed in range(2)]
    stamps = []
    for turn in range(20):
        store.publish(sources[turn % 2], "a", **PUBLISH)
        stamp = store.stamp("a")
        assert stamp is not None
        stamps.append(stamp[1])
    assert sorted(set(stamps)) == stamps


def test_what_is_unchanged_is_not_read_again(store: CountingStore, tmp_path: Path) -> None:
    version = store.publish(write_adapter(tmp_path / "source"), "a", **PUBLISH)
    registry = AdapterRegistry(store, BASE_DIGEST)
    registry.resolve("a")
    store.reads = 0
    for _ in range(10):
        registry.resolve("a")
        registry.resolve(f"a@{version.digest}")
        registry.get("a")
    assert store.reads == 0


def test_an_id_is_resolved_again_after_removal(store: CountingStore, tmp_path: Path) -> None:
    registry = AdapterRegistry(store, BASE_DIGEST)
    source = write_adapter(tmp_path / "source")
    store.publish(source, "a", **PUBLISH)
    registry.resolve("a")
    store.remove("a")
    with pytest.raises(AdapterNotFound):
        registry.resolve("a")
    store.publish(source, "a", **PUBLISH)
    registry.resolve("a")


def test_what_was_published_between_the_look_and_the_reading_is_gone_when_removed(
    store: CountingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, looked = AdapterRegistry(store, BASE_DIGEST), store.stamp("a")
    version = store.publish(write_adapter(tmp_path / "source"), "a", **PUBLISH)
    with monkeypatch.context() as early:
        early.setattr(store, "stamp", lambda name: looked)
        assert registry.resolve("a") == version
    store.remove("a")
    with pytest.raises(AdapterNotFound):
        registry.resolve("a")


def test_another_base_is_refused_with_both_named(store: CountingStore, tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "source")
    store.publish(source, "a", **{**PUBLISH, "base_digest": OTHER, "base_name": "elsewhere/big"})
    registry = AdapterRegistry(store, BASE_DIGEST, "tiny")
    with pytest.raises(BaseMismatch) as caught:
        registry.resolve("a")
    for named in ("'a'", "elsewhere/big", OTHER, "tiny", BASE_DIGEST):
        assert named in caught.value.message
    assert not registry.get("a").matches_base
    store.publish(source, "a", **PUBLISH)
    assert registry.resolve("a").manifest.base_digest == BASE_DIGEST
    assert registry.get("a").matches_base


def test_entries_tell_labels_and_versions(store: CountingStore, tmp_path: Path) -> None:
    first = store.publish(write_adapter(tmp_path / "1", seed=1), "a", label="prod", **PUBLISH)
    second = store.publish(write_adapter(tmp_path / "2", seed=2), "a", **PUBLISH)
    entry = AdapterRegistry(store, BASE_DIGEST).get("a")
    assert entry.version == second
    assert entry.labels == {"latest": second.digest, "prod": first.digest}
    assert entry.digests == (second.digest, first.digest)
    with pytest.raises(AdapterNotFound):
        AdapterRegistry(store, BASE_DIGEST).get("b")
    with pytest.raises(InvalidAdapterId):
        AdapterRegistry(store, BASE_DIGEST).get("a@prod")


def test_pages_cover_all_names_once(store: CountingStore, tmp_path: Path) -> None:
    registry = AdapterRegistry(store, BASE_DIGEST)
    assert registry.list(10, "") == ([], "")
    source = write_adapter(tmp_path / "source")
    names = sorted(f"a{number}" for number in range(12))
    for name in names:
        store.publish(source, name, **PUBLISH)
    for size in (1, 5, 6, 12, 50, 0, MAX_PAGE_SIZE + 1):
        found, token, pages = [], "", 0
        while True:
            entries, token = registry.list(size, token)
            found += [entry.name for entry in entries]
            pages += 1
            if not token:
                break
        assert found == names
        assert pages == -(-12 // (size or 50))


def test_pages_go_on_where_they_were_though_names_come_and_go(store: CountingStore, tmp_path: Path) -> None:
    registry = AdapterRegistry(store, BASE_DIGEST)
    source = write_adapter(tmp_path / "source")
    for name in ("b", "d", "f"):
        store.publish(source, name, **PUBLISH)
    _, token = registry.list(2, "")
    store.remove("d")
    store.publish(source, "a", **PUBLISH)
    store.publish(source, "e", **PUBLISH)
    assert [entry.name for entry in registry.list(9, token)[0]] == ["e", "f"]


@pytest.mark.parametrize(
    "token",
    ["x", "é", "====", *(base64.urlsafe_b64encode(raw).decode() for raw in (b"a", b"after:../x", b"after:\xff"))],
)
def test_tokens_of_others_are_refused(store: CountingStore, token: str) -> None:
    with pytest.raises(InvalidPage) as caught:
        AdapterRegistry(store, BASE_DIGEST).list(1, token)
    assert caught.value.field == "page_token"
    assert caught.value.code == "INVALID_ARGUMENT"


def test_a_negative_page_is_refused(store: CountingStore) -> None:
    with pytest.raises(InvalidPage, match="page_size"):
        AdapterRegistry(store, BASE_DIGEST).list(-1, "")
