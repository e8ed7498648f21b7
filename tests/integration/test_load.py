"""Load tests on real servers of their own: hot swaps under load, and the comparison from start to report."""

import json
import subprocess
import sys
from pathlib import Path

from tests.integration.conftest import World
from tests.support.server_process import REPOSITORY

SERVER = ("--device", "cpu", "--threads", "1", "--kv-cache-memory", "8MiB", "--max-model-len", "128")

# Of seconds so many that a process may stand still for some of them.
SCENARIO = """
seconds = 5
warmup = 0.5
prompt = { distribution = "uniform", low = 4, high = 12 }
output = { distribution = "uniform", low = 4, high = 24 }
[adapters]
popularity = "zipf"
count = 3
rank = 2
[arrivals]
kind = "closed"
users = 3
"""


def loadtest(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "loadtest", *arguments, "--", *SERVER]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=REPOSITORY, check=False)


def test_versions_change_under_load_and_no_request_fails(world: World, tmp_path: Path) -> None:
    scenario, results = tmp_path / "swaps.toml", tmp_path / "results.json"
    in_turn = SCENARIO.replace("zipf", "distinct")  # so that on a slow machine, too, each has its request
    scenario.write_text(in_turn + '[swap]\nevery = 0.05\naction = "rollback"\n')
    options = ("--base", str(world.base.path), "--scenario", str(scenario), "--json", str(results))
    done = loadtest("run", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(results.read_text())
    assert found["failures"] == {}
    assert found["requests"] > 0
    assert found["swaps"]["done"] > 0
    assert set(found["adapters"]) == {"a0000", "a0001", "a0002"}


def test_a_comparison_from_start_to_report(world: World, tmp_path: Path) -> None:
    scenario = tmp_path / "short.toml"
    scenario.write_text(SCENARIO)
    options = ("--base", str(world.base.path), "--scenario", str(scenario), "--users", "2")
    options += ("--output", str(tmp_path / "out" / "report"))
    for modes in (("--modes", "lora-16"), ("--modes", "base-16", "--keep")):
        done = loadtest("compare", *options, *modes)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "echo" not in done.stderr, "the first run's is kept"
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert [mode["name"] for mode in report["modes"]] == ["base-16", "lora-16"]
    assert report["left_out"] == []
    assert [load["users"] for load in report["echo"]] == [2]
    for mode in report["modes"]:
        assert [load["users"] for load in mode["loads"]] == [2]
        assert (mode["device"], mode["quantization"]) == ("cpu", "none")
        for load in mode["loads"]:
            assert load["output_tokens_per_second"] > 0
            assert load["tpot_seconds"]["p50"] > 0
            assert load["memory_bytes"]["kv"] == 8 << 20
            assert load["memory_bytes"]["resident engine"] > 10 << 20
    markdown = (tmp_path / "out/report.md").read_text()
    assert done.stdout.strip() == markdown.strip()
    page = (tmp_path / "out/report.html").read_text()
    assert page.count("<polyline") == 4 * 2
    assert page.count('class="bar"') == 3 * 2


def test_a_load_that_is_accepted_and_many_times_that(world: World, tmp_path: Path) -> None:
    """What is past the queue is refused in the way that clients can act on; how fast is not this test's. Answers are
    long, so that many times the load is no more calls a second than one client can make; and it is many times, as the
    server may have stood still while the load that it accepts was measured."""
    scenario = tmp_path / "short.toml"
    scenario.write_text(SCENARIO.replace("low = 4, high = 24", "low = 90, high = 110"))
    few = ("--max-num-seqs", "2", "--max-waiting", "1")
    options = ("--base", str(world.base.path), "--scenario", str(scenario), "--factor", "6", "--rounds", "1")
    command = [sys.executable, "-m", "loadtest", "overload", *options, "--", *SERVER, *few]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=REPOSITORY, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    line = json.loads(done.stdout)
    (found,) = line["rounds"]
    assert (found["accepted"]["users"], found["accepted"]["failed"]) == (2, 0)
    over = found["overloaded"]
    assert over["refused"] > 0
    assert (over["failed_otherwise"], over["without_retry_info"]) == (0, 0)
    assert 1.0 <= over["retry_seconds"]["p50"] <= 60.0
    assert over["requests"] > 0
    assert line["tpot_ratio"].keys() == {"p50", "p95", "p99"}
    for load in (found["accepted"], over):
        assert load["cores"].keys() == {"engine", "frontend", "generator", "others"}
        assert all(load["cores"][name] > 0 for name in ("engine", "frontend", "generator"))


def test_a_mode_that_does_not_start_is_left_out_and_said_so(world: World, tmp_path: Path) -> None:
    scenario = tmp_path / "short.toml"
    scenario.write_text(SCENARIO)
    options = ("--base", str(world.base.path), "--scenario", str(scenario), "--modes", "base-16")
    command = [sys.executable, "-m", "loadtest", "compare", *options, "--users", "1"]
    command += ["--output", str(tmp_path / "none"), "--no-echo", "--", "--max-batch-tokens", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=REPOSITORY, check=False)
    assert done.returncode == 1
    [left_out] = json.loads((tmp_path / "none.json").read_text())["left_out"]
    assert left_out["why"].startswith("the server did not start: error: ")
    assert "--max-batch-tokens 1" in left_out["why"]
    assert "Left out" in (tmp_path / "none.html").read_text()
