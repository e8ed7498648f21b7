"""Adapters with known contents, a pool for them, and workers that work when told to."""

from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import torch

from adapters.errors import InvalidAdapter, LorikeetError
from server.engine.adapter_cache import AdapterCache
from server.engine.loading import Arrivals
from server.engine.messages import AdapterRef
from server.errors import CanaryFailed
from server.lora.pool import PAGE_ROWS, AdapterPool, Ranges
from server.lora.weights import PackedAdapter
from tests.kernels.test_lora import SPEC, random_adapter

CPU = torch.device("cpu")
ROW_BYTES = AdapterPool(SPEC, 0, torch.float32, CPU).row_bytes


class ManualWorkers(Executor):
    """Tasks run when a test says so, in any order."""

    def __init__(self) -> None:
        self.tasks: list[tuple[Future[Any], Callable[[], Any]]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.tasks.append((future, lambda: fn(*args, **kwargs)))
        return future

    def run(self, index: int = 0) -> None:
        future, task = self.tasks.pop(index)
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(task())
            except (LorikeetError, OSError) as error:
                future.set_exception(error)

    def run_all(self) -> None:
        while self.tasks:
            self.run()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self.tasks.clear()


def ref(name: str) -> AdapterRef:
    return AdapterRef(f"sha256:{name}", name)


class CacheWorld:
    """A cache over a pool of `pages` pages. An adapter's name ends in its rank: "a:8". Names in `broken` cannot be
    read, those in `corrupt` do not prove right."""

    def __init__(self, pages: int, host_rows: int = 0, prove: bool = False) -> None:
        self.pool = AdapterPool(SPEC, pages * PAGE_ROWS * ROW_BYTES, torch.float32, CPU)
        self.workers = ManualWorkers()
        self.broken: set[str] = set()
        self.corrupt: set[str] = set()
        self.num_reads = 0
        self.num_proofs = 0
        self._packed: dict[str, PackedAdapter] = {}
        self.cache = AdapterCache(
            self.pool, self._load, self._prove if prove else None, host_rows * ROW_BYTES, self.workers
        )

    def packed(self, name: str) -> PackedAdapter:
        if name not in self._packed:
            generator = torch.Generator().manual_seed(len(self._packed))
            self._packed[name] = random_adapter(int(name.rsplit(":", 1)[1]), torch.float32, generator)
        return self._packed[name]

    def _load(self, adapter: AdapterRef) -> PackedAdapter:
        self.num_reads += 1
        if adapter.path in self.broken:
            raise InvalidAdapter(f"{adapter.path} is broken")
        return self.packed(adapter.path)

    def _prove(self, directory: Path, ranges: Ranges) -> None:
        self.num_proofs += 1
        if directory.name in self.corrupt:
            raise CanaryFailed(f"{directory.name} computes something else")

    def holds(self, name: str) -> bool:
        """Whether the rows of a leased adapter have its values."""
        ranges, packed, first = self.cache.rows(ref(name).digest), self.packed(name), 0
        for start, stop in ranges:
            rows = slice(first, first + stop - start)
            for group, pool in self.pool.groups.items():
                if not torch.equal(pool.a[:, start:stop], packed.a[group][:, rows]):
                    return False
                if not all(
                    torch.equal(mine[:, start:stop], b[:, rows])
                    for mine, b in zip(pool.b, packed.b[group], strict=True)
                ):
                    return False
            first = rows.stop
        return first == packed.rank

    def poll(self) -> Arrivals:
        arrivals = self.cache.poll()
        self.cache.check_integrity()
        return arrivals

    def settle(self) -> list[str]:
        """Let the workers work until nothing changes; what arrived."""
        loaded: list[str] = []
        for _ in range(8):
            self.workers.run_all()
            loaded += self.poll().loaded
        return loaded

    def make_resident(self, *names: str) -> None:
        """Resident and claimed by nobody."""
        for name in names:
            self.cache.load(ref(name))
            assert self.settle() == [ref(name).digest], f"there is no room for {name}"
