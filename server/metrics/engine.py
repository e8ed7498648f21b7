"""What the engine's snapshots become: counters that outlive engines, and gauges of the moment."""

import time
from collections import Counter as Count
from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from adapters.errors import AdapterTooLarge, BaseMismatch, InvalidAdapter, StoreUnavailable, UnsupportedAdapter
from server.engine.messages import Ready, Serving, Stats
from server.errors import CanaryFailed
from server.metrics.labels import OTHER_LABEL, AdapterLabels

TIERS = ("host", "device")
LOAD_FAILURES = (InvalidAdapter, UnsupportedAdapter, BaseMismatch, CanaryFailed, AdapterTooLarge, StoreUnavailable)
ADAPTER_LABELS = ("adapter", "tier", "pinned")

LOAD_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

# The names in one label of `vllm:lora_requests_info`, at most.
MAX_ROUTER_NAMES = 256


class EngineCounters:
    """Counters fed from Stats' growing values, which start again at zero with each engine."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"lorikeet_{name}", text, labels, registry=registry)

        self._counters = {
            "preemptions": counter("preemptions", "Sequences put back to wait because KV pages ran out."),
            "prefix_hit_tokens": counter("prefix_cache_hit_tokens", "Prompt tokens found in the prefix cache."),
            "prefix_query_tokens": counter("prefix_cache_query_tokens", "Prompt tokens sought in the prefix cache."),
            "merges": counter("merges", "Times an adapter was merged into the base's weights."),
            "unmerges": counter("unmerges", "Times the base was given its own weights back."),
        }
        by_tier = {
            "adapter_loads": counter("adapter_loads", "Adapters loaded into a tier of memory.", "tier"),
            "adapter_evictions": counter(
                "adapter_evictions", "Adapters dropped from a tier of memory to make room for others.", "tier"
            ),
            "adapter_hits": counter(
                "adapter_cache_hits", "Requests whose adapter was in a tier of memory when they came.", "tier"
            ),
            "adapter_misses": counter(
                "adapter_cache_misses", "Requests whose adapter was not in a tier of memory when they came.", "tier"
            ),
        }
        failures = counter("adapter_load_failures", "Adapters that could not be loaded, by the error.", "reason")
        served = counter("served", "Requests that ran, by how their adapter was applied.", "serving")
        self._by_label = {**by_tier, "adapter_load_failures": failures, "served": served}
        # A series that begins with its first event would hide it from rate().
        for tiered in by_tier.values():
            for tier in TIERS:
                tiered.labels(tier)
        for error in LOAD_FAILURES:
            failures.labels(error.reason)
        for serving in Serving:
            served.labels(serving)
        self._load_seconds = Histogram(
            "lorikeet_adapter_load_seconds",
            "Seconds to bring an adapter from one tier to the next: disk to host is read, checked and packed, host to "
            "device copied.",
            ("from", "to"),
            buckets=LOAD_BUCKETS,
            registry=registry,
        )
        self.engine_changed()

    def engine_changed(self) -> None:
        """The next Stats come from a new engine."""
        self._last: dict[tuple[str, str], int] = {}

    def update(self, stats: Stats) -> None:
        for name, counter in self._counters.items():
            self._grow(counter, name, "", getattr(stats, name))
        for name, counter in self._by_label.items():
            for label, value in getattr(stats, name).items():
                self._grow(counter.labels(label), name, label, value)
        for load in stats.adapter_load_times:
            self._load_seconds.labels(load.tier_from, load.tier_to).observe(load.seconds)

    def _grow(self, counter: Counter, name: str, label: str, value: int) -> None:
        counter.inc(max(0, value - self._last.get((name, label), 0)))
        self._last[name, label] = value


class EngineGauges(Collector):
    """The last snapshot; while there is no engine, that nothing runs. Written on the event loop and read by the
    page's thread: each snapshot is made whole and then put in place."""

    def __init__(self, label: AdapterLabels) -> None:
        self._label = label
        self._ready: Ready | None = None
        self.engine_lost()

    def engine_started(self, ready: Ready) -> None:
        self._ready = ready

    def engine_lost(self) -> None:
        self.stats: Stats | None = None
        self._families = self._load(0, 0, 0.0, 0)

    def update(self, stats: Stats, names: Mapping[str, str]) -> None:
        """`names` is digest → the name of a published adapter."""
        self.stats = stats
        kv_usage = stats.pages_used / stats.pages_total if stats.pages_total else 0.0
        leases = sum(adapter.leases for adapter in stats.adapters if adapter.tier == "device")
        self._families = (
            *self._load(stats.num_running, stats.num_waiting, kv_usage, leases),
            *self._tiers(stats),
            self._adapters(stats, names),
            self._slots(stats),
            *self._merged(stats, names),
            self._memory(stats),
            self._waiting(stats, names),
            self._router_info(stats, names),
        )

    def collect(self) -> Iterable[Metric]:
        return self._families

    def _load(self, num_running: int, num_waiting: int, kv_usage: float, leases: int) -> tuple[Metric, ...]:
        return (
            _gauge("requests_running", "Requests in the engine's batch.", value=num_running),
            _gauge("requests_waiting", "Requests in the engine's queue.", value=num_waiting),
            _gauge("kv_cache_usage_ratio", "KV pages in use, of all: 0 to 1.", value=kv_usage),
            _gauge("adapter_leases", "Requests that hold an adapter in memory.", value=leases),
        )

    def _tiers(self, stats: Stats) -> tuple[Metric, ...]:
        loaded = _gauge("adapters_loaded", "Adapters in a tier of memory.", "tier")
        pinned = _gauge("adapters_pinned", "Adapters that are kept in a tier of memory until unpinned.", "tier")
        size = _gauge("adapter_bytes", "Memory that adapters take in a tier, in bytes.", "tier")
        for tier in TIERS:
            there = [adapter for adapter in stats.adapters if adapter.tier == tier]
            loaded.add_metric([tier], len(there))
            pinned.add_metric([tier], sum(adapter.pinned for adapter in there))
            size.add_metric([tier], stats.adapter_bytes.get(tier, 0))
        return loaded, pinned, size

    def _adapters(self, stats: Stats, names: Mapping[str, str]) -> Metric:
        loaded = _gauge(
            "adapter_loaded", "Versions of an adapter in a tier of memory, pinned there or not.", *ADAPTER_LABELS
        )
        counts: Count[tuple[str, str, str]] = Count()
        for adapter in stats.adapters:
            pinned = "true" if adapter.pinned else "false"
            counts[self._named(adapter.digest, names), adapter.tier, pinned] += 1
        for labels, count in counts.items():
            loaded.add_metric(labels, count)
        return loaded

    def _slots(self, stats: Stats) -> Metric:
        slots = _gauge(
            "adapter_slots", "Adapters that a tier of memory holds, if all are like those that are there.", "tier"
        )
        num_on_device = sum(adapter.tier == "device" for adapter in stats.adapters)
        slots.add_metric(["device"], self._max_adapters(stats, num_on_device))
        return slots

    def _named(self, digest: str, names: Mapping[str, str]) -> str:
        return self._label(names[digest]) if digest in names else OTHER_LABEL

    def _merged(self, stats: Stats, names: Mapping[str, str]) -> tuple[Metric, ...]:
        merged = _gauge("adapter_merged", "1 for the adapter that is merged into the base's weights.", "adapter")
        for digest in {adapter.digest for adapter in stats.adapters if adapter.merged}:
            merged.add_metric([self._label(names[digest]) if digest in names else OTHER_LABEL], 1)
        held = "The base's own weights in host memory, while an adapter is merged, in bytes."
        return merged, _gauge("merge_held_bytes", held, value=stats.merge_held_bytes)

    def _memory(self, stats: Stats) -> Metric:
        memory = _gauge("memory_bytes", "Memory of the engine's device by use, in bytes.", "kind", "device")
        device = "gpu" if self._ready is not None and self._ready.device.startswith("cuda") else "cpu"
        for kind, size in stats.memory.items():
            memory.add_metric([kind, device], size)
        return memory

    def _waiting(self, stats: Stats, names: Mapping[str, str]) -> Metric:
        waiting = _gauge("adapter_requests_waiting", "Requests in the engine's queue, by their adapter.", "adapter")
        counts: Count[str] = Count()
        for digest, count in stats.waiting_by_adapter.items():
            counts[self._named(digest, names)] += count
        for label, count in counts.items():
            waiting.add_metric([label], count)
        return waiting

    def _router_info(self, stats: Stats, names: Mapping[str, str]) -> Metric:
        """What routers read of a server under vLLM's name for it. They send a request to where its adapter is among
        the running ones, which are here all that are on the device, or else to where there is room for one more."""
        on_device = [adapter for adapter in stats.adapters if adapter.tier == "device"]
        on_device.sort(key=lambda adapter: -adapter.leases)
        info = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Time of the last change, in seconds since 1970; the labels tell which adapters are on the device, which "
            "have requests waiting, and how many of this size the device holds.",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        labels = [
            str(self._max_adapters(stats, len(on_device))),
            _joined((adapter.digest for adapter in on_device), names),
            _joined(stats.waiting_by_adapter, names),
        ]
        info.add_metric(labels, time.time())
        return info

    def _max_adapters(self, stats: Stats, num_on_device: int) -> int:
        """How many adapters the device holds if all are like those that are there; else, as many as can run."""
        used, size = stats.adapter_bytes.get("device", 0), stats.memory.get("adapters", 0)
        if num_on_device and used:
            return max(num_on_device, size * num_on_device // used)
        return 0 if self._ready is None else self._ready.max_num_seqs


def _gauge(name: str, text: str, *labels: str, value: float | None = None) -> GaugeMetricFamily:
    """With labels, or the one value."""
    return GaugeMetricFamily(f"lorikeet_{name}", text, value, labels or None)


def _joined(digests: Iterable[str], names: Mapping[str, str]) -> str:
    """The adapters' names, each once, joined by commas (which no name has)."""
    found = dict.fromkeys(names[digest] for digest in digests if digest in names)
    return ",".join(list(found)[:MAX_ROUTER_NAMES])
