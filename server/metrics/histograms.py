"""What histograms hold, read back: for OpenTelemetry's names, and for people."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from prometheus_client import Histogram
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector


@dataclass(slots=True)
class Counts:
    """`buckets` maps an upper bound, as it is written, to how many values are not above it."""

    buckets: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    total: float = 0.0

    def quantile(self, share: float) -> float | None:
        """As PromQL's histogram_quantile: linear within a bucket, and the last bound for what is above it. None where
        nothing was observed."""
        bounds = sorted((float(bound), count) for bound, count in self.buckets.items())
        if not bounds or not bounds[-1][1]:
            return None
        rank, low, below = share * bounds[-1][1], 0.0, 0.0
        for bound, count in bounds:
            if count >= rank and count > below:
                return low if bound == float("inf") else low + (bound - low) * (rank - below) / (count - below)
            if bound != float("inf"):
                low, below = bound, count
        return low


def counts_by(histogram: Histogram, label: str | None) -> dict[str, Counts]:
    """What was observed, by the values of one label, or all together as ""."""
    found: dict[str, Counts] = defaultdict(Counts)
    for metric in histogram.collect():
        for sample in metric.samples:
            counts = found[sample.labels.get(label, "") if label else ""]
            if sample.name.endswith("_bucket"):
                counts.buckets[sample.labels["le"]] += sample.value
            elif sample.name.endswith("_sum"):
                counts.total += sample.value
    return found


class Aliases(Collector):
    """The same histograms under the names of OpenTelemetry's semantic conventions for generative AI, over all adapters:
    https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-metrics/ (status: development)."""

    def __init__(self, histograms: Mapping[str, Histogram]) -> None:
        self._histograms = histograms

    def collect(self) -> Iterable[Metric]:
        labels = {"gen_ai_operation_name": "text_completion", "gen_ai_provider_name": "lorikeet"}
        for name, histogram in self._histograms.items():
            [metric] = histogram.collect()
            family = HistogramMetricFamily(
                f"gen_ai_server_{name}", f"{metric.documentation} OpenTelemetry's name for it.", labels=list(labels)
            )
            for counts in counts_by(histogram, None).values():
                buckets = sorted(counts.buckets.items(), key=lambda bucket: float(bucket[0]))
                family.add_metric(list(labels.values()), buckets, counts.total)
            yield family
