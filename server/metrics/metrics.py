"""What is counted and timed, one method for each thing that happens."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from server.engine.messages import Ready, Stats
from server.metrics.engine import EngineCounters, EngineGauges
from server.metrics.gpus import Driver, Gpus, NvidiaDriver, gpu_of
from server.metrics.histograms import Aliases, counts_by
from server.metrics.history import Moment
from server.metrics.labels import AdapterLabels
from server.metrics.processes import Processes
from server.version import lorikeet_version

# OpenTelemetry's buckets for gen_ai.server.time_to_first_token, .time_per_output_token (and three below them, for
# small models) and .request.duration: https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-metrics/
FIRST_TOKEN_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
PER_TOKEN_BUCKETS = (
    *(0.001, 0.0025, 0.005),
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5),
)
DURATION_BUCKETS = tuple(0.01 * 2**i for i in range(14))

NOT_QUANTIZED = "none"


@dataclass(frozen=True, slots=True)
class Traffic:
    """Of one adapter since the start: requests that had a first token, tokens generated, seconds to the first token
    (median, 95th percentile) and for each after it (median); None where nothing was measured."""

    requests: int
    generated: int
    first_token: tuple[float | None, float | None]
    per_token: float | None


class Metrics:
    """All metrics of one server.

    `adapter` arguments are adapter names, "" the base; only names of published adapters may be given, as each
    becomes a label value (at most `max_adapters` of them, then `_other`). Not thread-safe but for the page.
    """

    def __init__(
        self,
        registry: CollectorRegistry | None = None,
        *,
        max_adapters: int = 100,
        driver: Driver | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.registry = registry = registry if registry is not None else CollectorRegistry()
        self._clock = clock
        self._adapter = AdapterLabels(max_adapters)
        self._quantization = NOT_QUANTIZED
        self._num_generated = 0
        self._generated_by: dict[str, Counter] = {}
        self._processes = Processes()
        self._counters = EngineCounters(registry)
        self._gauges = EngineGauges(self._adapter)
        self._gpus = Gpus(driver or NvidiaDriver())
        registry.register(self._processes)
        registry.register(self._gauges)
        registry.register(self._gpus)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"lorikeet_{name}", text, labels, registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"lorikeet_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"lorikeet_{name}", text, labels, buckets=buckets, registry=registry)

        self._first_token = histogram(
            "time_to_first_token_seconds",
            "Seconds from a request's arrival to its first token, by where its adapter was on arrival.",
            FIRST_TOKEN_BUCKETS,
            *("adapter", "residency", "quantization"),
        )
        self._per_token = histogram(
            "time_per_output_token_seconds",
            "Seconds per output token after the first: the mean of a request.",
            PER_TOKEN_BUCKETS,
            *("adapter", "quantization"),
        )
        self._duration = histogram(
            "request_duration_seconds", "Seconds from a call's arrival to its end.", DURATION_BUCKETS, "method", "code"
        )
        self._queue = histogram(
            "request_queue_seconds", "Seconds a request waited before it ran.", DURATION_BUCKETS, "method", "code"
        )
        self._requests = counter("requests", "Calls that ended, by gRPC status code.", "method", "code", "adapter")
        self._rejected = counter("rejected", "Calls refused before they did anything, by error reason.", "reason")
        self._prompt_tokens = counter("prompt_tokens", "Tokens of prompts.", "adapter")
        self._cached_tokens = counter(
            "prompt_cached_tokens", "Tokens of prompts that came from the prefix cache.", "adapter"
        )
        self._generation_tokens = counter("generation_tokens", "Tokens generated.", "adapter")
        self._engine_restarts = counter("engine_restarts", "Times the engine process was started again.")

        self._engine_info = gauge("engine_info", "1; what the engine runs on.", "device", "dtype", "quantization")
        self._draining = gauge("draining", "1 while the server is stopping and takes no new requests.")
        self._store_up = gauge("store_up", "1 if the store could be read when it was last asked, else 0.")
        self._store_up.set(1)
        gauge("build_info", "1; the version that runs.", "version").labels(lorikeet_version()).set(1)
        aliases = {
            "time_to_first_token_seconds": self._first_token,
            "time_per_output_token_seconds": self._per_token,
            "request_duration_seconds": self._duration,
        }
        registry.register(Aliases(aliases))

    # From the RPC layer

    def request_done(
        self, *, method: str, code: str, adapter: str, seconds: float, queue_seconds: float | None
    ) -> None:
        """A call ended after `seconds` with the canonical status `code`; `queue_seconds` None if it never ran."""
        self._requests.labels(method, code, self._adapter(adapter)).inc()
        self._duration.labels(method, code).observe(seconds)
        if queue_seconds is not None:
            self._queue.labels(method, code).observe(queue_seconds)

    def request_without_adapter(self, *, method: str, code: str, seconds: float) -> None:
        """A call ended that is about no adapter, or whose adapter is not known to exist, so that its name may be
        anything. Its label is empty, which Prometheus takes for none."""
        self._requests.labels(method, code, "").inc()
        self._duration.labels(method, code).observe(seconds)

    def rejected(self, reason: str) -> None:
        """A call was refused; `reason` is the error's."""
        self._rejected.labels(reason).inc()

    def draining(self, value: bool) -> None:
        self._draining.set(value)

    # From the front end

    def first_token(self, *, adapter: str, residency: str, seconds: float) -> None:
        """`residency` ("device", "host", "disk") is where the adapter was when the request came."""
        self._first_token.labels(self._adapter(adapter), residency, self._quantization).observe(seconds)

    def output_tokens(self, *, adapter: str, count: int, seconds: float) -> None:
        """The `count` tokens after a request's first took `seconds` together."""
        if count > 0:
            self._per_token.labels(self._adapter(adapter), self._quantization).observe(seconds / count)

    def prompt_tokens(self, *, adapter: str, count: int, cached: int) -> None:
        """A prompt of `count` tokens ran, `cached` of them from the prefix cache."""
        label = self._adapter(adapter)
        self._prompt_tokens.labels(label).inc(count)
        self._cached_tokens.labels(label).inc(cached)

    def generation_tokens(self, *, adapter: str, count: int) -> None:
        """`count` more tokens. Called for each delta of each stream, and so the one that remembers its series."""
        label = self._adapter(adapter)
        series = self._generated_by.get(label)
        if series is None:
            series = self._generated_by[label] = self._generation_tokens.labels(label)
        series.inc(count)
        self._num_generated += count

    def engine_started(self, ready: Ready, pid: int | None = None) -> None:
        """An engine is ready; its `pid`, if given, adds it to the process metrics."""
        self._gauges.engine_started(ready)
        self._quantization = ready.quantization or NOT_QUANTIZED
        self._gpus.engine_gpu = gpu_of(ready.device)
        self._engine_info.clear()
        self._engine_info.labels(ready.device, ready.dtype, self._quantization).set(1)
        if pid is not None:
            self._processes.pids["engine"] = pid
        self._forget_engine()

    def engine_restarted(self) -> None:
        """The engine was lost and another is being started."""
        self._engine_restarts.inc()
        self._forget_engine()

    def engine_stats(self, stats: Stats, names: Mapping[str, str]) -> None:
        """A snapshot of the engine; `names` has the names of the adapters in it, by digest."""
        self._counters.update(stats)
        self._gauges.update(stats, names)
        self._gpus.engine_memory = stats.memory

    def store_up(self, value: bool) -> None:
        """Whether the store could be read just now."""
        self._store_up.set(value)

    # For the status page

    def moment(self) -> Moment:
        """What the server does now. Any thread may ask."""
        stats = self._gauges.stats
        running, waiting = (0, 0) if stats is None else (stats.num_running, stats.num_waiting)
        return Moment(self._clock(), running, waiting, self._num_generated)

    @property
    def stats(self) -> Stats | None:
        """The engine's last snapshot; None while there is none."""
        return self._gauges.stats

    def traffic(self) -> dict[str, Traffic]:
        """By adapter label, since the start. Any thread may ask."""
        first, per_token = counts_by(self._first_token, "adapter"), counts_by(self._per_token, "adapter")
        generated = _by_adapter(self._generation_tokens)
        return {
            label: Traffic(
                requests=int(counts.buckets.get("+Inf", 0)),
                generated=int(generated.get(label, 0)),
                first_token=(counts.quantile(0.5), counts.quantile(0.95)),
                per_token=per_token[label].quantile(0.5) if label in per_token else None,
            )
            for label, counts in first.items()
        }

    def label_of(self, adapter: str) -> str:
        """The label of an adapter's series; it is not given one by asking."""
        return self._adapter.known(adapter)

    def _forget_engine(self) -> None:
        """What the last engine held is gone, and the next one counts from zero."""
        self._counters.engine_changed()
        self._gauges.engine_lost()
        self._gpus.engine_memory = {}


def _by_adapter(counter: Counter) -> dict[str, float]:
    samples = (sample for metric in counter.collect() for sample in metric.samples)
    return {sample.labels["adapter"]: sample.value for sample in samples if sample.name.endswith("_total")}
