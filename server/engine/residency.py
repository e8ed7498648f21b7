"""What the scheduler asks of the adapters' memory, and the adapters that waiting sequences still lack."""

from typing import Protocol

from server.engine.fairness import FairQueue
from server.engine.messages import AdapterRef
from server.engine.sequence import Sequence


class AdapterResidency(Protocol):
    """Which adapters' weights are in memory. A leased one is not evicted, nor is one that came because it was
    requested, before it is leased or forgotten. No method waits for a load."""

    def request(self, adapter: AdapterRef) -> None:
        """A sequence waits for it: start loading if not resident. Idempotent."""

    def forget(self, digest: str) -> None:
        """No sequence waits for it any more. Idempotent."""

    def is_available(self, digest: str) -> bool:
        """Whether `acquire` would take a lease now."""

    def acquire(self, digest: str) -> bool:
        """Take a lease if resident and not kept for others."""

    def release(self, digest: str) -> None:
        """Give one lease back."""


class MissingAdapters:
    """Adapters that are not resident though sequences wait for them; each is parked in the queue until it is."""

    def __init__(self, adapters: AdapterResidency, waiting: FairQueue) -> None:
        self._adapters = adapters
        self._waiting = waiting
        self._since: dict[str, float] = {}  # digest → missing since, in the scheduler's time
        self._arrived: set[str] = set()  # came for sequences of which none has run yet

    def notice(self, seq: Sequence, now: float) -> None:
        """A sequence was queued: see to its adapter."""
        if seq.adapter is None or seq.digest in self._since:
            return
        if not self._adapters.is_available(seq.digest):
            self.add(seq.adapter, now)

    def add(self, adapter: AdapterRef, now: float) -> None:
        """An adapter is not resident (any more)."""
        self._adapters.request(adapter)
        self._since[adapter.digest] = now
        self._arrived.discard(adapter.digest)
        self._waiting.park(adapter.digest)

    def refresh(self, now: float) -> None:
        """Let those that became resident take turns; ask again for the rest, which may have come and gone unseen."""
        for digest in [digest for digest in (*self._since, *self._arrived) if not self._waiting.waiting(digest)]:
            self.forget(digest)
            self._adapters.forget(digest)
        for digest, since in list(self._since.items()):
            waiting = self._waiting.waiting(digest)
            if not self._adapters.is_available(digest):
                assert waiting[0].adapter is not None, "the base is always resident"
                self._adapters.request(waiting[0].adapter)
                continue
            del self._since[digest]
            self._arrived.add(digest)
            self._waiting.unpark(digest)
            for seq in waiting:
                if seq.scheduled_at is None:  # what follows preemption is no part of the queue's time
                    seq.load_seconds += now - max(since, seq.submitted_at)

    def forget(self, digest: str) -> None:
        self._since.pop(digest, None)
        self._arrived.discard(digest)
