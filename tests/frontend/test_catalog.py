"""What the event loop sees of a store: on disk, and remote: slow, away and back."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import AdapterNotFound, InvalidAdapterId, LabelMoved, StoreUnavailable
from adapters.registry import AdapterRegistry
from adapters.store import AdapterStore
from server.frontend.catalog import FRESH_SECONDS, Catalog
from tests.adapters.builders import BASE_DIGEST, PUBLISH, write_adapter
from tests.frontend.harness import run


class Shelf:
    """A catalog, the store behind it with versions 0, 1, … of the adapter "a", and what was heard of the store."""

    def __init__(self, directory: Path, store: AdapterStore) -> None:
        self.store = store
        self.sources = [write_adapter(directory / f"source-{seed}", seed=seed) for seed in range(3)]
        self.heard: list[bool] = []
        self.catalog = Catalog(AdapterRegistry(store, BASE_DIGEST), self.heard.append)

    def publish(self, number: int, name: str = "a", label: str = "latest") -> str:
        return self.store.publish(self.sources[number], name, label=label, **PUBLISH).digest


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path, AdapterStore(tmp_path / "store"))


async def until(condition: Callable[[], bool]) -> None:
    """Turns the loop until a thread has done something."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.001)


async def ticks() -> None:
    """What was to be done at once is done."""
    for _ in range(3):
        await asyncio.sleep(0)


def test_each_id_is_resolved_when_it_comes(shelf: Shelf) -> None:
    async def test() -> None:
        catalog = shelf.catalog
        with pytest.raises(AdapterNotFound):
            await catalog.resolve("a")
        for number in (0, 1, 0):
            digest = shelf.publish(number)
            assert (await catalog.resolve("a")).digest == digest
            assert catalog.names[digest] == "a"
        [entry], token = await catalog.list(10, "")
        assert (entry.name, token) == ("a", "")
        assert shelf.heard[0] is True, "a store without the name is there"

    run(test())


def test_what_is_used_or_resident_is_not_collected(shelf: Shelf) -> None:
    """In use by one of two, then only resident, then neither."""

    async def test() -> None:
        catalog, store = shelf.catalog, shelf.store
        digest = shelf.publish(0)
        async with catalog.hold("a") as first:
            async with catalog.hold(f"a@{digest}") as second:
                assert first.path == second.path
                assert catalog.num_users("a") == catalog.num_users("a", digest) == 2
                store.remove("a")
            await ticks()
            assert store.gc().leased == [digest]
            catalog.set_resident([digest])
        await ticks()
        assert catalog.num_users("a") == 0
        assert store.gc().leased == [digest]
        assert first.path.is_dir()
        catalog.set_resident([])
        await ticks()
        assert store.gc().removed == [digest]

    run(test())


def test_what_was_cancelled_but_loaded_is_held_while_it_is_resident(shelf: Shelf) -> None:
    async def test() -> None:
        digest = shelf.publish(0)
        async with shelf.catalog.hold("a"):
            pass
        await ticks()
        shelf.catalog.set_resident([digest])
        shelf.store.remove("a")
        assert shelf.store.gc().leased == [digest]
        shelf.catalog.close()
        await ticks()
        assert shelf.store.gc().removed == [digest]
        shelf.catalog.set_resident([digest])  # it has gone from the disk: served from memory, and no error

    run(test())


def test_labels_move_back_and_forth_and_versions_go(shelf: Shelf) -> None:
    async def test() -> None:
        catalog = shelf.catalog
        old, new = shelf.publish(0), shelf.publish(1)
        assert (await catalog.move_label("a", "latest", old, expected=new)).digest == old
        with pytest.raises(LabelMoved):
            await catalog.move_label("a", "latest", old, expected=new)
        assert (await catalog.resolve("a")).digest == old
        assert (await catalog.rollback("a", "latest", None)).digest == new
        assert await catalog.remove("a", old) == (old,)
        assert (await catalog.resolve("a")).digest == new
        assert await catalog.remove("a", None) == (new,)
        with pytest.raises(AdapterNotFound):
            await catalog.resolve("a")

    run(test())


class RemoteStore(AdapterStore):
    """A store on disk that is reached as if through a network: `away` refuses, `gate` makes wait; both for what is
    not known here."""

    is_remote = True
    is_away = False

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.away = False
        self.gate = threading.Event()
        self.gate.set()
        self.threads: set[str] = set()
        self.num_looks = 0
        self.fetched: list[str] = []

    def stamp(self, name: str) -> Any:
        self.num_looks += 1
        self._cross()
        return super().stamp(name)

    def fetch(self, digest: str) -> Path:
        self._cross()
        self.fetched.append(digest)
        return super().fetch(digest)

    def _cross(self) -> None:
        self.threads.add(threading.current_thread().name)
        self.gate.wait()
        if self.away:
            raise StoreUnavailable("the bucket cannot be reached")


@pytest.fixture
def far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    """Its answers are never fresh, but in tests that say so."""
    monkeypatch.setattr("server.frontend.catalog.FRESH_SECONDS", 0.0)
    return Shelf(tmp_path, RemoteStore(tmp_path / "store"))


def remote(shelf: Shelf) -> RemoteStore:
    assert isinstance(shelf.store, RemoteStore)
    shelf.store.num_looks = 0
    shelf.store.threads.clear()
    return shelf.store


def test_a_remote_store_is_asked_in_threads_while_the_loop_goes_on(far: Shelf) -> None:
    async def test() -> None:
        digest = far.publish(0)
        store = remote(far)
        store.gate.clear()
        holding = far.catalog.hold("a")
        waiting = asyncio.create_task(holding.__aenter__())
        await until(lambda: store.num_looks > 0)  # the loop turns while the store does not answer
        store.gate.set()
        version = await waiting
        assert version.digest == digest
        assert threading.main_thread().name not in store.threads
        await holding.__aexit__(None, None, None)

    run(test())


def test_what_many_ask_at_once_is_asked_and_fetched_once(far: Shelf) -> None:
    async def test() -> None:
        digest = far.publish(0)
        store = remote(far)
        store.gate.clear()

        async def use() -> str:
            async with far.catalog.hold("a") as version:
                await asyncio.sleep(0)
                return version.digest

        users = [asyncio.create_task(use()) for _ in range(10)]
        await until(lambda: store.num_looks > 0)
        store.gate.set()
        assert set(await asyncio.gather(*users)) == {digest}
        assert store.num_looks == 1
        assert store.fetched == [digest]

    run(test())


def test_an_answer_of_a_remote_store_is_good_for_a_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        monkeypatch.setattr(loop, "time", lambda: now)
        shelf = Shelf(tmp_path, RemoteStore(tmp_path / "store"))
        old = shelf.publish(0)
        store, catalog = remote(shelf), shelf.catalog
        assert (await catalog.resolve("a")).digest == old
        new = shelf.publish(1)
        store.num_looks = 0
        now += 0.9 * FRESH_SECONDS
        assert (await catalog.resolve("a")).digest == old
        assert store.num_looks == 0
        for _ in range(2):
            now += 0.2 * FRESH_SECONDS
            assert (await catalog.resolve("a")).digest == new
        assert store.num_looks == 1

    run(test())


def test_a_remote_store_goes_away_and_comes_back(far: Shelf) -> None:
    """What is resident is served on by its name; what is not, or was never asked for, is refused with a time to come
    back."""

    async def test() -> None:
        catalog = far.catalog
        hot, cold = far.publish(0, "hot"), far.publish(1, "cold")
        far.publish(2, "never")
        store = remote(far)
        async with catalog.hold("cold"), catalog.hold("hot"):
            catalog.set_resident([hot])
        store.fetched.clear()
        store.away = True
        async with catalog.hold("hot") as version:
            assert version.digest == hot
            assert version.path.is_dir()
        assert store.fetched == []
        for name in ("cold", "never"):
            with pytest.raises(StoreUnavailable) as caught:
                async with catalog.hold(name):
                    pass
            assert caught.value.retry_after is not None
        assert far.heard[-1] is False
        with pytest.raises(StoreUnavailable):
            await catalog.list(10, "")
        with pytest.raises(InvalidAdapterId):
            await catalog.resolve("../etc")
        # It hangs now, instead of refusing: the resident one does not wait for it.
        store.gate.clear()
        async with catalog.hold("hot") as version:
            assert version.digest == hot
        store.away = False
        store.gate.set()
        async with catalog.hold("cold") as version:
            assert version.digest == cold
        assert far.heard[-1] is True

    run(test())


def test_what_is_resident_does_not_wait_long_for_a_store_that_hangs(
    far: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.frontend.catalog.SHORT_PATIENCE", 0.01)

    async def test() -> None:
        digest = far.publish(0)
        store = remote(far)
        async with far.catalog.hold("a"):
            store.gate.clear()
            assert (await far.catalog.resolve("a")).digest == digest
            other = asyncio.create_task(far.catalog.resolve("other"))
            await until(lambda: store.num_looks >= 3)
            assert not other.done(), "nothing is known of it"
            store.gate.set()
            with pytest.raises(AdapterNotFound):
                await other

    run(test())


def test_a_store_that_answers_from_memory_because_it_is_away_is_not_up(far: Shelf) -> None:
    async def test() -> None:
        far.publish(0)
        store = remote(far)
        for is_away in (False, True, False):
            store.is_away = is_away  # type: ignore[misc]
            await far.catalog.resolve("a")
            assert far.heard[-1] is not is_away

    run(test())


def test_a_move_is_seen_by_whoever_asks_after_it(tmp_path: Path) -> None:
    """Though the last answer would still be good, and a question from before it is still under way."""

    async def test() -> None:
        shelf = Shelf(tmp_path, RemoteStore(tmp_path / "store"))
        old, new = shelf.publish(0), shelf.publish(1)
        store, catalog = remote(shelf), shelf.catalog
        assert (await catalog.resolve("a")).digest == new
        store.num_looks = 0
        store.gate.clear()
        early = asyncio.create_task(catalog.resolve("a@prod"))
        await until(lambda: store.num_looks > 0)
        moving = asyncio.create_task(catalog.move_label("a", "latest", old, None))
        store.gate.set()
        await moving
        assert (await catalog.resolve("a")).digest == old
        with pytest.raises(AdapterNotFound):
            await early
        await catalog.move_label("a", "prod", new, None)
        assert (await catalog.resolve("a@prod")).digest == new
        await catalog.remove("a", None)
        with pytest.raises(AdapterNotFound):
            await catalog.resolve("a@prod")

    run(test())


def test_a_name_that_goes_is_forgotten_though_it_was_known(far: Shelf) -> None:
    async def test() -> None:
        digest = far.publish(0)
        store = remote(far)
        await far.catalog.resolve("a")
        far.catalog.set_resident([digest])
        store.remove("a")
        with pytest.raises(AdapterNotFound):
            await far.catalog.resolve("a")
        store.away = True
        with pytest.raises(StoreUnavailable):
            await far.catalog.resolve("a")

    run(test())


def test_a_store_that_hangs_is_given_up_after_a_while(far: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.frontend.catalog.PATIENCE", 0.01)

    async def test() -> None:
        far.publish(0)
        store = remote(far)
        store.gate.clear()
        with pytest.raises(StoreUnavailable, match="did not answer") as caught:
            await far.catalog.resolve("a")
        assert caught.value.retry_after is not None
        store.gate.set()

    run(test())


def test_a_fetch_that_fails_is_tried_again_by_the_next(far: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        far.publish(0)
        store = remote(far)
        fetch: Callable[[str], Path] = store.fetch

        def broken(digest: str) -> Path:
            raise StoreUnavailable("the connection broke")

        monkeypatch.setattr(store, "fetch", broken)
        with pytest.raises(StoreUnavailable, match="broke"):
            async with far.catalog.hold("a"):
                pass
        monkeypatch.setattr(store, "fetch", fetch)
        async with far.catalog.hold("a") as version:
            assert version.path.is_dir()

    run(test())


def test_a_fetch_that_nobody_waits_for_any_more_lets_go(far: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.frontend.catalog.FRESH_SECONDS", 60.0)  # only the fetch is left to be waited for

    async def test() -> None:
        digest = far.publish(0)
        store = remote(far)
        await far.catalog.resolve("a")
        store.gate.clear()
        store.threads.clear()

        async def use() -> None:
            async with far.catalog.hold("a"):
                pass

        user = asyncio.create_task(use())
        await until(lambda: len(store.threads) > 0)
        assert store.num_looks == 1
        user.cancel()
        with pytest.raises(asyncio.CancelledError):
            await user
        store.gate.set()
        AdapterStore(store.root).remove("a")
        await until(lambda: digest in store.gc().removed)

    run(test())
