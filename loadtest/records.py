"""What was measured of requests, and what many of them say together. Times are seconds of one monotonic clock."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import msgspec

from loadtest.errors import LoadTestFailed
from loadtest.scenario import Scenario

PERCENTILES = (50, 90, 95, 99)


@dataclass(slots=True)
class Record:
    """One request. `due` is when it should have begun: in an open load a late client's lateness counts. `arrivals` are
    (time, tokens) of each message with tokens; `code` is the gRPC status, `reason` the error's, `retry_after` what its
    RetryInfo asks for, in seconds."""

    adapter: str
    due: float
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    ended: float = 0.0
    code: str = "OK"
    reason: str = ""
    retry_after: float | None = None

    @property
    def is_ok(self) -> bool:
        return self.code == "OK"

    @property
    def num_tokens(self) -> int:
        return sum(count for _, count in self.arrivals)

    @property
    def first_token_seconds(self) -> float | None:
        return self.arrivals[0][0] - self.due if self.arrivals else None

    @property
    def per_token_seconds(self) -> float | None:
        """Mean over the tokens after the first message; None without any."""
        if len(self.arrivals) < 2:
            return None
        (began, first), (ended, _) = self.arrivals[0], self.arrivals[-1]
        return (ended - began) / (self.num_tokens - first)

    @property
    def seconds(self) -> float:
        return self.ended - self.due

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds if self.seconds > 0 else 0.0


class Run(msgspec.Struct):
    """What one Locust process measured, on the machine's monotonic clock."""

    mode: str
    users: int
    began: float
    ended: float
    records: list[Record]
    swaps: list[Record]


def summary(runs: Sequence[Run], scenario: Scenario) -> dict[str, object]:
    """Of one load, from the end of the warm-up to the end of the run, by all the processes that made it. Raises
    LoadTestFailed where nothing is in between."""
    begin, end = max(run.began for run in runs) + scenario.warmup, min(run.ended for run in runs)
    if end <= begin:
        raise LoadTestFailed("nothing was measured: no time was left after the warm-up when the first process ended")
    swaps = [swap for run in runs for swap in run.swaps]
    done = [swap.seconds for swap in swaps if swap.is_ok]
    return {
        "scenario": msgspec.to_builtins(scenario),
        "mode": runs[0].mode,
        "users": sum(run.users for run in runs),
        "processes": len(runs),
        **summarize([record for run in runs for record in run.records], begin, end),
        "swaps": {"done": len(done), "failed": len(swaps) - len(done), "seconds": quantiles(done)},
    }


def summarize(records: Iterable[Record], begin: float, end: float) -> dict[str, object]:
    """Throughput is what came between `begin` and `end`, in tokens or requests a second. Latencies, in seconds, are of
    all that ended after `begin`: those still under way at the end too, or long requests would be missing."""
    records = list(records)
    ended = [record for record in records if record.ended >= begin]
    good = [record for record in ended if record.is_ok]
    in_time = sum(record.ended <= end for record in good)
    failed = [record for record in ended if not record.is_ok]
    tokens = sum(count for record in records for when, count in record.arrivals if begin < when <= end)
    by_failure: dict[str, list[float]] = {}
    for record in failed:
        by_failure.setdefault(f"{record.code} {record.reason}".strip(), []).append(record.seconds)
    adapters: dict[str, list[Record]] = {}
    for record in good:
        adapters.setdefault(record.adapter, []).append(record)
    return {
        "seconds": round(end - begin, 3),
        "requests": len(good),
        "requests_per_second": round(in_time / (end - begin), 3),
        "output_tokens_per_second": round(tokens / (end - begin), 2),
        **latencies(good),
        "failures": {name: len(found) for name, found in by_failure.items()},
        "failed_seconds": {name: quantiles(found) for name, found in by_failure.items()},
        "retry_seconds": quantiles([after for record in failed if (after := record.retry_after) is not None]),
        "without_retry": sum(record.retry_after is None for record in failed),
        "adapters": {name or "base": {"requests": len(found), **latencies(found)} for name, found in adapters.items()},
    }


def latencies(records: Sequence[Record]) -> dict[str, object]:
    first = [seconds for record in records if (seconds := record.first_token_seconds) is not None]
    per_token = [seconds for record in records if (seconds := record.per_token_seconds) is not None]
    return {
        "ttft_seconds": quantiles(first),
        "tpot_seconds": quantiles(per_token),
        "end_to_end_seconds": quantiles([record.seconds for record in records]),
    }


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p90, … and mean; empty of nothing. The least value that so many percent are not above: no interpolation."""
    if not values:
        return {}
    ordered = sorted(values)
    found = {f"p{percent}": ordered[-(-percent * len(ordered) // 100) - 1] for percent in PERCENTILES}
    return {name: round(value, 6) for name, value in (found | {"mean": sum(ordered) / len(ordered)}).items()}
