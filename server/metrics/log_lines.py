"""Lines that the log has lost because nobody read it."""

from collections.abc import Callable, Iterable

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector


class DroppedLogLines(Collector):
    """Asks `count` when the page is asked for; it only grows."""

    def __init__(self, count: Callable[[], int]) -> None:
        self._count = count

    def collect(self) -> Iterable[Metric]:
        text = "Log lines that were dropped because stderr was not read in time."
        yield CounterMetricFamily("lorikeet_log_lines_dropped", text, value=self._count())
