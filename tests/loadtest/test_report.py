"""The comparison: its tables against numbers made up for them, and the page in a browser."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loadtest.modes import MODES, Mode, select, server_options
from loadtest.report.html import html_report
from loadtest.report.markdown import markdown_report
from loadtest.report.tables import costs, four_bits, generator, memory, speed
from loadtest.scenario import read_scenario
from tests.support.browser import Browser, check_pictures


def load(users: int, tokens: float, tpot: float, weights: int) -> dict[str, Any]:
    times = {
        name: tpot * factor for name, factor in (("p50", 1), ("p90", 1.1), ("p95", 1.2), ("p99", 1.5), ("mean", 1))
    }
    return {
        "users": users,
        "output_tokens_per_second": tokens,
        "requests_per_second": tokens / 64,
        "requests": 9 * users,
        "tpot_seconds": times,
        "ttft_seconds": {name: 4 * value for name, value in times.items()},
        "failures": {"UNAVAILABLE": 2} if users == 16 and tpot > 0.07 else {},
        "memory_bytes": {"weights": weights, "kv": 1 << 28, "adapters": 1 << 26, "resident engine": 1 << 30},
    }


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """Of every mode but one."""
    modes = []
    for i, mode in enumerate(MODES[:-1]):
        loads = [
            load(users, 40 * users**0.7 / (1 + i / 9), 0.02 * users**0.4 * (1 + i / 9), mode.bits << 24)
            for users in (1, 4, 16)
        ]
        modes.append({"name": mode.name, "title": mode.title, "bits": mode.bits, "use": mode.use, "loads": loads})
        modes[-1] |= {"command": f"lorikeet serve {mode.name}", "device": "cpu", "dtype": "bfloat16"}
    scenario = json.loads(json.dumps({"name": "made up", "seconds": 20, "warmup": 3.0}))
    scenario |= {
        "prompt": {"distribution": "fixed", "tokens": 32},
        "adapters": {"count": 16, "rank": 8, "popularity": "zipf"},
    }
    scenario["output"] = {"distribution": "lognormal", "median": 64, "sigma": 1.0, "most": 99}
    return {
        "scenario": scenario,
        "base": "a <base>",
        "environment": {"cpu": "two cores", "commit": "abc"},
        "command": "python -m loadtest compare --users 1,4,16",
        "modes": modes,
        "echo": [load(users, 900 * users, 0.001, 0) for users in (1, 4, 16)],
        "left_out": [{"name": "merged-4", "title": "merged, 4-bit", "why": "no --merge & so on"}],
    }


def test_the_tables_tell_the_numbers(report: dict[str, Any]) -> None:
    table = speed(report)
    assert len(table.rows) == 5 * 3
    first = dict(zip(table.head, table.rows[0], strict=True))
    assert (first["mode"], first["users"], first["tokens/s"]) == ("base, 16-bit", "1", "40.0")
    assert first["requests"] == "9", "so the p95 and the p99 are the most that there was"
    assert (first["TPOT p50, ms"], first["TTFT p95, ms"], first["failed"]) == ("20.0", "96.0", "0")
    cost = {row[:2]: row[2:] for row in costs(report).rows}
    assert cost["adapters on the 16-bit base", "4"] == ("-10.0 %", "+11.1 %", "+11.1 %")
    assert ("a merged adapter on the 4-bit base", "4") not in cost, "it was not measured"
    assert generator(report).rows[1] == ("4", "3600", "4.0", "1.0")
    held = memory(report)
    assert held.head == ("mode", "weights", "kv", "adapters", "resident engine")
    assert held.rows[3][1:3] == ("64 MiB", "256 MiB")


@pytest.mark.parametrize(
    ("tokens", "tpot", "said"),
    [
        (1.2, 0.8, "faster"),
        (1.2, 1.02, "faster"),
        (0.98, 1.02, "as fast"),
        (0.98, 1.2, "slower"),
        (0.8, 1.2, "slower"),
        (1.2, 1.2, "slower in one of them"),
        (0.0, 1.2, "–"),
    ],
)
def test_whether_four_bits_are_slower(report: dict[str, Any], tokens: float, tpot: float, said: str) -> None:
    wide, narrow = ({"use": "base", "bits": bits} for bits in (16, 4))
    wide |= {"loads": [load(4, 100.0, 0.02, 0)]}
    narrow |= {"loads": [load(4, 100.0 * tokens, 0.02 * tpot, 0)]}
    merged = {"use": "merged", "bits": 16, "loads": [load(4, 1.0, 1.0, 0)]}
    (row,) = four_bits(report | {"modes": [wide, merged, narrow]}).rows
    assert row == ("base", "4", "100.0", f"{100 * tokens:.1f}", "20.0", f"{20 * tpot:.1f}", said)


def test_markdown_has_tables_commands_and_what_is_missing(report: dict[str, Any]) -> None:
    text = markdown_report(report)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(row.count("|") == rows[0].count("|") for row in rows[:17])
    assert "merged, 4-bit: no --merge & so on" in text
    assert "python -m loadtest compare --users 1,4,16" in text
    assert "answers of about 64 tokens" in text
    assert "commit abc" in text
    assert "On cpu in bfloat16, cpu two cores, commit abc." in text
    assert "## The load generator itself" in text
    bare = report | {"modes": [], "echo": []}
    assert "The load generator itself" not in markdown_report(bare) + html_report(bare), "nothing was measured of it"
    modes = [mode | {"commit": "def" if mode["name"] == "lora-4" else "abc"} for mode in report["modes"]]
    text = markdown_report(report | {"modes": modes})
    assert "base-16, lora-16, merged-16, base-4 at commit abc, lora-4 at commit def." in text


def test_the_page_needs_nothing_else(report: dict[str, Any]) -> None:
    page = html_report(report)
    for outside in ("http:", "https:", "src=", "<script", "@import", "url("):
        assert outside not in page.replace("http://www.w3.org/2000/svg", "")
    assert "a &lt;base&gt;" in page


def test_modes_are_chosen_by_what_the_server_knows() -> None:
    known = server_options()
    assert {"--max-num-seqs", "--adapter-memory"} <= known
    mode = Mode("odd", "odd", 4, "merged", ("--max-num-seqs", "4", "--no-such-option", "{adapter}"))
    assert mode.missing(known) == ["--no-such-option"]
    assert mode.options_for("a0") == ["--max-num-seqs", "4", "--no-such-option", "a0"]
    assert [mode.name for mode in select("lora-4,base-16")] == ["lora-4", "base-16"]
    assert select("") == []


def test_every_mode_is_asked_for_the_same_lengths() -> None:
    scenario = read_scenario("compare")
    played = {mode.name: mode.scenario(scenario) for mode in MODES}
    assert {one.adapters.popularity for name, one in played.items() if name.startswith("base")} == {"base"}
    assert {one.adapters.popularity for name, one in played.items() if name.startswith("lora")} == {"uniform"}
    assert {one.adapters.popularity for name, one in played.items() if name.startswith("merged")} == {"one"}
    assert len({(str(one.prompt), str(one.output), str(one.arrivals), one.seed) for one in played.values()}) == 1


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser.start(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.stop()


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [700, 1280])
def test_every_plot_is_seen_and_read(
    report: dict[str, Any], browser: Browser, tmp_path: Path, scheme: str, width: int
) -> None:
    file = tmp_path / "report.html"
    file.write_text(html_report(report))
    browser.open(f"file://{file}", scheme=scheme, width=width)
    assert check_pictures(browser) == [
        "Time per output token, median",
        "Time to first token, p95",
        "Throughput",
        "Time per output token, p95",
        "On the device, by kind",
    ]
    corner = browser.screenshot().getpixel((2, 2))
    assert isinstance(corner, tuple)
    assert (sum(corner) < 3 * 64) == (scheme == "dark")
