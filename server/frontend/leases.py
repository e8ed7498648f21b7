"""Holds the files of adapters that requests use or the engine has in memory, so that garbage collection of the store
(or of a remote store's cache) leaves them alone."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Collection
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from adapters.errors import AdapterNotFound, LorikeetError
from adapters.leases import Lease

# A version that is collected between being fetched and being leased is fetched again, this often at most.
_TRIES = 3

T = TypeVar("T")


class Files(Protocol):
    """Where versions are; `adapters.store.AdapterStore` in a real server. A remote one takes its time."""

    @property
    def is_remote(self) -> bool: ...

    @property
    def is_away(self) -> bool: ...

    def fetch(self, digest: str) -> Path: ...

    def lease(self, digest: str) -> Lease: ...


@dataclass(slots=True)
class _Holding:
    """A version's directory and the lease on it, once they are there."""

    taken: "asyncio.Future[tuple[Path, Lease]]"
    num_users: int = 0


class Leases:
    """One lease a digest, while anybody uses it or it is resident. For one event loop; a remote store is asked in
    threads of `executor`."""

    def __init__(self, files: Files, executor: Executor) -> None:
        self._files = files
        self._executor = executor
        self._holdings: dict[str, _Holding] = {}
        self._resident: frozenset[str] = frozenset()

    @contextlib.asynccontextmanager
    async def hold(self, digest: str) -> AsyncGenerator[Path, None]:
        """The directory of a version, whose files are there while the block lasts. Raises AdapterNotFound,
        StoreUnavailable."""
        holding = self._holdings.get(digest) or self._take(digest)
        holding.num_users += 1
        try:
            path, _ = await asyncio.shield(holding.taken)
            yield path
        finally:
            holding.num_users -= 1
            self._drop_if_idle(digest)

    def set_resident(self, digests: Collection[str]) -> None:
        """What the engine has in memory now."""
        before, self._resident = self._resident, frozenset(digests)
        for digest in before - self._resident:
            self._drop_if_idle(digest)
        for digest in self._resident - before - self._holdings.keys():
            self._take(digest)  # nobody waits for it any more: what has been collected by now is served from memory

    def is_held(self, digest: str) -> bool:
        """Whether a version's files are here and stay."""
        holding = self._holdings.get(digest)
        return holding is not None and _is_taken(holding)

    def close(self) -> None:
        """Gives all up."""
        self._resident = frozenset()
        for holding in self._holdings.values():
            holding.taken.add_done_callback(_release)
        self._holdings.clear()

    def _take(self, digest: str) -> _Holding:
        loop = asyncio.get_running_loop()
        if self._files.is_remote:
            taken = loop.run_in_executor(self._executor, self._fetch, digest)
        else:  # a few calls of the system: a thread would take longer
            taken = _done(loop, lambda: self._fetch(digest))
        holding = self._holdings[digest] = _Holding(taken)
        taken.add_done_callback(lambda done: self._drop_if_failed(digest, holding))
        return holding

    def _fetch(self, digest: str) -> tuple[Path, Lease]:
        for _ in range(_TRIES - 1):
            path = self._files.fetch(digest)
            with contextlib.suppress(AdapterNotFound):
                return path, self._files.lease(digest)
        return self._files.fetch(digest), self._files.lease(digest)

    def _drop_if_idle(self, digest: str) -> None:
        holding = self._holdings.get(digest)
        if holding is not None and not holding.num_users and digest not in self._resident:
            del self._holdings[digest]
            holding.taken.add_done_callback(_release)

    def _drop_if_failed(self, digest: str, holding: _Holding) -> None:
        """The next request tries again."""
        if not _is_taken(holding) and self._holdings.get(digest) is holding:
            del self._holdings[digest]


def _is_taken(holding: _Holding) -> bool:
    taken = holding.taken
    return taken.done() and not taken.cancelled() and taken.exception() is None


def _release(taken: "asyncio.Future[tuple[Path, Lease]]") -> None:
    if not taken.cancelled() and taken.exception() is None:
        _, lease = taken.result()
        lease.release()


def _done(loop: asyncio.AbstractEventLoop, work: Callable[[], T]) -> "asyncio.Future[T]":
    """The outcome of `work`, which is done now."""
    future: asyncio.Future[T] = loop.create_future()
    try:
        future.set_result(work())
    except LorikeetError as error:
        future.set_exception(error)
    return future
