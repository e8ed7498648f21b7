"""The metrics as a scraper reads them: from the text of the page."""

import bisect
import math
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from types import SimpleNamespace

import msgspec
import pynvml
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from server.engine.messages import AdapterLoad, Ready, ResidentAdapter, Stats
from server.errors import ConfigError
from server.metrics import Metrics, MetricsPage
from server.metrics.gpus import GpuMemory, NvidiaDriver
from server.metrics.metrics import FIRST_TOKEN_BUCKETS

READY = Ready(
    device="cpu", dtype="bfloat16", max_model_len=1024, max_num_seqs=8, max_batch_tokens=256, page_size=16, num_pages=64
)

NAMES = {"sha256:1": "pirate", "sha256:2": "json", "sha256:3": "sql", "sha256:4": "pirate"}


def page(metrics: Metrics) -> str:
    return generate_latest(metrics.registry).decode()


def samples(metrics: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """(name, labels) → value of every sample on the page."""
    families = text_string_to_metric_families(page(metrics))
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return samples(metrics)[f"lorikeet_{name}", frozenset(labels.items())]


def labels_of(metrics: Metrics, name: str, label: str) -> set[str]:
    return {dict(labels)[label] for sample, labels in samples(metrics) if sample == f"lorikeet_{name}"}


def stats(**changes: object) -> Stats:
    given = {"num_running": 3, "num_waiting": 2, "pages_used": 16, "pages_total": 64, "adapters": [], "memory": {}}
    return Stats(**{**given, **changes})  # type: ignore[arg-type]


def test_requests_are_counted_and_timed() -> None:
    metrics = Metrics()
    done = {"method": "Generate", "code": "OK"}
    metrics.request_done(**done, adapter="pirate", seconds=0.5, queue_seconds=0.125)
    metrics.request_done(**done, adapter="", seconds=1.5, queue_seconds=None)
    metrics.request_without_adapter(method="Generate", code="NOT_FOUND", seconds=0.01)
    assert value(metrics, "requests_total", **done, adapter="pirate") == 1
    assert value(metrics, "requests_total", **done, adapter="base") == 1
    assert value(metrics, "requests_total", method="Generate", code="NOT_FOUND", adapter="") == 1
    assert value(metrics, "request_duration_seconds_sum", **done) == 2.0
    assert value(metrics, "request_duration_seconds_bucket", **done, le="0.64") == 1
    assert value(metrics, "request_queue_seconds_count", **done) == 1
    assert value(metrics, "request_queue_seconds_sum", **done) == 0.125


def test_tokens_and_their_times() -> None:
    metrics = Metrics()
    metrics.first_token(adapter="pirate", residency="disk", seconds=0.3)
    metrics.output_tokens(adapter="pirate", count=10, seconds=0.5)
    metrics.output_tokens(adapter="pirate", count=0, seconds=0.0)  # a single token has no time between tokens
    metrics.prompt_tokens(adapter="pirate", count=20, cached=16)
    metrics.generation_tokens(adapter="pirate", count=11)
    pirate = {"adapter": "pirate", "quantization": "none"}
    assert value(metrics, "time_to_first_token_seconds_sum", **pirate, residency="disk") == 0.3
    assert value(metrics, "time_per_output_token_seconds_sum", **pirate) == pytest.approx(0.05)
    assert value(metrics, "time_per_output_token_seconds_count", **pirate) == 1
    assert value(metrics, "prompt_tokens_total", adapter="pirate") == 20
    assert value(metrics, "prompt_cached_tokens_total", adapter="pirate") == 16
    assert value(metrics, "generation_tokens_total", adapter="pirate") == 11


def test_adapter_names_past_the_cap_share_a_label() -> None:
    metrics = Metrics(max_adapters=2)
    for name in ("a", "b", "c", "d", "a", ""):
        metrics.generation_tokens(adapter=name, count=1)
    assert labels_of(metrics, "generation_tokens_total", "adapter") == {"a", "b", "_other", "base"}
    assert value(metrics, "generation_tokens_total", adapter="a") == 2
    assert value(metrics, "generation_tokens_total", adapter="_other") == 2
    metrics.first_token(adapter="c", residency="disk", seconds=1.0)  # the cap is one for all metrics
    assert labels_of(metrics, "time_to_first_token_seconds_count", "adapter") == {"_other"}


def test_a_snapshot_of_the_engine_becomes_gauges() -> None:
    metrics = Metrics()
    metrics.engine_started(READY)
    adapters = [
        ResidentAdapter("sha256:1", "device", 100, 2),
        ResidentAdapter("sha256:1", "host", 50, 2),
        ResidentAdapter("sha256:2", "device", 100, 1, True),
        ResidentAdapter("sha256:3", "host", 100, 0),
    ]
    sizes = {"host": 150, "device": 200}
    metrics.engine_stats(stats(adapters=adapters, adapter_bytes=sizes, memory={"weights": 1000, "kv": 500}), NAMES)
    assert value(metrics, "requests_running") == 3
    assert value(metrics, "requests_waiting") == 2
    assert value(metrics, "kv_cache_usage_ratio") == 0.25
    assert value(metrics, "adapters_loaded", tier="device") == 2
    assert value(metrics, "adapters_loaded", tier="host") == 2
    assert value(metrics, "adapters_pinned", tier="device") == 1
    assert value(metrics, "adapter_bytes", tier="device") == 200
    assert value(metrics, "adapter_bytes", tier="host") == 150
    assert value(metrics, "adapter_leases") == 3
    assert value(metrics, "memory_bytes", kind="weights", device="cpu") == 1000
    assert value(metrics, "memory_bytes", kind="kv", device="cpu") == 500
    assert value(metrics, "engine_info", device="cpu", dtype="bfloat16", quantization="none") == 1
    assert value(metrics, "adapter_slots", tier="device") == 2
    in_memory = {"adapter": "pirate", "tier": "device", "pinned": "false"}
    assert value(metrics, "adapter_loaded", **in_memory) == 1
    assert value(metrics, "adapter_loaded", **{**in_memory, "tier": "host"}) == 1
    assert value(metrics, "adapter_loaded", adapter="json", tier="device", pinned="true") == 1
    assert labels_of(metrics, "adapter_loaded", "adapter") == {"pirate", "json", "sql"}


def test_loaded_adapters_keep_to_the_cap_of_labels() -> None:
    metrics = Metrics(max_adapters=1)
    adapters = [ResidentAdapter(f"sha256:{i}", "device", 100, 0) for i in (1, 2, 3, 4)]
    adapters.append(ResidentAdapter("sha256:unheard of", "device", 100, 0))
    metrics.engine_stats(stats(adapters=adapters), NAMES)
    on_device = {"tier": "device", "pinned": "false"}
    assert value(metrics, "adapter_loaded", adapter="pirate", **on_device) == 2  # two versions of one name
    assert value(metrics, "adapter_loaded", adapter="_other", **on_device) == 3


def test_a_4_bit_engine_s_times_are_told_from_a_16_bit_one_s() -> None:
    metrics = Metrics()
    metrics.engine_started(msgspec.structs.replace(READY, quantization="nf4"))
    metrics.first_token(adapter="", residency="device", seconds=0.25)
    metrics.output_tokens(adapter="", count=1, seconds=0.25)
    assert labels_of(metrics, "time_to_first_token_seconds_sum", "quantization") == {"nf4"}
    assert labels_of(metrics, "time_per_output_token_seconds_sum", "quantization") == {"nf4"}


def test_gpus_show_what_the_driver_says_and_what_the_engine_holds() -> None:
    metrics = Metrics(driver=lambda: [GpuMemory("0", 7000, 8000), GpuMemory("1", 100, 8000)])
    metrics.engine_started(msgspec.structs.replace(READY, device="cuda:0"))
    metrics.engine_stats(stats(memory={"weights": 4000, "kv": 1000}), NAMES)
    assert [value(metrics, "gpu_memory_used_bytes", gpu=gpu) for gpu in "01"] == [7000, 100]
    assert value(metrics, "gpu_memory_total_bytes", gpu="1") == 8000
    kinds = {kind: value(metrics, "gpu_memory_bytes", gpu="0", kind=kind) for kind in ("weights", "kv", "other")}
    assert kinds == {"weights": 4000, "kv": 1000, "other": 2000}
    assert labels_of(metrics, "gpu_memory_bytes", "gpu") == {"0"}, "the engine is not on the other"
    metrics.engine_restarted()
    assert labels_of(metrics, "gpu_memory_bytes", "gpu") == set(), "of an engine that is gone"


def test_without_a_driver_there_are_no_series_of_gpus() -> None:
    metrics = Metrics(driver=NvidiaDriver({}))
    metrics.engine_started(msgspec.structs.replace(READY, device="cuda:0"))
    metrics.engine_stats(stats(memory={"weights": 4000}), NAMES)
    assert ("lorikeet_gpu_memory_used_bytes" in page(metrics)) == bool(NvidiaDriver({})())


def test_gpus_are_numbered_as_cuda_does(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {0: 10, 1: 11, 2: 12, "GPU-c": 13}

    def handle(name: int | str) -> int:
        if name not in sizes:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return sizes[name]

    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 3)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", handle)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", handle)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda size: SimpleNamespace(used=size, total=100))

    def used(visible: str | None) -> list[tuple[str, int]]:
        environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
        return [(memory.gpu, memory.used) for memory in NvidiaDriver(environment)()]

    assert used(None) == [("0", 10), ("1", 11), ("2", 12)]
    assert used("2, GPU-c") == [("0", 12), ("1", 13)]
    assert used("1,9,0") == [("0", 11)], "CUDA stops at the first that is not there"
    assert used("") == []


def test_opentelemetry_s_names_have_the_same_numbers_over_all_adapters() -> None:
    metrics = Metrics()
    for adapter, seconds in (("pirate", 0.03), ("json", 0.3), ("", 3.0)):
        metrics.first_token(adapter=adapter, residency="device", seconds=seconds)
    metrics.request_done(method="Generate", code="OK", adapter="", seconds=2.0, queue_seconds=0.0)
    named = frozenset({("gen_ai_operation_name", "text_completion"), ("gen_ai_provider_name", "lorikeet")})
    found = samples(metrics)
    first = "gen_ai_server_time_to_first_token_seconds"
    assert found[f"{first}_count", named] == 3
    assert found[f"{first}_sum", named] == pytest.approx(3.33)
    assert found[f"{first}_bucket", named | {("le", "0.5")}] == 2
    assert found["gen_ai_server_request_duration_seconds_sum", named] == 2.0


@given(st.lists(st.floats(0.0001, 20), min_size=1, max_size=50), st.sampled_from([0.5, 0.95]))
def test_quantiles_from_buckets_are_in_the_bucket_of_the_true_one(values: list[float], share: float) -> None:
    metrics = Metrics()
    for seconds in values:
        metrics.first_token(adapter="a", residency="device", seconds=seconds)
    traffic = metrics.traffic()["a"]
    found = traffic.first_token[0 if share == 0.5 else 1]
    assert found is not None
    assert traffic.requests == len(values)
    true = sorted(values)[math.ceil(share * len(values)) - 1]
    bounds = (0.0, *FIRST_TOKEN_BUCKETS)
    i = bisect.bisect_left(bounds, true)
    low, high = (bounds[i - 1], bounds[i]) if i < len(bounds) else (bounds[-1], bounds[-1])
    assert low <= found <= high + 1e-9


def test_memory_on_a_gpu_is_told_from_memory_on_the_cpu() -> None:
    metrics = Metrics()
    metrics.engine_started(Ready("cuda:0", "bfloat16", 1024, 8, 256, 16, 64))
    metrics.engine_stats(stats(memory={"weights": 1000}), NAMES)
    assert labels_of(metrics, "memory_bytes", "device") == {"gpu"}


def test_counters_go_on_when_the_engine_begins_anew() -> None:
    metrics = Metrics()
    metrics.engine_started(READY)
    loads = {"host": 7, "device": 5}
    metrics.engine_stats(stats(preemptions=2, adapter_loads=loads, prefix_hit_tokens=10, prefix_query_tokens=40), NAMES)
    metrics.engine_stats(stats(preemptions=3, adapter_loads=loads, prefix_hit_tokens=30, prefix_query_tokens=60), NAMES)
    assert value(metrics, "preemptions_total") == 3
    assert value(metrics, "adapter_loads_total", tier="host") == 7
    metrics.engine_restarted()
    assert value(metrics, "requests_running") == 0
    for name, label in (("memory_bytes", "kind"), ("adapters_loaded", "tier"), ("adapter_bytes", "tier")):
        assert labels_of(metrics, name, label) == set(), "of an engine that is gone"
    metrics.engine_started(READY)
    anew = {
        "adapter_loads": {"device": 1},
        "adapter_load_failures": {"ADAPTER_INVALID": 1},
        "adapter_evictions": {"host": 3, "device": 4},
    }
    metrics.engine_stats(stats(preemptions=1, adapter_hits={"device": 2}, adapter_misses={"host": 6}, **anew), NAMES)
    assert value(metrics, "preemptions_total") == 4
    assert value(metrics, "adapter_loads_total", tier="device") == 6
    assert value(metrics, "adapter_loads_total", tier="host") == 7
    assert value(metrics, "adapter_load_failures_total", reason="ADAPTER_INVALID") == 1
    assert value(metrics, "adapter_load_failures_total", reason="ADAPTER_BASE_MISMATCH") == 0, "there before the first"
    assert value(metrics, "adapter_evictions_total", tier="device") == 4
    assert value(metrics, "adapter_evictions_total", tier="host") == 3
    assert value(metrics, "adapter_cache_hits_total", tier="device") == 2
    assert value(metrics, "adapter_cache_hits_total", tier="host") == 0
    assert value(metrics, "adapter_cache_misses_total", tier="host") == 6
    assert value(metrics, "prefix_cache_hit_tokens_total") == 30
    assert value(metrics, "prefix_cache_query_tokens_total") == 60
    assert value(metrics, "engine_restarts_total") == 1


def test_merges_and_the_ways_of_serving_are_counted_over_all_engines() -> None:
    metrics = Metrics()
    metrics.engine_stats(stats(merges=2, unmerges=1, served={"merged": 5, "unmerged": 1}, merge_held_bytes=64), {})
    metrics.engine_restarted()
    merged = [ResidentAdapter("sha256:a", "device", 8, 0, merged=True), ResidentAdapter("sha256:b", "device", 8, 0)]
    names = {"sha256:a": "pirate", "sha256:b": "json"}
    metrics.engine_stats(stats(merges=1, served={"merged": 2}, merge_held_bytes=32, adapters=merged), names)
    assert (value(metrics, "merges_total"), value(metrics, "unmerges_total")) == (3, 1)
    ways = [value(metrics, "served_total", serving=way) for way in ("merged", "unmerged", "compensated")]
    assert ways == [7, 1, 0]
    assert value(metrics, "adapter_merged", adapter="pirate") == 1
    assert labels_of(metrics, "adapter_merged", "adapter") == {"pirate"}
    assert value(metrics, "merge_held_bytes") == 32


def test_each_load_is_timed_by_its_way() -> None:
    metrics = Metrics()
    times = [AdapterLoad("disk", "host", 0.2), AdapterLoad("disk", "host", 0.7), AdapterLoad("host", "device", 0.002)]
    metrics.engine_stats(stats(adapter_load_times=times[:1]), NAMES)
    metrics.engine_stats(stats(adapter_load_times=times[1:]), NAMES)
    reading = {"from": "disk", "to": "host"}
    assert value(metrics, "adapter_load_seconds_count", **reading) == 2
    assert value(metrics, "adapter_load_seconds_sum", **reading) == pytest.approx(0.9)
    assert value(metrics, "adapter_load_seconds_bucket", **reading, le="0.25") == 1
    assert value(metrics, "adapter_load_seconds_sum", **{"from": "host", "to": "device"}) == 0.002


def test_requests_wait_by_the_name_of_their_adapter_as_far_as_labels_go() -> None:
    metrics = Metrics(max_adapters=2)
    waiting = {"sha256:1": 2, "sha256:4": 3, "sha256:2": 4, "sha256:3": 5, "sha256:unheard of": 6}
    metrics.engine_stats(stats(waiting_by_adapter=waiting), NAMES)
    assert value(metrics, "adapter_requests_waiting", adapter="pirate") == 5  # two versions of one name
    assert value(metrics, "adapter_requests_waiting", adapter="json") == 4
    assert value(metrics, "adapter_requests_waiting", adapter="_other") == 11
    metrics.engine_stats(stats(waiting_by_adapter={"sha256:2": 1}), NAMES)
    assert labels_of(metrics, "adapter_requests_waiting", "adapter") == {"json"}, "others wait no more"


def router_info(metrics: Metrics) -> tuple[dict[str, str], float]:
    [(labels, seconds)] = [
        (dict(k), v) for (name, k), v in samples(metrics).items() if name == "vllm:lora_requests_info"
    ]
    return labels, seconds


def test_routers_read_which_adapters_are_here_as_they_do_of_vllm() -> None:
    """The labels and the value are those of vLLM's gauge, of which a router takes the newest."""
    metrics = Metrics()
    metrics.engine_started(READY)
    before = time.time()
    metrics.engine_stats(stats(memory={"adapters": 1000}), NAMES)
    labels, seconds = router_info(metrics)
    assert labels == {"max_lora": "8", "running_lora_adapters": "", "waiting_lora_adapters": ""}
    assert before <= seconds <= time.time()
    adapters = [
        ResidentAdapter("sha256:2", "device", 100, 0),
        ResidentAdapter("sha256:1", "device", 100, 2),
        ResidentAdapter("sha256:4", "device", 40, 1),
        ResidentAdapter("sha256:3", "host", 100, 0),
    ]
    now = stats(
        adapters=adapters,
        adapter_bytes={"device": 240, "host": 100},
        memory={"adapters": 1000},
        waiting_by_adapter={"sha256:3": 1, "sha256:unheard of": 1},
    )
    metrics.engine_stats(now, NAMES)
    labels, seconds = router_info(metrics)
    # Of the present mean size, 80 bytes, the device holds twelve.
    assert labels == {"max_lora": "12", "running_lora_adapters": "pirate,json", "waiting_lora_adapters": "sql"}
    metrics.engine_restarted()
    assert not [name for name, _ in samples(metrics) if name.startswith("vllm:")]


def test_the_store_is_up_until_it_is_not() -> None:
    metrics = Metrics()
    assert value(metrics, "store_up") == 1
    metrics.store_up(False)
    assert value(metrics, "store_up") == 0


def test_processes_tell_their_memory_and_time_while_they_live() -> None:
    metrics = Metrics()
    assert value(metrics, "process_resident_memory_bytes", process="frontend") > 10 * 2**20
    assert value(metrics, "process_cpu_seconds_total", process="frontend") > 0
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        metrics.engine_started(READY, pid=other.pid)
        assert value(metrics, "process_resident_memory_bytes", process="engine") > 0
        other.kill()
    assert labels_of(metrics, "process_resident_memory_bytes", "process") == {"frontend"}


def test_an_engine_may_start_while_the_page_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a file lets the event loop's thread run."""
    metrics = Metrics()

    def read(pid: int) -> tuple[float, float]:
        metrics.engine_started(READY, pid=12345)
        return 1.0, 1.0

    monkeypatch.setattr("server.metrics.processes._read_process", read)
    for processes in ({"frontend"}, {"frontend", "engine"}):
        assert labels_of(metrics, "process_resident_memory_bytes", "process") == processes


def test_names_and_help_keep_to_prometheus_conventions() -> None:
    metrics = Metrics()
    metrics.engine_started(READY, pid=os.getpid())
    metrics.engine_stats(stats(), NAMES)
    for family in text_string_to_metric_families(page(metrics)):
        assert family.name.startswith(("lorikeet_", "gen_ai_server_")) or family.name == "vllm:lora_requests_info"
        assert family.documentation.endswith("."), family.name
        if family.type == "histogram":
            assert family.name.endswith("_seconds")
        for unit in ("seconds", "bytes"):
            if unit in family.name:
                assert unit in family.documentation.lower(), family.name


def test_draining_shows() -> None:
    metrics = Metrics()
    assert value(metrics, "draining") == 0
    metrics.draining(True)
    assert value(metrics, "draining") == 1


def test_the_page_is_served_and_a_port_in_use_is_named() -> None:
    served = MetricsPage(Metrics(), "127.0.0.1", 0)
    with urllib.request.urlopen(f"http://127.0.0.1:{served.port}/metrics") as answer:
        assert "lorikeet_build_info{" in answer.read().decode()
    with pytest.raises(ConfigError, match=rf"metrics_port: .*port {served.port}"):
        MetricsPage(Metrics(), "127.0.0.1", served.port)
    served.close()


def test_connections_to_the_page_that_break_leave_no_traceback(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """As load balancers probe a port: they connect, and reset."""
    served = MetricsPage(Metrics(), "127.0.0.1", 0)
    before = set(threading.enumerate())
    connection = socket.create_connection(("127.0.0.1", served.port))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
    with urllib.request.urlopen(f"http://127.0.0.1:{served.port}/metrics") as answer:  # taken after the other
        assert answer.status == 200
    for thread in set(threading.enumerate()) - before:
        thread.join()
    served.close()
    assert "Traceback" not in capfd.readouterr().err + caplog.text


def test_a_connection_to_the_page_that_says_nothing_is_closed(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Each takes a thread."""
    monkeypatch.setattr("server.metrics.page._Handler.timeout", 0.05)
    served = MetricsPage(Metrics(), "127.0.0.1", 0)
    with socket.create_connection(("127.0.0.1", served.port), timeout=60) as connection:
        assert connection.recv(1) == b""
    served.close()
    assert "Traceback" not in capfd.readouterr().err + caplog.text
