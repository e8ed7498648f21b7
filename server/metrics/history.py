"""The last minutes of the server, for its status page."""

import itertools
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

INTERVAL = 2.0
MINUTES = 10


@dataclass(frozen=True, slots=True)
class Moment:
    """`at` is seconds of a monotonic clock, `generated` counts tokens since the start."""

    at: float
    running: int
    waiting: int
    generated: int


class History:
    """One moment each INTERVAL seconds, the last MINUTES of them, taken by a thread of its own."""

    def __init__(self, look: Callable[[], Moment]) -> None:
        self._look = look
        self._moments: deque[Moment] = deque((look(),), maxlen=int(MINUTES * 60 / INTERVAL))
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="status-history", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Returns at once."""
        self._stopping.set()

    def take(self) -> None:
        """Add the moment that is now."""
        self._moments.append(self._look())

    def moments(self) -> list[Moment]:
        """The first to the last, and now."""
        return [*self._moments.copy(), self._look()]

    def _follow(self) -> None:
        while not self._stopping.wait(INTERVAL):
            self.take()


def rates(moments: list[Moment]) -> list[tuple[float, float]]:
    """(seconds before the last, tokens a second since the moment before) of each but the first."""
    pairs = itertools.pairwise(moments)
    return [
        (after.at - moments[-1].at, (after.generated - before.generated) / (after.at - before.at))
        for before, after in pairs
        if after.at - before.at > INTERVAL / 4
    ]
