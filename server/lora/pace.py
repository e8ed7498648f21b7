"""How work beside the step loop keeps out of its way."""

import threading
import time
from collections.abc import Callable
from types import TracebackType


class Pace:
    """One piece of work at a time, and while the step loop is busy a core for `share` of the time at most.

    Whoever works holds it as a context and calls `breathe` between pieces of a few milliseconds: a thread that runs
    in the interpreter takes all of it from the step loop, which asks for it back hundreds of times a step and waits
    each time. Low priority does not help there. Where nothing runs, nobody pauses.
    """

    def __init__(
        self,
        share: float = 0.2,
        clock: Callable[[], float] = time.thread_time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        assert 0 < share <= 1, "a share of the time"
        self._pause = 1 / share - 1  # seconds of pause for one of work
        self._clock, self._sleep = clock, sleep
        self._turn = threading.Lock()
        self._since = 0.0
        self.is_busy = False  # the step loop's word

    def __enter__(self) -> "Pace":
        self._turn.acquire()
        self._since = self._clock()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.breathe()
        finally:
            self._turn.release()

    def take_turn(self) -> bool:
        """For the step loop itself: keep everyone else from work until `end_turn`; False where someone is at it."""
        return self._turn.acquire(blocking=False)

    def end_turn(self) -> None:
        self._turn.release()

    def breathe(self) -> None:
        """Between two pieces of work, by the thread that holds the turn."""
        if self.is_busy:
            self._sleep((self._clock() - self._since) * self._pause)
        self._since = self._clock()
