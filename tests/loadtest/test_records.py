"""Times of one request, and what many say together."""

import statistics
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.live import quantile
from loadtest.errors import LoadTestFailed
from loadtest.records import Record, Run, quantiles, summarize, summary
from loadtest.scenario import Fixed, Scenario


def test_a_request_s_times() -> None:
    record = Record("a", due=10.0, arrivals=[(10.5, 1), (10.6, 2), (11.0, 1)], ended=11.5)
    assert record.first_token_seconds == 0.5
    assert record.per_token_seconds == pytest.approx(0.5 / 3)
    assert record.seconds == 1.5
    assert record.tokens_per_second == pytest.approx(4 / 1.5)


def test_a_request_without_tokens_has_no_time_of_them() -> None:
    refused = Record("a", due=1.0, ended=1.25, code="RESOURCE_EXHAUSTED", reason="SERVER_BUSY")
    assert (refused.first_token_seconds, refused.per_token_seconds) == (None, None)
    assert Record("a", due=1.0, arrivals=[(2.0, 5)], ended=2.0).per_token_seconds is None


def test_throughput_is_of_the_window_and_latencies_of_what_ended_after_its_begin() -> None:
    records = [
        Record("a", 0.0, [(0.5, 1), (0.9, 1)], 0.9),  # before
        Record("a", 0.5, [(0.9, 1), (1.5, 3)], 1.5),  # half of it
        Record("", 1.0, [(1.5, 1), (1.8, 1)], 2.0),
        Record("a", 1.5, [(2.5, 1), (3.5, 9)], 3.5),  # still runs at the end
        Record("b", 1.0, [], 1.5, "RESOURCE_EXHAUSTED", "SERVER_BUSY"),
        Record("b", 2.0, [], 2.5, "RESOURCE_EXHAUSTED", "SERVER_BUSY", retry_after=4.0),
        Record("b", 2.0, [], 2.75, "UNAVAILABLE"),
    ]
    found = summarize(records, 1.0, 3.0)
    assert found["requests"] == 3
    assert found["requests_per_second"] == 1.0
    assert found["output_tokens_per_second"] == (3 + 2 + 1) / 2
    assert found["failures"] == {"RESOURCE_EXHAUSTED SERVER_BUSY": 2, "UNAVAILABLE": 1}
    failed: Any = found["failed_seconds"]
    assert {name: times["p99"] for name, times in failed.items()} == {
        "RESOURCE_EXHAUSTED SERVER_BUSY": 0.5,
        "UNAVAILABLE": 0.75,
    }, "one kind's times say nothing of another's"
    assert found["retry_seconds"]["p50"] == 4.0  # type: ignore[index]
    assert found["without_retry"] == 2
    adapters = found["adapters"]
    assert isinstance(adapters, dict)
    assert {name: kind["requests"] for name, kind in adapters.items()} == {"a": 2, "base": 1}
    assert adapters["base"]["ttft_seconds"]["p99"] == 0.5


def test_a_window_that_is_none_is_no_result() -> None:
    played = Scenario(name="a test", prompt=Fixed(5), output=Fixed(7), seconds=3, warmup=1.0)
    early, late = (Run("", 1, begin, begin + 3.0, [], []) for begin in (10.0, 12.5))
    assert summary([early], played)["seconds"] == 2.0
    with pytest.raises(LoadTestFailed, match="after the warm-up"):
        summary([early, late], played)


@given(st.lists(st.integers(0, 100), min_size=1, max_size=220))
def test_quantiles_are_the_least_values_that_so_many_are_not_above(values: list[int]) -> None:
    found = quantiles(values)
    for percent in (50, 90, 95, 99):
        least = found[f"p{percent}"]
        assert least in values
        assert 100 * sum(value <= least for value in values) >= percent * len(values)
        assert 100 * sum(value < least for value in values) < percent * len(values)
        assert quantile(values, percent / 100) == least, "as the benchmarks have it"
    assert found["mean"] == pytest.approx(statistics.fmean(values), abs=1e-6)


def test_the_extremes_are_the_least_and_the_most() -> None:
    assert (quantile([3.0, 1.0, 2.0], 0.0), quantile([3.0, 1.0, 2.0], 1.0)) == (1.0, 3.0)


def test_quantiles_of_nothing_are_nothing() -> None:
    assert quantiles([]) == {}
