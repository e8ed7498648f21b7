"""Adapters on the device: who holds them, and whose rows go to whom."""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from adapters.errors import AdapterTooLarge
from server.errors import PinRefused
from server.lora.pool import AdapterPool, Ranges


@dataclass(slots=True)
class Resident:
    """An adapter in the rows of `ranges`. Claimed: it came for sequences, of which none has leased it yet."""

    ranges: Ranges
    rank: int
    leases: int = 0
    is_claimed: bool = False
    is_pinned: bool = False
    is_merged: bool = False  # in the base's weights: its rows stay, and are those that take it off
    is_leaving: bool = False  # unloaded once its claim is taken and its leases end

    @property
    def stays(self) -> bool:
        """Whether it is never evicted."""
        return self.is_pinned or self.is_merged


class DeviceTier:
    """Resident adapters by digest, least recently leased first, and the pool that their rows are of.

    Rows come from adapters that nobody leases, claims or pins, least recently leased first. Where leases leave too few,
    the least recently leased ones are *barred*: they get no new leases until `unbar`.
    """

    def __init__(self, pool: AdapterPool) -> None:
        self._pool = pool
        self.entries: OrderedDict[str, Resident] = OrderedDict()
        self.barred: set[str] = set()
        self.num_evictions = 0

    def is_available(self, digest: str) -> bool:
        """Whether `acquire` would succeed now."""
        entry = self.entries.get(digest)
        if entry is None or digest in self.barred:
            return False
        return entry.is_claimed or not entry.is_leaving

    def acquire(self, digest: str) -> bool:
        """Take a lease if it is here, not barred and not leaving; a claim is thereby taken."""
        if not self.is_available(digest):
            return False
        entry = self.entries[digest]
        entry.leases += 1
        entry.is_claimed = False
        self.entries.move_to_end(digest)
        return True

    def release(self, digest: str) -> None:
        entry = self.entries[digest]
        assert entry.leases > 0, f"{digest} released more often than acquired"
        entry.leases -= 1

    def rows(self, digest: str) -> Ranges:
        """The pool rows of a leased or merged adapter."""
        entry = self.entries[digest]
        assert entry.leases > 0 or entry.is_merged, f"{digest} used without a lease"
        return entry.ranges

    @property
    def is_leaving(self) -> bool:
        """Whether any adapter goes once its leases end."""
        return any(entry.is_leaving for entry in self.entries.values())

    def let_go(self) -> list[str]:
        """Remove those that are leaving and that nobody holds any more."""
        gone = [d for d, e in self.entries.items() if e.is_leaving and not (e.leases or e.is_claimed)]
        for digest in gone:
            self.remove(digest)
        return gone

    def remove(self, digest: str) -> None:
        """Take an adapter out; absent is fine."""
        entry = self.entries.pop(digest, None)
        if entry is not None:
            self._pool.free(entry.ranges)
        self.barred.discard(digest)

    def num_bytes(self, entry: Resident) -> int:
        return self._pool.rows_for(entry.rank) * self._pool.row_bytes

    @property
    def used_bytes(self) -> int:
        return sum(self.num_bytes(entry) for entry in self.entries.values())

    def allocate(self, rank: int, digest: str) -> Ranges | None:
        """Rows, evicting what nobody holds; None while too few can be had, and are kept from new leases for it."""
        needed = self._pool.rows_for(rank)
        pinned = sum(self._pool.rows_for(entry.rank) for entry in self.entries.values() if entry.stays)
        if needed > self._pool.num_rows - pinned:
            row_bytes = self._pool.row_bytes
            also = f", {pinned * row_bytes} of them are pinned" if pinned else ""
            raise AdapterTooLarge(
                f"adapter {digest} of rank {rank} needs {needed * row_bytes} bytes; "
                f"{self._pool.num_rows * row_bytes} are set aside for adapters (--adapter-memory){also}"
            )
        idle = [d for d, e in self.entries.items() if not (e.leases or e.is_claimed or e.stays)]
        reclaimable = sum(self._pool.rows_for(self.entries[name].rank) for name in idle)
        if self._pool.num_free_rows + reclaimable < needed:
            self._bar(needed - self._pool.num_free_rows)
            return None
        for name in idle:
            if self._pool.num_free_rows >= needed:
                break
            self.remove(name)
            self.num_evictions += 1
        return self._pool.allocate(rank)

    def _bar(self, num_rows: int) -> None:
        """Give no new leases on the least recently used adapters that have so many rows together."""
        for digest, entry in self.entries.items():
            if num_rows <= 0:
                break
            if not (entry.is_claimed or entry.stays):
                self.barred.add(digest)
                num_rows -= self._pool.rows_for(entry.rank)

    def check_room_beside(self, digest: str, other_ranks: Iterable[int]) -> None:
        """Before it is never evicted any more: raises PinRefused unless that leaves rows for another as large as the
        largest here or of `other_ranks`."""
        entry = self.entries[digest]
        ranks = [*other_ranks, *(e.rank for e in self.entries.values())]
        largest = max(self._pool.rows_for(rank) for rank in ranks)
        others = sum(self._pool.rows_for(e.rank) for e in self.entries.values() if e.stays and e is not entry)
        left = self._pool.num_rows - others - self._pool.rows_for(entry.rank)
        if left < largest:
            raise PinRefused(
                f"adapter {digest} cannot be kept in memory: {left * self._pool.row_bytes} bytes would be left for "
                f"others, the largest takes {largest * self._pool.row_bytes}; unpin another or raise --adapter-memory"
            )
