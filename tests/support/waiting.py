"""Waiting for what another process does, with a bound."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def eventually(look: Callable[[], T], what: str, timeout: float = 60.0) -> T:
    """The first truthy value of `look`; fails with `what` and the last value after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not (value := look()):
        assert time.monotonic() < deadline, f"not within {timeout} s: {what} (last {value!r})"
        time.sleep(0.02)
    return value
