"""The Prometheus page of a live server: what is on it, and that it counts what happened."""

import urllib.request

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.integration.conftest import World
from tests.support.client import Client, generation
from tests.support.server_process import ServerProcess
from tests.support.waiting import eventually

NAMES = {
    "time_to_first_token_seconds": "histogram",
    "time_per_output_token_seconds": "histogram",
    "request_duration_seconds": "histogram",
    "request_queue_seconds": "histogram",
    "requests": "counter",
    "rejected": "counter",
    "prompt_tokens": "counter",
    "generation_tokens": "counter",
    "requests_running": "gauge",
    "requests_waiting": "gauge",
    "kv_cache_usage_ratio": "gauge",
    "adapters_loaded": "gauge",
    "adapter_loaded": "gauge",
    "adapter_slots": "gauge",
    "adapter_loads": "counter",
    "adapter_load_seconds": "histogram",
    "adapter_cache_hits": "counter",
    "adapter_cache_misses": "counter",
    "store_up": "gauge",
    "adapter_load_failures": "counter",
    "adapter_evictions": "counter",
    "memory_bytes": "gauge",
    "build_info": "gauge",
    "draining": "gauge",
    "log_lines_dropped": "counter",
}


def page(server: ServerProcess) -> dict[str, Metric]:
    url = f"http://127.0.0.1:{server.metrics_port}/metrics"
    with urllib.request.urlopen(url, timeout=60) as response:
        return {family.name: family for family in text_string_to_metric_families(response.read().decode())}


def value(server: ServerProcess, sample_name: str, **labels: str) -> float:
    """The sum of the samples of this name that have these labels."""
    samples = [sample for family in page(server).values() for sample in family.samples if sample.name == sample_name]
    return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())


def test_the_page_has_the_names_and_kinds(client: Client, server: ServerProcess) -> None:
    client.generate(generation([5, 6], "rank-4", 4))
    families = page(server)
    for name, kind in NAMES.items():
        assert families[f"lorikeet_{name}"].type == kind, name
    kinds = {sample.labels["kind"]: sample.value for sample in families["lorikeet_memory_bytes"].samples}
    assert kinds["weights"] > 0
    assert kinds["kv"] == 32 << 20
    assert 0 < kinds["adapters"] <= 16 << 20


def test_tokens_and_calls_are_counted_by_adapter(client: Client, server: ServerProcess) -> None:
    def counts(adapter: str) -> tuple[float, ...]:
        return (
            value(server, "lorikeet_prompt_tokens_total", adapter=adapter),
            value(server, "lorikeet_generation_tokens_total", adapter=adapter),
            value(server, "lorikeet_time_to_first_token_seconds_count", adapter=adapter),
            value(server, "lorikeet_requests_total", adapter=adapter, code="OK", method="StreamGenerate"),
        )

    for label, adapter in (("base", ""), ("rank-8", "rank-8")):
        before = counts(label)
        for _ in range(3):
            client.stream(generation([5, 6, 7, 8, 9], adapter, 11))
        expected = tuple(a + b for a, b in zip(before, (15, 33, 3, 3), strict=True))
        eventually(lambda label=label, expected=expected: counts(label) == expected, f"{label} counts {expected}")


def test_a_stranger_s_adapter_name_never_becomes_a_label(client: Client, server: ServerProcess) -> None:
    client.refused(generation([5], "a-name-nobody-published"))
    url = f"http://127.0.0.1:{server.metrics_port}/metrics"
    with urllib.request.urlopen(url, timeout=60) as response:
        assert b"a-name-nobody-published" not in response.read()


def test_running_requests_and_their_pages_are_shown(client: Client, server: ServerProcess, world: World) -> None:
    stream = client.open(generation([5] * 1000, "rank-8", 14_000))
    next(stream)
    eventually(lambda: value(server, "lorikeet_requests_running") >= 1, "a stream runs")
    eventually(lambda: 1000 / 65536 <= value(server, "lorikeet_kv_cache_usage_ratio") <= 1, "it holds its pages")
    assert value(server, "lorikeet_adapters_loaded", tier="device") >= 1
    stream.cancel()
    eventually(server.is_idle, "it lets go of them")


@pytest.mark.parametrize("reason", ["REQUEST_INVALID", "ADAPTER_NOT_FOUND"])
def test_refusals_are_counted_by_reason(client: Client, server: ServerProcess, reason: str) -> None:
    before = value(server, "lorikeet_rejected_total", reason=reason)
    fields = generation([5], temperature=9.0) if reason == "REQUEST_INVALID" else generation([5], "nobody")
    client.refused(fields)
    assert value(server, "lorikeet_rejected_total", reason=reason) == before + 2
