"""The store as the event loop may ask it: which version an id means, where its files are, and the moves of labels.

A store on disk is asked in place where one look at a file is all (`resolve`), in a thread where it may be many. A
remote one is always asked in a thread, its answers are used again for a moment, and while it is away what is in use
or in memory is served on, under the names that it had last.
"""

import asyncio
import contextlib
import functools
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

from adapters.errors import AdapterNotFound, LorikeetError, StoreUnavailable
from adapters.ids import parse_adapter_id
from adapters.registry import AdapterEntry
from adapters.versions import Version
from server.frontend.leases import Files, Leases

# In seconds: how long an answer of a remote store is good (which looks only now and then itself), how long one is
# waited for, and how long where the last one would do.
FRESH_SECONDS = 0.5
PATIENCE = 10.0
SHORT_PATIENCE = 1.0
RETRY_AFTER = 5.0

# Names and ids that are remembered: past it, those that were not asked for longest are forgotten.
_MAX_REMEMBERED = 10_000

T = TypeVar("T")


class Store(Files, Protocol):
    """Where adapters are published; `adapters.store.AdapterStore` in a real server."""

    def move_label(self, name: str, label: str, digest: str, *, expected: str | None = None) -> Version: ...

    def rollback(self, name: str, label: str, *, expected: str | None = None) -> Version: ...

    def remove(self, name: str) -> None: ...

    def remove_version(self, name: str, digest: str) -> None: ...


class Registry(Protocol):
    """Turns ids into versions; `adapters.registry.AdapterRegistry` in a real server. Used from several threads."""

    @property
    def store(self) -> Store: ...

    def resolve(self, adapter_id: str) -> Version: ...

    def get(self, name: str) -> AdapterEntry: ...

    def list(self, page_size: int, page_token: str) -> tuple[Sequence[AdapterEntry], str]: ...


@dataclass(frozen=True, slots=True)
class _Answer:
    """What an id meant, and when (seconds of the event loop's clock) it was asked."""

    version: Version
    asked_at: float


class Catalog:
    """One store, for one event loop. `on_store` hears after every look whether it could be read.

    All methods raise StoreUnavailable, with a time to come back after where the store is remote.
    """

    def __init__(self, registry: Registry, on_store: Callable[[bool], None]) -> None:
        self._registry = registry
        self._store = registry.store
        self._on_store = on_store
        # Apart, so that what takes long does not hold up looking; and not the loop's threads, which encode prompts.
        self._lookups = ThreadPoolExecutor(4, thread_name_prefix="store-look")
        self._fetches = ThreadPoolExecutor(4, thread_name_prefix="store-fetch")
        self._calls = ThreadPoolExecutor(4, thread_name_prefix="store-call")
        self._leases = Leases(self._store, self._fetches)
        self._users: Counter[tuple[str, str]] = Counter()  # of a name, a digest
        self._names: OrderedDict[str, str] = OrderedDict()
        self._answers: OrderedDict[str, _Answer] = OrderedDict()
        self._asking: dict[str, asyncio.Task[Version]] = {}
        self._num_writes = 0
        self._is_up = True

    # Reading

    async def resolve(self, adapter_id: str) -> Version:
        """The version an id means now; of a remote store, a moment ago, or when it was last there. Raises
        InvalidAdapterId, AdapterNotFound, BaseMismatch."""
        if self._store.is_remote:
            version = await self._resolve_remote(adapter_id)
        else:
            with self._watched():
                version = self._registry.resolve(adapter_id)
        _remember(self._names, version.digest, version.name)
        return version

    async def list(self, page_size: int, page_token: str) -> tuple[Sequence[AdapterEntry], str]:
        """As `AdapterRegistry.list`."""
        return await self._ask(self._calls, functools.partial(self._registry.list, page_size, page_token))

    async def digests(self, name: str, digest: str | None) -> Sequence[str]:
        """The one version of a name, or (None) all it has."""
        if digest is not None:
            return (digest,)
        return (await self._ask(self._calls, functools.partial(self._registry.get, name))).digests

    @contextlib.asynccontextmanager
    async def hold(self, adapter_id: str, on_fetch: Callable[[], None] = lambda: None) -> AsyncGenerator[Version, None]:
        """Resolves an id, once, and keeps the files at the version's `path` while the block lasts. `on_fetch` is
        called if they may have to come from a remote store first."""
        version = await self.resolve(adapter_id)
        if self._store.is_remote and not self._leases.is_held(version.digest):
            on_fetch()
        async with contextlib.AsyncExitStack() as stack:
            try:
                path = await self._enter(version, stack)
            except AdapterNotFound:  # collected in between: the id may mean another version by now
                version = await self.resolve(adapter_id)
                path = await self._enter(version, stack)
            yield replace(version, path=path)

    async def _enter(self, version: Version, stack: contextlib.AsyncExitStack) -> Path:
        stack.enter_context(self._counted(version.name, version.digest))
        with self._watched():
            return await stack.enter_async_context(self._leases.hold(version.digest))

    def set_resident(self, digests: Collection[str]) -> None:
        """What the engine has in memory: its files stay, too."""
        self._leases.set_resident(digests)

    def num_users(self, name: str, digest: str | None = None) -> int:
        """How many hold a version under this name: one version, or (None) any."""
        return sum(users for (user, used), users in self._users.items() if user == name and digest in (used, None))

    @property
    def names(self) -> Mapping[str, str]:
        """Digest → the name by which it was last asked for."""
        return self._names

    # Writing

    async def move_label(self, name: str, label: str, digest: str, expected: str | None) -> Version:
        """As `AdapterStore.move_label`."""
        return await self._write(functools.partial(self._store.move_label, name, label, digest, expected=expected))

    async def rollback(self, name: str, label: str, expected: str | None) -> Version:
        """As `AdapterStore.rollback`."""
        return await self._write(functools.partial(self._store.rollback, name, label, expected=expected))

    async def remove(self, name: str, digest: str | None) -> Sequence[str]:
        """Forget a version of a name, or the name with all it has; what was forgotten. As `AdapterStore.remove` and
        `remove_version`."""
        digests = await self.digests(name, digest)
        if digest is not None:
            await self._write(functools.partial(self._store.remove_version, name, digest))
        else:
            await self._write(functools.partial(self._store.remove, name))
        return digests

    def close(self) -> None:
        """Gives up every lease. A look that is under way ends when it ends."""
        self._leases.close()
        for executor in (self._lookups, self._fetches, self._calls):
            executor.shutdown(wait=False, cancel_futures=True)

    # A store that may be slow or away

    async def _resolve_remote(self, adapter_id: str) -> Version:
        parse_adapter_id(adapter_id)  # what is no id is no question
        now = asyncio.get_running_loop().time()
        known = self._answers.get(adapter_id)
        if known is not None and now - known.asked_at < FRESH_SECONDS:
            return known.version
        asking = self._asking.get(adapter_id)
        if asking is None:
            asking = self._asking[adapter_id] = asyncio.create_task(self._look_up(adapter_id, now))
            asking.add_done_callback(lambda done: self._asked(adapter_id, done))
        if known is None or not self._leases.is_held(known.version.digest):
            return await asyncio.shield(asking)
        # It is served on, whether or not the store says in time that it is another version by now.
        if self._is_up:
            await asyncio.wait((asking,), timeout=SHORT_PATIENCE)
        if not asking.done():
            return known.version
        try:
            return asking.result()
        except StoreUnavailable:
            return known.version

    async def _look_up(self, adapter_id: str, now: float) -> Version:
        """Raises StoreUnavailable when the store takes too long."""
        num_writes = self._num_writes
        try:
            async with asyncio.timeout(PATIENCE):
                version = await self._ask(self._lookups, functools.partial(self._registry.resolve, adapter_id))
        except TimeoutError:
            self._set_up(False)
            message = f"the store did not answer within {PATIENCE:g} seconds"
            raise StoreUnavailable(message, retry_after=RETRY_AFTER) from None
        if num_writes == self._num_writes:  # else this may be what was before
            _remember(self._answers, adapter_id, _Answer(version, now))
        return version

    def _asked(self, adapter_id: str, asking: "asyncio.Task[Version]") -> None:
        if self._asking.get(adapter_id) is asking:
            del self._asking[adapter_id]
        if not asking.cancelled():
            error = asking.exception()  # nobody may be waiting for it
            if error is not None and not isinstance(error, StoreUnavailable):
                self._answers.pop(adapter_id, None)

    async def _write(self, change: Callable[[], T]) -> T:
        """Whoever asks once this has returned hears of the change."""
        try:
            return await self._ask(self._calls, change)
        finally:
            self._num_writes += 1
            self._answers.clear()
            self._asking.clear()

    async def _ask(self, executor: ThreadPoolExecutor, question: Callable[[], T]) -> T:
        """The answer, from a thread."""
        with self._watched():
            return await asyncio.get_running_loop().run_in_executor(executor, question)

    @contextlib.contextmanager
    def _counted(self, name: str, digest: str) -> Iterator[None]:
        self._users[name, digest] += 1
        try:
            yield
        finally:
            self._users[name, digest] -= 1
            if not self._users[name, digest]:
                del self._users[name, digest]

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            yield
        except StoreUnavailable as error:
            if self._store.is_remote and error.retry_after is None:
                error.retry_after = RETRY_AFTER
            self._set_up(False)
            raise
        except LorikeetError:
            self._set_up(not self._store.is_away)
            raise
        self._set_up(not self._store.is_away)

    def _set_up(self, is_up: bool) -> None:
        self._is_up = is_up
        self._on_store(is_up)


def _remember(memory: "OrderedDict[str, T]", key: str, value: T) -> None:
    memory[key] = value
    memory.move_to_end(key)
    if len(memory) > _MAX_REMEMBERED:
        memory.popitem(last=False)
