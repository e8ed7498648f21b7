"""What a profile says of the device's time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.profile import Span, by_kernel, covered

SPANS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)), min_size=1, max_size=12)


@given(SPANS)
def test_time_that_spans_cover(spans: list[tuple[int, int]]) -> None:
    instants = {t for start, length in spans for t in range(start, start + length)}
    assert covered(Span("k", start, start + length) for start, length in spans) == len(instants)


def test_sums_by_kernel() -> None:
    spans = [Span("a", 0, 5), Span("b", 4, 10), Span("a", 20, 22)]
    assert by_kernel(spans) == [("a", pytest.approx(7), 2), ("b", pytest.approx(6), 1)]
