"""A comparison that goes on where another ended."""

import json
from pathlib import Path
from typing import Any

import pytest

from loadtest.__main__ import main
from loadtest.compare import add, joined, kept
from loadtest.cpu import cores
from loadtest.errors import LoadTestFailed
from loadtest.overload import REFUSAL, compared, is_as_promised, together
from loadtest.play import _run_all


def report(**changes: Any) -> dict[str, Any]:
    environment = {"cpu": "two cores", "load": 0.5, "commit": "abc"}
    return {
        "scenario": {"name": "made up"},
        "base": "a base",
        "users": [1, 4],
        "options": [],
        "environment": environment,
        "command": "measure this",
        "modes": [],
        "left_out": [],
        "echo": [],
    } | changes


def test_modes_are_kept_and_measured_again_in_their_order(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    assert kept(report(), file) == report(), "there is none to go on with"
    earlier = report(
        command="measure that", modes=[{"name": "base-4", "loads": 1}], left_out=[{"name": "base-16", "why": "busy"}]
    )
    file.write_text(json.dumps(earlier))
    now = kept(report(environment=report()["environment"] | {"load": 2.0, "commit": "def"}), file)
    assert now["command"] == "measure that\nmeasure this"
    add(now, "modes", {"name": "base-16", "loads": 2})
    add(now, "modes", {"name": "base-4", "loads": 3})
    add(now, "left_out", {"name": "lora-4", "why": "no room"})
    assert now["modes"] == [{"name": "base-16", "loads": 2}, {"name": "base-4", "loads": 3}]
    assert now["left_out"] == [{"name": "lora-4", "why": "no room"}]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"users": [1, 16]}, "another users"),
        ({"base": "other"}, "another base"),
        ({"options": ["--threads", "1"]}, "another options"),
        ({"scenario": {"name": "made up", "seed": 1}}, "another scenario"),
        ({"environment": {"cpu": "four cores", "load": 0.5}}, "with cpu two cores, this is four cores"),
    ],
)
def test_a_report_of_something_else_is_not_gone_on_with(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    (tmp_path / "report.json").write_text(json.dumps(report()))
    with pytest.raises(LoadTestFailed, match=said):
        kept(report(**changes), tmp_path / "report.json")


def test_reports_of_different_modes_are_joined() -> None:
    echo = [{"users": 1}]
    wide = report(modes=[{"name": "base-16"}], left_out=[{"name": "base-4", "why": "another run has it"}], echo=echo)
    narrow = report(command="measure that", modes=[{"name": "base-4"}], left_out=[{"name": "lora-4", "why": "no room"}])
    assert joined(narrow, wide, Path("wide.json"))["echo"] == echo
    both = joined(wide, narrow, Path("narrow.json"))
    assert (both["echo"], both["command"]) == (echo, "measure this\nmeasure that")
    assert [mode["name"] for mode in both["modes"]] == ["base-16", "base-4"]
    assert [mode["name"] for mode in both["left_out"]] == ["lora-4"]
    with pytest.raises(LoadTestFailed, match=r"narrow.json has another users"):
        joined(wide, narrow | {"users": [1]}, Path("narrow.json"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["compare", "--users", "1,x"],
        ["compare", "--users", "4,0"],
        ["run", "--processes", "0"],
        ["overload", "--rounds", "0"],
        ["overload", "--factor", "0"],
        ["overload", "--server", "127.0.0.1:1", "--base", "mine"],
        ["run", "--server", "127.0.0.1:1", "--", "--max-num-seqs", "4"],
    ],
    ids=" ".join,
)
def test_what_cannot_be_is_refused_before_anything_starts(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2
    assert f"argument {arguments[1]}: " in capsys.readouterr().err


def test_a_scenario_that_not_every_mode_can_play_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--scenario", "quick"]) == 2, "it swaps adapters"
    assert "--scenario quick: a comparison needs requests for adapters, and no hot swaps" in capsys.readouterr().err


def load(tpot: float, **changes: Any) -> dict[str, Any]:
    times = {"p50": tpot, "p95": 2 * tpot, "p99": 3 * tpot}
    found: dict[str, Any] = {"users": 4, "seconds": 9.0, "requests": 8, "requests_per_second": 1.0}
    found |= {"output_tokens_per_second": 64.0, "ttft_seconds": times, "tpot_seconds": times, "failures": {}}
    return found | {"failed_seconds": {}, "retry_seconds": {}, "without_retry": 0} | changes


def test_what_an_overload_says() -> None:
    refused = {REFUSAL: 7}
    over = load(0.022, failures=refused, failed_seconds={REFUSAL: {"p99": 0.003}}, retry_seconds={"p50": 2.0})
    found = compared(load(0.02), over)
    assert found["tpot_ratio"] == {"p50": 1.1, "p95": 1.1, "p99": 1.1}
    assert found["overloaded"]["refused"] == 7
    assert found["overloaded"]["refusal_ms"] == {"p99": 3.0}
    assert is_as_promised(found)
    for accepted, overloaded in (
        (load(0.02, failures={"UNAVAILABLE": 1}), over),
        (load(0.02), load(0.02)),
        (load(0.02), over | {"failures": refused | {"INTERNAL": 1}}),
        (load(0.02), over | {"without_retry": 1}),
    ):
        assert not is_as_promised(compared(accepted, overloaded))


def test_rounds_make_one_ratio_of_their_medians() -> None:
    rounds = [compared(load(0.02), load(0.02 * ratio)) for ratio in (1.5, 1.0, 1.1)]
    assert together(rounds) == {"tpot_ratio": {"p50": 1.1, "p95": 1.1, "p99": 1.1}, "rounds": rounds}


def test_whose_cpu_time_it_was() -> None:
    before = {"engine": 1.0, "frontend": 2.0, "generator": 0.5, "machine": 100.0, "wall": 50.0}
    after = {"engine": 16.0, "frontend": 3.0, "generator": 2.5, "machine": 119.0, "wall": 60.0}
    expected = {"engine": 1.5, "frontend": 0.1, "generator": 0.2, "others": 0.1}
    assert cores(before, after) == expected
    del before["machine"], expected["others"]
    assert cores(before, after) == expected


def test_a_locust_that_does_not_end_is_told(tmp_path: Path) -> None:
    with pytest.raises(LoadTestFailed, match=r"Locust has not ended after 0.01 s"):
        _run_all([["sleep", "60"]], [tmp_path / "records"], 0.01, True)
