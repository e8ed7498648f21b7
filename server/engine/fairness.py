"""The waiting sequences, and whose turn it is: fair shares of tokens across adapters, first come first served in each.

The Virtual Token Counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024, arXiv 2401.00588).
Each adapter (the base is one, digest "") has a counter of the service it got, in weighted tokens; the waiting adapter
with the smallest counter goes next. An adapter that becomes active is lifted to the smallest counter among the
waiting ones, so that idleness earns no credit. One whose weights are being loaded is *parked*: it neither goes nor
holds the others' level down, and counts as becoming active when it is unparked.
"""

import heapq
from collections import deque
from collections.abc import Iterator

from server.engine.sequence import Sequence

INPUT_WEIGHT = 1.0  # a computed prompt token; the paper's weights, after what a prefilled and a decoded token cost
OUTPUT_WEIGHT = 2.0
_MAX_IDLE_COUNTERS = 1024


class FairQueue:
    """Waiting sequences by adapter, with the counters that order the adapters."""

    def __init__(self) -> None:
        self._queues: dict[str, deque[Sequence]] = {}  # never an empty queue
        self._parked: set[str] = set()
        self._counters: dict[str, float] = {}
        self._floor = 0.0  # what an adapter without a counter has
        self._last_left = ""
        self._len = 0

    def __len__(self) -> int:
        return self._len

    def __iter__(self) -> Iterator[Sequence]:
        for queue in self._queues.values():
            yield from queue

    def counter(self, digest: str) -> float:
        return self._counters.get(digest, self._floor)

    def waiting(self, digest: str) -> tuple[Sequence, ...]:
        """An adapter's waiting sequences, the next one first."""
        return tuple(self._queues.get(digest, ()))

    def push(self, seq: Sequence) -> None:
        """A new sequence, at the end of its adapter's queue."""
        if seq.digest not in self._queues:
            self._lift(seq.digest)
            self._queues[seq.digest] = deque()
        self._queues[seq.digest].append(seq)
        self._len += 1

    def requeue(self, seq: Sequence) -> None:
        """A preempted sequence, to the front of its adapter's queue. It was active all along: no lift."""
        self._queues.setdefault(seq.digest, deque()).appendleft(seq)
        self._len += 1

    def remove(self, seq: Sequence) -> None:
        """Take a sequence out, because it is admitted or will never be."""
        queue = self._queues[seq.digest]
        if queue[0] is seq:
            queue.popleft()
        else:
            queue.remove(seq)
        self._len -= 1
        if not queue:
            del self._queues[seq.digest]
            self._parked.discard(seq.digest)
            self._last_left = seq.digest

    def park(self, digest: str) -> None:
        """Pass over an adapter until its weights are there."""
        self._parked.add(digest)

    def unpark(self, digest: str) -> None:
        if digest in self._parked:
            self._lift(digest)
            self._parked.discard(digest)

    def charge(self, digest: str, tokens: float) -> None:
        """Count weighted tokens of service to an adapter."""
        self._counters[digest] = self._counters.get(digest, self._floor) + tokens

    def turns(self) -> Iterator[Sequence]:
        """The sequences in the order they should be admitted. The consumer may remove and charge the one just
        yielded; one that it leaves in the queue ends its adapter's turns."""
        heap = [self._turn(digest) for digest in self._queues if digest not in self._parked]
        heapq.heapify(heap)
        while heap:
            digest = heap[0][2]
            head = self._queues[digest][0]
            yield head
            queue = self._queues.get(digest)
            if queue and queue[0] is not head:
                heapq.heapreplace(heap, self._turn(digest))
            else:
                heapq.heappop(heap)

    def _turn(self, digest: str) -> tuple[float, float, str]:
        return self.counter(digest), self._queues[digest][0].submitted_at, digest

    def _lift(self, digest: str) -> None:
        levels = [self.counter(other) for other in self._queues if other != digest and other not in self._parked]
        level = min(levels) if levels else self.counter(self._last_left)
        self._counters[digest] = max(self.counter(digest), level)
        if len(self._counters) > len(self._queues) + _MAX_IDLE_COUNTERS:
            self._forget_idle(level)

    def _forget_idle(self, level: float) -> None:
        """Drop the counters that becoming active would lift to `level` anyway."""
        self._floor = max(self._floor, level)
        self._counters = {d: c for d, c in self._counters.items() if d in self._queues or c > self._floor}

    def check_integrity(self) -> None:
        assert self._len == sum(map(len, self._queues.values())), "the queue's length is wrong"
        assert all(self._queues.values()), "an adapter without sequences is still queued"
        assert self._parked <= self._queues.keys(), "an adapter without sequences is parked"
        for digest, queue in self._queues.items():
            assert all(seq.digest == digest for seq in queue), f"a sequence waits under the wrong adapter {digest}"
