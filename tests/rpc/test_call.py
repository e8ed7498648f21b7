"""How a call that its client ended is told: late, or cancelled."""

import asyncio
from typing import cast

import pytest

from server.metrics import Metrics
from server.rpc.call import Call, Calls, Context
from server.rpc.record import CallRecord


class Ended:
    """A call's context once the client has ended it, with what is left until the deadline that it sent."""

    def __init__(self, remaining: float | None) -> None:
        self._remaining = remaining

    def invocation_metadata(self) -> tuple[()]:
        return ()

    def time_remaining(self) -> float | None:
        return self._remaining

    async def write(self, message: object) -> None:
        raise AssertionError("nobody is there")


class Kept:
    """Keeps the record of each call."""

    def __init__(self) -> None:
        self.records: list[CallRecord] = []

    def ended(self, record: CallRecord) -> None:
        self.records.append(record)


@pytest.mark.parametrize(
    ("elapsed", "remaining", "code"),
    [
        (1.0, 0.0, "DEADLINE_EXCEEDED"),
        (0.2, 0.04, "DEADLINE_EXCEEDED"),
        (3.9, 0.1, "DEADLINE_EXCEEDED"),  # a timeout of 3.9 s, after one of 4: gRPC's core sends that again
        (10.01, 0.09, "DEADLINE_EXCEEDED"),  # of 10.01 s: it sends tenths
        (150.5, 4.5, "DEADLINE_EXCEEDED"),  # of 150.5 s, rounded up to 151 s, after one of 155
        (3.0, 1.0, "CANCELLED"),
        (100.0, 50.0, "CANCELLED"),
        (100.0, None, "CANCELLED"),
    ],
)
def test_a_client_s_deadline_may_be_before_the_one_that_it_sent(
    elapsed: float, remaining: float | None, code: str
) -> None:
    async def scenario() -> str:
        kept, times = Kept(), iter((0.0, elapsed, elapsed, elapsed))
        calls = Calls(Metrics(), (kept,), clock=lambda: next(times))
        with pytest.raises(asyncio.CancelledError):
            async with Call(calls, "service", "Method", cast(Context, Ended(remaining))):
                raise asyncio.CancelledError
        [record] = kept.records
        assert record.seconds == elapsed
        return record.code

    assert asyncio.run(scenario()) == code
