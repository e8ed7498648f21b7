"""Locust as it is run, against a server that computes nothing: its tables, its CSV, and our own numbers."""

import csv
import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from loadtest.play import echoing
from tests.support.server_process import REPOSITORY
from tests.support.waiting import eventually

# Long enough that most of it is left when the machine stands still for some seconds of it.
SCENARIO = """
seconds = 10
warmup = 0.5
prompt = { distribution = "fixed", tokens = 4 }
output = { distribution = "fixed", tokens = 6 }
"""


@pytest.fixture(scope="module")
def echo() -> Iterator[str]:
    """Refuses every fifth request."""
    with echoing(interval=0.02, refuse_every=5) as address:
        yield address


def play(folder: Path, tables: str, *options: str) -> tuple[int, dict[str, Any]]:
    """`python -m loadtest run`; its exit code and JSON."""
    scenario = folder / "scenario.toml"
    scenario.write_text(SCENARIO + tables)
    command = [sys.executable, "-m", "loadtest", "run", "--scenario", str(scenario), "--json", str(folder / "out")]
    done = subprocess.run(
        [*command, *options], capture_output=True, text=True, timeout=120, cwd=REPOSITORY, check=False
    )
    assert (folder / "out").exists(), done.stdout + done.stderr
    return done.returncode, json.loads((folder / "out").read_text())


def rows(file: Path) -> dict[tuple[str, str], dict[str, str]]:
    """(type, name) → row of one of Locust's CSV files."""
    with file.open() as text:
        return {(row["Type"], row["Name"]): row for row in csv.DictReader(text)}


def test_closed_users_show_in_locust_s_tables_and_in_ours(tmp_path: Path, echo: str) -> None:
    tables = '[adapters]\npopularity = "mixed"\ncount = 2\n[arrivals]\nkind = "closed"\nusers = 3\n'
    tables += "[swap]\nevery = 0.3\n"
    code, found = play(tmp_path, tables, "--server", echo, "--csv", str(tmp_path / "locust"))
    assert code == 1, "some requests failed"
    table = rows(tmp_path / "locust_stats.csv")
    for name in ("base", "a0000", "a0001"):
        whole = table["end to end ms", name]
        assert float(whole["Min Response Time"]) > 95, "those refused, at once, have no part in the times of the others"
        for kind in ("TTFT ms", "TPOT ms", "tokens/s"):
            told = int(table[kind, name]["Request Count"])
            assert told == int(whole["Request Count"]) - int(whole["Failure Count"]) > 0, (kind, name)
    assert any(kind == "swap ms" for kind, _ in table)
    with (tmp_path / "locust_failures.csv").open() as text:
        failures = {(row["Method"], row["Error"]) for row in csv.DictReader(text)}
    assert {kind for kind, _ in failures} == {"end to end ms"}
    assert all("RESOURCE_EXHAUSTED SERVER_BUSY" in error for _, error in failures)
    assert len({error for _, error in failures}) == 1, "one row for one kind of failure"
    assert list(found["failures"]) == ["RESOURCE_EXHAUSTED SERVER_BUSY"]
    assert found["without_retry"] == 0
    assert found["retry_seconds"]["p99"] == 1.0, "what the echo asks for"
    share = found["failures"]["RESOURCE_EXHAUSTED SERVER_BUSY"] / (found["requests"] + 1)
    assert share == pytest.approx(1 / 4, rel=0.3)
    assert found["output_tokens_per_second"] == pytest.approx(6 * found["requests_per_second"], rel=0.2)
    first, each, whole = (found[f"{kind}_seconds"]["mean"] for kind in ("ttft", "tpot", "end_to_end"))
    assert each >= 0.015, "the echo waits twenty milliseconds between tokens"
    assert 0.099 <= first + 5 * each <= whole + 0.001
    assert found["swaps"]["done"] > 0
    assert found["swaps"]["failed"] == 0


def test_an_open_load_keeps_its_rate_and_names_its_mode(tmp_path: Path, echo: str) -> None:
    tables = '[adapters]\npopularity = "distinct"\ncount = 100\n[arrivals]\nkind = "open"\nrate = 60.0\n'
    tables += "most_in_flight = 1\n"
    options = ("--server", echo, "--csv", str(tmp_path / "locust"))
    _, found = play(tmp_path, tables, *options)
    count = found["requests"] + sum(found["failures"].values())
    assert 20 < count / found["seconds"] < 75, (
        "64 by its seed; a machine that stood still answers some too late to count"
    )
    assert found["failures"]["CLIENT_FULL"] > 0
    table = rows(tmp_path / "locust_stats.csv")
    assert ("TTFT ms", "_other") in table, "adapters past the first fifty share a row"
    names = {name for _, name in table} - {"_other", "Aggregated"}
    assert names == {f"a{i:04d}" for i in range(50)}, "what was not sent counts for the adapter it was meant for"


def test_several_processes_share_one_load(tmp_path: Path, echo: str) -> None:
    tables = '[adapters]\npopularity = "distinct"\ncount = 9\n[arrivals]\nkind = "closed"\nusers = 3\n'
    _, found = play(tmp_path, tables, "--server", echo, "--processes", "2", "--csv", str(tmp_path / "locust"))
    assert (found["users"], found["processes"]) == (3, 2)
    assert set(found["adapters"]) == {f"a{i:04d}" for i in range(9)}, "each takes every second request"
    assert rows(tmp_path / "locust_stats.csv").keys() | rows(tmp_path / "locust-1_stats.csv").keys()


def test_no_server_is_one_line_and_code_two(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "loadtest", "run", "--server", "127.0.0.1:1", "--seconds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=REPOSITORY, check=False)
    assert done.returncode == 2
    assert "no server answers at 127.0.0.1:1: UNAVAILABLE" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: Locust ended with code 2")


def test_too_few_adapters_are_named(tmp_path: Path, echo: str) -> None:
    scenario = tmp_path / "many.toml"
    scenario.write_text(SCENARIO + "[adapters]\ncount = 5000\n")
    command = [sys.executable, "-m", "loadtest", "run", "--server", echo, "--scenario", str(scenario)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=REPOSITORY, check=False)
    assert done.returncode == 2
    assert "the scenario wants 5000 adapters, the server has 1000" in done.stderr


def test_locust_s_web_page_starts_a_run_and_shows_it(tmp_path: Path, echo: str) -> None:
    scenario = tmp_path / "scenario.toml"
    scenario.write_text(SCENARIO + "[adapters]\ncount = 2\n")
    command = [sys.executable, "-m", "locust", "-f", str(REPOSITORY / "loadtest/locustfile.py"), "--host", echo]
    command += ["--scenario", str(scenario), "--web-host", "127.0.0.1", "--web-port", "0"]

    def ports() -> list[int]:
        """Those that it listens on."""
        connections = psutil.Process(locust.pid).net_connections("tcp4")
        return [connection.laddr.port for connection in connections if connection.status == psutil.CONN_LISTEN]

    def shown() -> dict[tuple[str, str], dict[str, Any]]:
        """Its table."""
        with urllib.request.urlopen(f"{page}/stats/requests", timeout=60) as answer:
            return {(row["method"], row["name"]): row for row in json.load(answer)["stats"]}

    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=REPOSITORY) as locust:
        try:
            [port] = eventually(ports, "the page is there")
            page = f"http://127.0.0.1:{port}"
            form = b"user_count=2&spawn_rate=2"
            with urllib.request.urlopen(f"{page}/swarm", data=form, timeout=30) as answer:
                assert json.load(answer)["success"]
            expected = {(kind, f"a000{i}") for kind in ("TTFT ms", "TPOT ms", "end to end ms") for i in range(2)}
            eventually(lambda: expected <= shown().keys(), "both adapters are in the table")
            assert shown()["TTFT ms", "a0000"]["num_requests"] > 0
        finally:
            locust.terminate()
