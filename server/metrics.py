"""The metrics of a serving process: their names, labels and buckets, and what is written into them.

Prometheus conventions: prefix `lorikeet_`, seconds and bytes, `_total` for counters. Times are observed once a
request, never once a token. Must import neither torch, grpc nor protobuf.
"""

import os
import threading
from collections.abc import Iterable
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.engine.messages import Ready, Stats
from server.errors import ConfigError
from server.version import lorikeet_version

# OpenTelemetry's buckets for gen_ai.server.time_to_first_token, .time_per_output_token (and three below them, for
# small models) and .request.duration: https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-metrics/
FIRST_TOKEN_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
PER_TOKEN_BUCKETS = (
    *(0.001, 0.0025, 0.005),
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5),
)
DURATION_BUCKETS = tuple(0.01 * 2**i for i in range(14))

BASE_LABEL = "base"
OTHER_LABEL = "_other"


class AdapterLabels:
    """Adapter names as label values: the first `limit` names seen keep theirs, all later ones share `_other`."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._names: set[str] = set()

    def __call__(self, name: str) -> str:
        if not name:
            return BASE_LABEL
        if name in self._names:
            return name
        if len(self._names) < self._limit:
            self._names.add(name)
            return name
        return OTHER_LABEL


class Processes(Collector):
    """Memory and CPU time of the two processes, read from /proc when the page is asked for."""

    def __init__(self) -> None:
        self.pids = {"frontend": os.getpid()}

    def collect(self) -> Iterable[Metric]:
        memory = GaugeMetricFamily(
            "lorikeet_process_resident_memory_bytes", "Resident memory of a process, in bytes.", labels=["process"]
        )
        cpu = CounterMetricFamily(
            "lorikeet_process_cpu_seconds", "CPU time of a process, in seconds.", labels=["process"]
        )
        for process, pid in self.pids.items():
            try:
                resident, seconds = _read_process(pid)
            except (OSError, IndexError, ValueError):  # it ended, or this is no Linux
                continue
            memory.add_metric([process], resident)
            cpu.add_metric([process], seconds)
        return [memory, cpu]


def _read_process(pid: int) -> tuple[float, float]:
    """Resident bytes and CPU seconds of a process (proc(5): statm field 2, stat fields 14 and 15)."""
    proc = Path(f"/proc/{pid}")
    pages = int((proc / "statm").read_text().split()[1])
    fields = (proc / "stat").read_text().rpartition(")")[2].split()  # after the name: from field 3 on
    ticks = int(fields[11]) + int(fields[12])
    return pages * float(os.sysconf("SC_PAGE_SIZE")), ticks / os.sysconf("SC_CLK_TCK")


class EngineCounters:
    """Counters fed from Stats' growing values, which start again at zero with each engine."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str) -> Counter:
            return Counter(f"lorikeet_{name}", text, registry=registry)

        self._counters = {
            "preemptions": counter("preemptions", "Sequences put back to wait because KV pages ran out."),
            "prefix_hit_tokens": counter("prefix_cache_hit_tokens", "Prompt tokens found in the prefix cache."),
            "prefix_query_tokens": counter("prefix_cache_query_tokens", "Prompt tokens sought in the prefix cache."),
            "adapter_loads": counter("adapter_loads", "Adapters loaded into memory."),
            "adapter_load_failures": counter("adapter_load_failures", "Adapters that could not be loaded."),
            "adapter_evictions": counter("adapter_evictions", "Adapters dropped from memory to make room for others."),
        }
        self.engine_changed()

    def engine_changed(self) -> None:
        """The next Stats come from a new engine."""
        self._last = dict.fromkeys(self._counters, 0)

    def update(self, stats: Stats) -> None:
        for name, counter in self._counters.items():
            value = getattr(stats, name)
            value = value.get("device", 0) if isinstance(value, dict) else value
            counter.inc(max(0, value - self._last[name]))
            self._last[name] = value


class Metrics:
    """All metrics of one server.

    `adapter` arguments are adapter names, "" the base; only names of published adapters may be given, as each
    becomes a label value (at most `max_adapters` of them, then `_other`). Not thread-safe but for the page.
    """

    def __init__(self, registry: CollectorRegistry | None = None, *, max_adapters: int = 100) -> None:
        self.registry = registry = registry if registry is not None else CollectorRegistry()
        self._adapter = AdapterLabels(max_adapters)
        self._device = "cpu"
        self._processes = Processes()
        registry.register(self._processes)

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
            *("adapter", "residency"),
        )
        self._per_token = histogram(
            "time_per_output_token_seconds",
            "Seconds per output token after the first: the mean of a request.",
            PER_TOKEN_BUCKETS,
            "adapter",
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
        self._counters = EngineCounters(registry)

        self._running = gauge("requests_running", "Requests in the engine's batch.")
        self._waiting = gauge("requests_waiting", "Requests in the engine's queue.")
        self._kv_usage = gauge("kv_cache_usage_ratio", "KV pages in use, of all: 0 to 1.")
        self._adapters_loaded = gauge("adapters_loaded", "Adapters in memory.", "tier")
        self._adapter_leases = gauge("adapter_leases", "Requests that hold an adapter in memory.")
        self._memory = gauge("memory_bytes", "Memory of the engine's device by use, in bytes.", "kind", "device")
        self._engine_info = gauge("engine_info", "1; what the engine runs on.", "device", "dtype")
        self._draining = gauge("draining", "1 while the server is stopping and takes no new requests.")
        gauge("build_info", "1; the version that runs.", "version").labels(lorikeet_version()).set(1)

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
        self._first_token.labels(self._adapter(adapter), residency).observe(seconds)

    def output_tokens(self, *, adapter: str, count: int, seconds: float) -> None:
        """The `count` tokens after a request's first took `seconds` together."""
        if count > 0:
            self._per_token.labels(self._adapter(adapter)).observe(seconds / count)

    def prompt_tokens(self, *, adapter: str, count: int, cached: int) -> None:
        """A prompt of `count` tokens ran, `cached` of them from the prefix cache."""
        label = self._adapter(adapter)
        self._prompt_tokens.labels(label).inc(count)
        self._cached_tokens.labels(label).inc(cached)

    def generation_tokens(self, *, adapter: str, count: int) -> None:
        self._generation_tokens.labels(self._adapter(adapter)).inc(count)

    def engine_started(self, ready: Ready, pid: int | None = None) -> None:
        """An engine is ready; its `pid`, if given, adds it to the process metrics."""
        self._device = "gpu" if ready.device.startswith("cuda") else "cpu"
        self._engine_info.clear()
        self._engine_info.labels(ready.device, ready.dtype).set(1)
        if pid is not None:
            self._processes.pids["engine"] = pid
        self._forget_engine()

    def engine_restarted(self) -> None:
        """The engine was lost and another is being started."""
        self._engine_restarts.inc()
        self._forget_engine()

    def engine_stats(self, stats: Stats) -> None:
        self._running.set(stats.num_running)
        self._waiting.set(stats.num_waiting)
        self._kv_usage.set(stats.pages_used / stats.pages_total if stats.pages_total else 0.0)
        for tier in ("host", "device"):
            self._adapters_loaded.labels(tier).set(sum(a.tier == tier for a in stats.adapters))
        self._adapter_leases.set(sum(a.leases for a in stats.adapters))
        for kind, size in stats.memory.items():
            self._memory.labels(kind, self._device).set(size)
        self._counters.update(stats)

    def _forget_engine(self) -> None:
        """What the last engine held is gone, and the next one counts from zero."""
        self._counters.engine_changed()
        for gauge in (self._running, self._waiting, self._kv_usage, self._adapter_leases):
            gauge.set(0)
        self._adapters_loaded.clear()
        self._memory.clear()


class MetricsPage:
    """The metrics over HTTP, on a port of their own, from a thread of their own."""

    def __init__(self, metrics: Metrics, host: str, port: int) -> None:
        """Raises ConfigError when the port cannot be had; port 0 takes any free one."""
        try:
            self._server, _ = start_http_server(port, host, metrics.registry)
        except OSError as error:
            reason = error.strerror or str(error)
            raise ConfigError(f"metrics_port: cannot listen on {host} port {port}: {reason}") from error

    @property
    def port(self) -> int:
        return int(self._server.server_port)

    def close(self) -> None:
        """Returns at once; the port is free within half a second, or when the process ends."""
        threading.Thread(target=self._close, daemon=True).start()

    def _close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
