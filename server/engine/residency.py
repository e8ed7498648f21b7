"""What the scheduler asks of the adapters' memory, and the adapters that waiting sequences still lack."""

from typing import Protocol

from server.engine.fairness import FairQueue
from server.engine.messages import AdapterRef
from server.engine.sequence import Sequence


class AdapterResidency(Protocol):
    """Which adapters' weights are in memory. A leased one is not evicted. No method waits for a load."""

    def request(self, adapter: AdapterRef) -> None:
        """Start loading if not resident; idempotent."""

    def acquire(self, digest: str) -> bool:
        """Take a lease if resident."""

    def release(self, digest: str) -> None:
        """Give one lease back."""


class MissingAdapters:
    """Adapters that are not resident though sequences wait for them; each is parked in the queue until it is."""

    def __init__(self, adapters: AdapterResidency, waiting: FairQueue) -> None:
        self._adapters = adapters
        self._waiting = waiting
        self._since: dict[str, float] = {}  # digest → missing since, in the scheduler's time

    def notice(self, seq: Sequence) -> None:
        """A sequence was queued: see to its adapter."""
        if seq.adapter is None or seq.digest in self._since:
            return
        if self._adapters.acquire(seq.digest):
            self._adapters.release(seq.digest)
        else:
            self.add(seq.adapter, seq.submitted_at)

    def add(self, adapter: AdapterRef, now: float) -> None:
        """An adapter is not resident (any more)."""
        self._adapters.request(adapter)
        self._since[adapter.digest] = now
        self._waiting.park(adapter.digest)

    def refresh(self, now: float) -> None:
        """Let those that became resident take turns; ask again for the rest, which may have come and gone unseen."""
        for digest, since in list(self._since.items()):
            waiting = self._waiting.waiting(digest)
            if waiting and not self._adapters.acquire(digest):
                assert waiting[0].adapter is not None, "the base is always resident"
                self._adapters.request(waiting[0].adapter)
                continue
            del self._since[digest]
            if waiting:
                self._adapters.release(digest)
                self._waiting.unpark(digest)
            for seq in waiting:
                if seq.scheduled_at is None:  # what follows preemption is no part of the queue's time
                    seq.load_seconds += now - max(since, seq.submitted_at)

    def forget(self, digest: str) -> None:
        self._since.pop(digest, None)
