"""A real Prometheus reads a server under load: the page, the committed rules, and every query of the dashboard."""

import json
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorikeet.v1 import adapter_pb2
from server.engine.messages import Ready, Stats
from server.metrics import Metrics, MetricsPage
from server.metrics.gpus import GpuMemory
from tests.integration.conftest import StartServer
from tests.support.client import Client, generation
from tests.support.prometheus import DEPLOY, Prometheus
from tests.support.server_process import REPOSITORY, ServerProcess
from tests.support.waiting import eventually

pytestmark = pytest.mark.prometheus

SCENARIO = """
seconds = 6
warmup = 0.5
prompt = { distribution = "fixed", tokens = 40 }
output = { distribution = "fixed", tokens = 30 }
[adapters]
popularity = "mixed"
count = 8
base_share = 0.2
[arrivals]
kind = "closed"
users = 5
"""

DASHBOARD = json.loads((DEPLOY / "grafana/dashboards/lorikeet.json").read_text())
QUERIES = [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]


@pytest.fixture(scope="module")
def loaded(start_server: StartServer) -> ServerProcess:
    """A server so small that it refuses, and drops adapters for others."""
    return start_server(
        *("--kv-cache-memory", "8MiB", "--adapter-memory", "700KiB", "--host-adapter-memory", "1MiB"),
        *("--max-num-seqs", "2", "--max-waiting", "2"),
    )


@pytest.fixture(scope="module")
def gpu_page() -> Iterator[MetricsPage]:
    """The page of a server as it would be on a GPU."""
    metrics = Metrics(driver=lambda: [GpuMemory("0", 7000, 8000)])
    metrics.engine_started(Ready("cuda:0", "bfloat16", 1024, 8, 256, 16, 64))
    metrics.engine_stats(Stats(0, 0, 0, 64, [], {"weights": 4000, "kv": 1000}), {})
    page = MetricsPage(metrics, "127.0.0.1", 0)
    yield page
    page.close()


@pytest.fixture(scope="module")
def prometheus(
    loaded: ServerProcess, gpu_page: MetricsPage, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    """One that has watched a load test."""
    directory = tmp_path_factory.mktemp("prometheus")
    targets = [f"127.0.0.1:{loaded.metrics_port}", f"127.0.0.1:{gpu_page.port}"]
    prometheus = Prometheus.start(directory, targets)
    try:
        eventually(lambda: all(target["health"] == "up" for target in prometheus.targets()), "both are scraped")
        play(loaded, directory)
        yield prometheus
    finally:
        prometheus.stop()


def play(server: ServerProcess, directory: Path) -> None:
    """Some load by Locust, more of which is refused, and a call that is."""
    scenario = directory / "scenario.toml"
    scenario.write_text(SCENARIO)
    results = directory / "results.json"
    command = [sys.executable, "-m", "loadtest", "run", "--server", f"127.0.0.1:{server.port}"]
    command += ["--scenario", str(scenario), "--json", str(results)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=REPOSITORY, check=False)
    assert results.exists(), done.stderr
    found = json.loads(results.read_text())
    assert found["requests"] > 0, done.stdout
    assert set(found["failures"]) <= {"RESOURCE_EXHAUSTED SERVER_BUSY"}, found["failures"]
    client = Client(server.port)
    client.refused(generation([5], "nobody"))
    # A load that adds to series which were scraped before: the rate of those that begin with their count is 0.
    client.adapters.UnloadAdapter(adapter_pb2.UnloadAdapterRequest(adapter_id="rank-4"), timeout=60)
    client.adapters.LoadAdapter(adapter_pb2.LoadAdapterRequest(adapter_id="rank-4"), timeout=60)
    client.close()


def test_the_page_is_read_without_fault(prometheus: Prometheus) -> None:
    for target in prometheus.targets():
        assert (target["health"], target["lastError"]) == ("up", "")
    up = prometheus.query('up{job="lorikeet"}')
    assert [sample["value"][1] for sample in up] == ["1", "1"]


def test_promtool_finds_the_page_well_made(
    prometheus: Prometheus, loaded: ServerProcess, gpu_page: MetricsPage
) -> None:
    for port in (loaded.metrics_port, gpu_page.port):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as page:
            done = subprocess.run(["promtool", "check", "metrics"], input=page.read(), capture_output=True, check=False)
        # The one name that is not ours: routers know it from vLLM.
        assert done.stderr.decode().splitlines() == ["vllm:lora_requests_info metric names should not contain ':'"]


def test_prometheus_counts_what_the_server_counted(prometheus: Prometheus, loaded: ServerProcess) -> None:
    told = loaded.metrics()["lorikeet_generation_tokens_total"]
    assert told > 0

    def seen() -> float:
        [sample] = prometheus.query("sum(lorikeet_generation_tokens_total)")
        return float(sample["value"][1])

    eventually(lambda: seen() == told, f"it has seen all {told:.0f} tokens")


def test_every_rule_is_evaluated(prometheus: Prometheus) -> None:
    eventually(lambda: all(rule["health"] == "ok" for rule in prometheus.rules()), "each was evaluated")
    names = {rule["name"] for rule in prometheus.rules()}
    assert {"instance:lorikeet_request_errors:ratio_rate5m", "LorikeetDown"} <= names


@pytest.mark.parametrize(("title", "expression"), QUERIES, ids=map(str, range(len(QUERIES))))
def test_every_query_of_the_dashboard_finds_something(prometheus: Prometheus, title: str, expression: str) -> None:
    asked = re.sub(r"\$__rate_interval", "2m", expression).replace("$instance", ".*")
    assert "$" not in asked

    def has_numbers() -> bool:
        """What the last requests changed is there once it has been scraped."""
        return any(value != "NaN" for series in prometheus.over_time(asked) for _, value in series["values"])

    eventually(has_numbers, f"{title}: {asked}", timeout=60)


def test_the_dashboard_is_whole() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, f"{panel['title']} lies over another panel"
        assert place["x"] + place["w"] <= 24
        taken |= cells
    assert len(QUERIES) > 40
    shown = " ".join(expression for _, expression in QUERIES)
    for name in ("time_to_first_token_seconds", "gpu_memory_bytes", "adapter_loaded", "requests_waiting"):
        assert f"lorikeet_{name}" in shown
