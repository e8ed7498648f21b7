"""Which adapters are in memory, who holds them, and bringing in those that are not.

    request → QUEUED → READING (worker) → WAITING for rows → COPYING, CHECKING (worker) → resident
                                ↑ from the host tier, without reading

Reading, checking and copying happen on worker threads; the step loop asks `poll()` once a step, which only moves
entries between states. Rows come from adapters that nobody leases, claims or pins, least recently used first.

Nobody starves: among those that are read, who was requested first gets rows first. Where leases leave too few, the
least recently used adapters are *barred*, given no new leases until the first in line has its rows; what runs on
them goes on to its end. What arrives is *claimed* for the sequences that wait for it: it stays until one of them has
leased it, or none waits any more. So a load waits at most for the runs of one sequence for each load before it.
"""

from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from time import perf_counter

from adapters.errors import AdapterInUse, LorikeetError
from server.engine.device_tier import DeviceTier, Resident
from server.engine.host_tier import HostTier
from server.engine.loading import Arrivals, Loading, Progress, Stage, TierCounters, outcome, timed_load
from server.engine.messages import AdapterLoad, AdapterRef, ResidentAdapter
from server.errors import PinRefused
from server.lora.pool import AdapterPool, Ranges
from server.lora.weights import PackedAdapter

Load = Callable[[AdapterRef], PackedAdapter]
Prove = Callable[[Path, Ranges], None]

NUM_WORKERS = 2  # one slow file does not hold up the others
MAX_UNDER_WAY = 4  # loads read ahead of their rows: bounds the memory of those that wait for rows


class AdapterCache:
    """Residency of adapters, keyed by digest. All methods belong to the step loop's thread.

    `prove` checks an adapter in its rows before anyone may lease it, once a digest; None checks nothing. `wake` is
    called on a worker when it has done something that `poll` waits for.
    """

    def __init__(
        self,
        pool: AdapterPool,
        load: Load,
        prove: Prove | None = None,
        host_bytes: int = 0,
        workers: Executor | None = None,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self._pool = pool
        self._load = load
        self._prove = prove
        self._proven: set[str] = set()
        self._host = HostTier(host_bytes)
        self._device = DeviceTier(pool)
        self._loading: dict[str, Loading] = {}  # first requested first
        self._unloaded: list[str] = []  # since the last poll
        self._workers = workers or ThreadPoolExecutor(NUM_WORKERS, thread_name_prefix="adapter-loader")
        self._wake = wake
        self.counters = TierCounters()

    # What sequences ask

    def request(self, adapter: AdapterRef) -> None:
        """A sequence waits for it: begin to load unless resident or under way. The outcome comes from `poll`."""
        if adapter.digest not in self._device.entries:
            self._begin(adapter).is_waited_for = True

    def forget(self, digest: str) -> None:
        """No sequence waits for it any more: it may be evicted, or never come."""
        if digest in self._device.entries:
            self._device.entries[digest].is_claimed = False
        elif digest in self._loading:
            loading = self._loading[digest]
            loading.is_waited_for = False
            if loading.is_leaving:
                self._unloaded.append(digest)
            self._drop_unwanted(digest)

    def is_available(self, digest: str) -> bool:
        """Whether `acquire` would succeed now."""
        return self._device.is_available(digest)

    def acquire(self, digest: str) -> bool:
        """Take a lease if resident, not leaving and not barred: a leased adapter is never evicted."""
        self._host.touch(digest)
        return self._device.acquire(digest)

    def release(self, digest: str) -> None:
        self._device.release(digest)

    def rows(self, digest: str) -> Ranges:
        """The pool rows of a leased or merged adapter."""
        return self._device.rows(digest)

    def count_lookup(self, digest: str) -> None:
        """A sequence came with this adapter: a hit or a miss of the tiers."""
        hits, misses = self.counters.hits, self.counters.misses
        if digest in self._device.entries:
            hits["device"] += 1
            return
        misses["device"] += 1
        loading = self._loading.get(digest)
        is_read = digest in self._host or (loading is not None and loading.packed is not None)
        (hits if is_read else misses)["host"] += 1

    # What calls ask

    def is_resident(self, digest: str) -> bool:
        return digest in self._device.entries

    def is_on_its_way(self, digest: str) -> bool:
        return digest in self._loading

    def load(self, adapter: AdapterRef, pin: bool = False) -> bool:
        """Make resident, and pin; True if it is so already, else `poll` tells. Raises PinRefused, or AdapterInUse
        while it is being unloaded."""
        entry = self._device.entries.get(adapter.digest)
        loading = self._loading.get(adapter.digest)
        is_draining = loading is not None and loading.is_leaving and loading.is_waited_for
        if is_draining or (entry is not None and entry.is_leaving):
            raise AdapterInUse(f"adapter {adapter.digest} is being unloaded; try again when that has ended")
        if entry is None:
            loading = self._begin(adapter)
            loading.is_called = True
            loading.pin = loading.pin or pin
            return False
        if pin:
            self._pin(adapter.digest)
        return True

    def unpin(self, digest: str) -> None:
        """Let it be evicted again; one that is not pinned, or not here, is fine."""
        if digest in self._device.entries:
            self._device.entries[digest].is_pinned = False
        if digest in self._loading:
            self._loading[digest].pin = False

    def unload(self, digest: str, drain: bool = False) -> bool:
        """Drop an adapter from every tier, and a load that was only called for; absent is fine. While sequences hold it
        or wait for its load: AdapterInUse, or with `drain` False; then it goes once these have run, is given to no
        later ones, and `poll` tells when it is gone. True: it is gone, for earlier calls too; `poll` tells nothing."""
        loading, entry = self._loading.get(digest), self._device.entries.get(digest)
        if entry is not None and entry.is_merged:
            raise AdapterInUse(f"adapter {digest} is merged into the base; unmerge it first")
        is_wanted = loading is not None and loading.is_waited_for
        if (is_wanted or (entry is not None and (entry.leases or entry.is_claimed))) and not drain:
            held = (
                f"is held by {entry.leases} running requests" if entry is not None else "is being loaded for requests"
            )
            raise AdapterInUse(f"adapter {digest} {held}; try again when they have ended, or drain it")
        if loading is not None:
            loading.is_called, loading.pin, loading.is_leaving = False, False, True
            self._host.drop(digest)
            self._drop_unwanted(digest)
            self._unloaded = [other for other in self._unloaded if other != digest]
            return not is_wanted
        if entry is not None and (entry.leases or entry.is_claimed):
            entry.is_leaving, entry.is_pinned = True, False
            return False
        self._device.remove(digest)
        self._host.drop(digest)
        return True

    def begin_merge(self, digest: str) -> bool:
        """Keep a resident adapter's rows until `end_merge`; False where it is not, or no longer, resident. Raises
        PinRefused."""
        entry = self._device.entries.get(digest)
        if entry is None or entry.is_leaving:
            return False
        self._check_room_beside(digest)
        entry.is_merged = True
        return True

    def end_merge(self, digest: str) -> None:
        """Let its rows go again when others need them."""
        self._device.entries[digest].is_merged = False

    # What the step loop asks

    @property
    def is_loading(self) -> bool:
        """Whether `poll` is expected to bring something about."""
        return bool(self._loading or self._device.barred or self._unloaded) or self._device.is_leaving

    def poll(self) -> Arrivals:
        """Advance every load and unload whose work is done."""
        arrivals = Arrivals()
        self._device.barred.clear()  # settled anew
        for digest in self._device.let_go():
            self._host.drop(digest)
            self._unloaded.append(digest)
        self._for_each(Stage.READING, self._take_read, arrivals)
        self._for_each(Stage.WAITING, self._take_rows, arrivals)
        self._for_each(Stage.COPYING, self._arrive, arrivals)
        self._start_queued()
        arrivals.unloaded.extend(self._unloaded)
        self._unloaded.clear()
        for digest, loading in self._loading.items():
            if loading.is_called and loading.stage is not loading.told:
                arrivals.progress.append(self.progress(digest))
        return arrivals

    def progress(self, digest: str) -> Progress:
        """Where a load is; what `poll` tells next is what comes after."""
        loading = self._loading[digest]
        loading.told = stage = loading.stage
        size = 0 if loading.packed is None else loading.packed.num_bytes
        return Progress(digest, Stage.WAITING if stage is Stage.QUEUED else stage, size)

    def snapshot(self) -> list[ResidentAdapter]:
        """Those in the host tier, then those on the device."""
        held = [ResidentAdapter(digest, "host", packed.num_bytes, 0) for digest, packed in self._host]
        return held + [
            ResidentAdapter(
                digest, "device", self._device.num_bytes(entry), entry.leases, entry.is_pinned, entry.is_merged
            )
            for digest, entry in self._device.entries.items()
        ]

    @property
    def evictions(self) -> dict[str, int]:
        return {"host": self._host.num_evictions, "device": self._device.num_evictions}

    @property
    def used_bytes(self) -> dict[str, int]:
        return {"host": self._host.used_bytes, "device": self._device.used_bytes}

    def take_load_times(self) -> list[AdapterLoad]:
        """What was loaded since this was last called."""
        taken, self.counters.load_times = self.counters.load_times, []
        return taken

    def close(self) -> None:
        """Begin no more work; what is under way ends by itself."""
        self._workers.shutdown(wait=False, cancel_futures=True)

    def check_integrity(self) -> None:
        """Every row is free or belongs to exactly one adapter, and every adapter is in one state."""
        held = [entry.ranges for entry in self._device.entries.values()]
        held += [loading.ranges for loading in self._loading.values() if loading.ranges is not None]
        rows = [row for ranges in held for start, stop in ranges for row in range(start, stop)]
        assert len(rows) == len(set(rows)), "two adapters share a row"
        taken = sum(self._pool.rows_for(sum(stop - start for start, stop in ranges)) for ranges in held)
        assert taken + self._pool.num_free_rows == self._pool.num_rows, "rows leaked"
        assert not self._device.entries.keys() & self._loading.keys(), "an adapter is loaded twice"
        assert all(entry.leases >= 0 for entry in self._device.entries.values()), "a lease was given back twice"
        assert self._num_under_way() <= MAX_UNDER_WAY, "too much is read ahead"
        self._host.check_integrity()

    # A load goes on

    def _begin(self, adapter: AdapterRef) -> Loading:
        loading = self._loading.get(adapter.digest)
        if loading is None:
            loading = self._loading[adapter.digest] = Loading(adapter, packed=self._host.get(adapter.digest))
            if loading.packed is not None:
                loading.stage = Stage.WAITING
            self._start_queued()
        if not loading.is_waited_for:  # unloaded, but still on a worker: wanted again
            loading.is_leaving = False
        return loading

    def _num_under_way(self) -> int:
        return sum(loading.reading is not None for loading in self._loading.values())

    def _start_queued(self) -> None:
        free = MAX_UNDER_WAY - self._num_under_way()
        for loading in self._loading.values():
            if free <= 0:
                break
            if loading.stage is Stage.QUEUED:
                loading.stage = Stage.READING
                loading.reading = self._workers.submit(timed_load, self._load, loading.adapter)
                loading.reading.add_done_callback(lambda _: self._wake())
                free -= 1

    def _for_each(self, stage: Stage, advance: Callable[[str, Loading, Arrivals], bool], arrivals: Arrivals) -> None:
        """Advance the loads of a stage, first requested first, until one says False."""
        for digest, loading in list(self._loading.items()):
            # The worker's own change from COPYING to CHECKING is no change here.
            if loading.stage is not stage and not (stage is Stage.COPYING and loading.stage is Stage.CHECKING):
                continue
            try:
                if not advance(digest, loading, arrivals):
                    break
            except LorikeetError as error:
                self._abandon(digest)
                self._host.drop(digest)
                self.counters.failures[error.reason] += 1
                if loading.is_wanted:
                    arrivals.failed[digest] = error

    def _take_read(self, digest: str, loading: Loading, arrivals: Arrivals) -> bool:
        assert loading.reading is not None, "it is being read"
        if loading.reading.done():
            loading.packed, seconds = outcome(loading.reading, digest)
            loading.stage = Stage.WAITING
            if not loading.is_leaving:
                self._host.put(digest, loading.packed)
            self._count("disk", "host", seconds)
            self._drop_unwanted(digest)
        return True

    def _take_rows(self, digest: str, loading: Loading, arrivals: Arrivals) -> bool:
        """False while it must wait for rows, and with it all that were requested later."""
        packed = loading.packed
        assert packed is not None, "it is read"
        loading.ranges = self._device.allocate(packed.rank, digest)
        if loading.ranges is None:
            return False
        loading.stage = Stage.COPYING
        loading.copying = self._workers.submit(self._bring, loading, packed, loading.ranges)
        loading.copying.add_done_callback(lambda _: self._wake())
        return True

    def _arrive(self, digest: str, loading: Loading, arrivals: Arrivals) -> bool:
        assert loading.copying is not None, "it is being copied"
        if not loading.copying.done():
            return True
        self._count("host", "device", outcome(loading.copying, digest))
        assert loading.packed is not None, "it is read"
        assert loading.ranges is not None, "it has rows"
        self._proven.add(digest)
        if loading.is_leaving and not loading.is_waited_for:
            self._abandon(digest)
            return True
        del self._loading[digest]
        self._device.entries[digest] = Resident(
            loading.ranges, loading.packed.rank, is_claimed=loading.is_waited_for, is_leaving=loading.is_leaving
        )
        arrivals.loaded.append(digest)
        if loading.pin:
            try:
                self._pin(digest)
            except PinRefused as error:
                arrivals.unpinned[digest] = error
        return True

    def _bring(self, loading: Loading, packed: PackedAdapter, ranges: Ranges) -> float:
        """On a worker: copy, and check if it was never checked. The seconds it took."""
        began = perf_counter()
        self._pool.write(ranges, packed)
        if self._prove is not None and loading.adapter.digest not in self._proven:
            loading.stage = Stage.CHECKING
            self._prove(Path(loading.adapter.path), ranges)
        return perf_counter() - began

    def _drop_unwanted(self, digest: str) -> None:
        """End a load that nobody waits for, unless it is at its last stage or on a worker that cannot be stopped."""
        loading = self._loading[digest]
        if not loading.is_wanted and (
            loading.stage in (Stage.QUEUED, Stage.WAITING)
            or (loading.stage is Stage.READING and loading.reading is not None and loading.reading.cancel())
        ):
            self._abandon(digest)

    def _abandon(self, digest: str) -> None:
        loading = self._loading.pop(digest)
        if loading.ranges is not None:
            self._pool.free(loading.ranges)
        if loading.is_leaving:
            self._host.drop(digest)
            self._unloaded.append(digest)

    def _count(self, tier_from: str, tier_to: str, seconds: float) -> None:
        self.counters.loads[tier_to] += 1
        self.counters.load_times.append(AdapterLoad(tier_from, tier_to, seconds))

    def _pin(self, digest: str) -> None:
        self._check_room_beside(digest)
        self._device.entries[digest].is_pinned = True

    def _check_room_beside(self, digest: str) -> None:
        waiting = [loading.packed.rank for loading in self._loading.values() if loading.packed is not None]
        self._device.check_room_beside(digest, waiting + [packed.rank for _, packed in self._host])
