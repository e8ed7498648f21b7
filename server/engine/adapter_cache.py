"""Which adapters are in memory, who holds them, and bringing in those that are not.

Reading, checking and copying happen on a worker thread; the step loop asks `poll()` once a step, which only
moves entries between states. Rows are taken from adapters without leases, least recently used first. Where leases
leave too few, the least recently used adapters are *drained*, given no new leases, so that busy adapters cannot
keep one out for ever; whoever waits for rows first gets them first.

    request → READING (worker) → WAITING for rows → COPYING (worker) → resident
"""

import logging
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from adapters.errors import AdapterInUse, AdapterTooLarge, LorikeetError, StoreUnavailable
from server.engine.messages import AdapterRef, ResidentAdapter
from server.lora.pool import AdapterPool, Ranges
from server.lora.weights import PackedAdapter

log = logging.getLogger(__name__)

Load = Callable[[Path], PackedAdapter]


@dataclass(slots=True)
class _Resident:
    ranges: Ranges
    rank: int
    leases: int = 0


@dataclass(slots=True)
class _Loading:
    """`packed` once read; `ranges` once rows are taken and the copy is under way."""

    work: Future[PackedAdapter] | Future[None]
    packed: PackedAdapter | None = None
    ranges: Ranges | None = None


@dataclass(frozen=True, slots=True)
class Arrivals:
    """What changed since the last poll: digests now resident, and those refused with their error."""

    loaded: list[str] = field(default_factory=list)
    failed: dict[str, LorikeetError] = field(default_factory=dict)


class AdapterCache:
    """Residency of adapters, keyed by digest. All methods belong to the step loop's thread."""

    def __init__(self, pool: AdapterPool, load: Load) -> None:
        self._pool = pool
        self._load = load
        self._resident: OrderedDict[str, _Resident] = OrderedDict()  # least recently used first
        self._loading: dict[str, _Loading] = {}
        self._draining: set[str] = set()  # resident ones that get no new leases; settled anew by every poll
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="adapter-loader")
        self.num_loads = 0
        self.num_failures = 0
        self.num_evictions = 0

    def request(self, adapter: AdapterRef) -> None:
        """Begin to load unless resident or under way. Returns at once; the outcome comes from `poll`."""
        if adapter.digest not in self._resident and adapter.digest not in self._loading:
            self._loading[adapter.digest] = _Loading(self._worker.submit(self._load, Path(adapter.path)))

    def is_resident(self, digest: str) -> bool:
        return digest in self._resident

    def acquire(self, digest: str) -> bool:
        """Take a lease if resident and not draining: a leased adapter is never evicted."""
        entry = self._resident.get(digest)
        if entry is None or digest in self._draining:
            return False
        entry.leases += 1
        self._resident.move_to_end(digest)
        return True

    def release(self, digest: str) -> None:
        entry = self._resident[digest]
        assert entry.leases > 0, f"{digest} released more often than acquired"
        entry.leases -= 1

    def rows(self, digest: str) -> Ranges:
        """The pool rows of a leased adapter."""
        entry = self._resident[digest]
        assert entry.leases > 0, f"{digest} used without a lease"
        return entry.ranges

    def unload(self, digest: str) -> None:
        """Drop an adapter; absent is fine. Raises AdapterInUse while sequences hold it."""
        entry = self._resident.get(digest)
        if entry is None:
            return
        if entry.leases:
            raise AdapterInUse(f"adapter {digest} is held by {entry.leases} running requests; try again when they end")
        self._evict(digest)

    @property
    def is_loading(self) -> bool:
        return bool(self._loading)

    def poll(self) -> Arrivals:
        """Advance every load whose work is done. What arrives is still there when this returns: rows are taken for
        others before, not after, or adapters that wait for each other's rows could evict each other for ever."""
        arrivals = Arrivals()
        self._draining.clear()
        for digest, loading in sorted(self._loading.items(), key=lambda item: item[1].ranges is not None):
            try:
                done = self._advance(digest, loading)
            except LorikeetError as error:
                arrivals.failed[digest] = error
            else:
                if done:
                    arrivals.loaded.append(digest)
                    self.num_loads += 1
                continue
            del self._loading[digest]
            self.num_failures += 1
        return arrivals

    def snapshot(self) -> list[ResidentAdapter]:
        return [
            ResidentAdapter(digest, "device", self._pool.rows_for(entry.rank) * self._pool.row_bytes, entry.leases)
            for digest, entry in self._resident.items()
        ]

    def close(self) -> None:
        self._worker.shutdown(wait=True, cancel_futures=True)

    def check_integrity(self) -> None:
        """Every row is free or belongs to exactly one adapter."""
        held = [entry.ranges for entry in self._resident.values()]
        held += [loading.ranges for loading in self._loading.values() if loading.ranges is not None]
        rows = [row for ranges in held for start, stop in ranges for row in range(start, stop)]
        assert len(rows) == len(set(rows)), "two adapters share a row"
        taken = sum(self._pool.rows_for(sum(stop - start for start, stop in ranges)) for ranges in held)
        assert taken + self._pool.num_free_rows == self._pool.num_rows, "rows leaked"

    def _advance(self, digest: str, loading: _Loading) -> bool:
        """True once resident. Raises what refused the adapter."""
        if not loading.work.done():
            return False
        if loading.packed is None:
            loading.packed = _outcome(loading.work, digest)
            assert loading.packed is not None, "reading gave no adapter"
        if loading.ranges is None:
            loading.ranges = self._allocate(loading.packed.rank, digest)
            if loading.ranges is not None:
                loading.work = self._worker.submit(self._pool.write, loading.ranges, loading.packed)
            return False
        _outcome(loading.work, digest)
        del self._loading[digest]
        self._resident[digest] = _Resident(loading.ranges, loading.packed.rank)
        return True

    def _allocate(self, rank: int, digest: str) -> Ranges | None:
        """Rows, evicting what nobody holds; None while those that are held leave too little, and are drained for
        this one, or while an earlier one waits for rows."""
        needed = self._pool.rows_for(rank)
        if needed > self._pool.num_rows:
            raise AdapterTooLarge(
                f"adapter {digest} of rank {rank} needs {needed * self._pool.row_bytes} bytes; "
                f"{self._pool.num_rows * self._pool.row_bytes} are set aside for adapters (--adapter-memory)"
            )
        if self._draining:
            return None
        idle = [name for name, entry in self._resident.items() if not entry.leases]
        reclaimable = sum(self._pool.rows_for(self._resident[name].rank) for name in idle)
        if self._pool.num_free_rows + reclaimable < needed:
            self._drain(needed - self._pool.num_free_rows)
            return None
        for name in idle:
            if self._pool.num_free_rows >= needed:
                break
            self._evict(name)
            self.num_evictions += 1
        return self._pool.allocate(rank)

    def _drain(self, num_rows: int) -> None:
        """Give no new leases on the least recently used adapters that have so many rows together."""
        for digest, entry in self._resident.items():
            if num_rows <= 0:
                break
            self._draining.add(digest)
            num_rows -= self._pool.rows_for(entry.rank)

    def _evict(self, digest: str) -> None:
        self._pool.free(self._resident.pop(digest).ranges)


def _outcome(work: Future[PackedAdapter] | Future[None], digest: str) -> PackedAdapter | None:
    """The worker's result; an error that is not ours becomes one that names the adapter."""
    try:
        return work.result()
    except LorikeetError:
        raise
    except OSError as error:
        raise StoreUnavailable(f"adapter {digest} cannot be read: {error}", retry_after=1.0) from error
