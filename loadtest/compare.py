"""`python -m loadtest compare`: the same scenario at several loads, against a server of each mode in turn."""

import json
import shlex
import sys
import tempfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pynvml

from adapters.errors import LorikeetError
from benchmarks.live import surroundings
from loadtest.errors import LoadTestFailed
from loadtest.modes import MODES, Mode, select, server_options
from loadtest.play import echoing, play
from loadtest.report.html import html_report
from loadtest.report.markdown import markdown_report
from loadtest.scenario import Scenario, read_scenario
from loadtest.serving import Server, publish_for, serving
from loadtest.streams import Client
from server.base.resolve import BaseModel, resolve_base


def compare(options: Namespace) -> int:
    """Play, then write PREFIX.json, .html and .md; 1 if any request failed or no mode that was asked for could be
    played, else 0. Raises LoadTestFailed for a scenario that not every mode can be asked."""
    scenario = read_scenario(options.scenario).at(seconds=options.seconds)
    if scenario.swap is not None or scenario.adapters.popularity == "base":
        raise LoadTestFailed(
            f"--scenario {options.scenario}: a comparison needs requests for adapters, and no hot swaps"
        )
    base = resolve_base(options.base, _say)
    modes, known = select(options.modes), server_options()
    report: dict[str, Any] = {
        "scenario": msgspec.to_builtins(scenario),
        "base": base.name,
        "users": options.users,
        "options": options.options,
        "environment": surroundings() | gpus(),
        "command": f"python -m loadtest {' '.join(shlex.quote(word) for word in sys.argv[1:])}",
        "modes": [],
        "left_out": [],
        "echo": [],
    }
    prefix = Path(options.output)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    if options.keep:
        report = kept(report, prefix.with_name(f"{prefix.name}.json"))
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        uses_adapters = any(mode.use != "base" for mode in modes)
        store = publish_for(scenario, base, Path(scratch)) if uses_adapters else Path(scratch) / "store"
        for mode in modes:
            if missing := mode.missing(known):
                add(report, "left_out", _left_out(mode, f"this `lorikeet serve` has no {' and no '.join(missing)}"))
                continue
            try:
                found.append(measure(mode, scenario, base, store, options.users, options.processes, options.options))
                add(report, "modes", found[-1])
            except LorikeetError as error:
                add(report, "left_out", _left_out(mode, error.message))
            write(report, prefix)  # what is interrupted, or killed, has lost nothing but the mode under way
    if options.echo and not report["echo"]:
        report["echo"] = measure_echo(scenario, options.users, options.processes)
    write(report, prefix)
    print(markdown_report(report))
    return int((bool(modes) and not found) or any(load["failures"] for mode in found for load in mode["loads"]))


def kept(report: dict[str, Any], file: Path) -> dict[str, Any]:
    """The report with all that `file`, an earlier one, has measured already; as it is where there is none. Raises
    LoadTestFailed for a report of something else: another scenario, base or machine, other options of the servers.
    Commits are each mode's own."""
    if not file.exists():
        return report
    earlier = json.loads(file.read_text())
    _check_same(report, earlier, file)
    return {**report, **earlier, "command": _commands(earlier, report)}


def join(options: Namespace) -> int:
    """One report of several, as of modes that were measured side by side. Raises LoadTestFailed for a file that cannot
    be read, and for reports of different things, as `kept` does."""
    report: dict[str, Any] = {}
    for file in map(Path, options.parts):
        try:
            part = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise LoadTestFailed(f"{file}: not a report of `compare`: {error}") from error
        report = joined(report, part, file) if report else part
    write(report, Path(options.output))
    print(markdown_report(report))
    return int(any(load["failures"] for mode in report["modes"] for load in mode["loads"]))


def joined(report: Mapping[str, Any], part: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """`report` and what `part`, of `file`, has measured. Raises LoadTestFailed for parts of different things."""
    _check_same(report, part, file)
    both = {**report, "command": _commands(report, part), "echo": report["echo"] or part["echo"]}
    for name in ("left_out", "modes"):
        for mode in part[name]:
            add(both, name, mode)
    return both


def _check_same(report: Mapping[str, Any], other: Mapping[str, Any], file: Path) -> None:
    for name in ("base", "scenario", "users", "options"):
        if other.get(name, report.get(name)) != report.get(name):
            raise LoadTestFailed(f"{file} has another {name}; measure all modes again, or elsewhere")
    for name, value in report["environment"].items():
        was = other["environment"].get(name)
        if name not in ("load", "commit") and was != value:
            raise LoadTestFailed(f"{file} was measured with {name} {was}, this is {value}; measure all again")


def _commands(*reports: Mapping[str, Any]) -> str:
    return "\n".join(dict.fromkeys(line for report in reports for line in report["command"].splitlines()))


def add(report: dict[str, Any], part: str, mode: Mapping[str, Any]) -> None:
    """Put a mode into "modes" or "left_out", in the order of MODES and instead of what was there of it."""
    order = [known.name for known in MODES]
    for name in ("modes", "left_out"):
        report[name] = [other for other in report[name] if other["name"] != mode["name"]]
    report[part] = sorted([*report[part], mode], key=lambda other: order.index(other["name"]))


def write(report: Mapping[str, Any], prefix: Path) -> None:
    """PREFIX.json, .html and .md."""
    for suffix, text in (
        (".json", json.dumps(report, indent=1) + "\n"),
        (".html", html_report(report)),
        (".md", markdown_report(report)),
    ):
        prefix.with_name(prefix.name + suffix).write_text(text)


def gpus() -> dict[str, object]:
    """The first GPU's name, as NVIDIA's driver has it; nothing without one."""
    try:
        pynvml.nvmlInit()
        return {"gpu": str(pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(0)))}
    except pynvml.NVMLError:
        return {}


def measure(
    mode: Mode,
    scenario: Scenario,
    base: BaseModel,
    store: Path,
    loads: Sequence[int],
    processes: int,
    options: Sequence[str],
) -> dict[str, Any]:
    """One server, each load after the other. Raises LoadTestFailed when the server refuses to start so."""
    played = mode.scenario(scenario)
    results = []
    with serving(base, store, *mode.options_for("a0000"), *options) as server:
        warm_up(played, server.address)
        for users in loads:
            _say(f"{mode.title}: {users} users for {scenario.seconds} s")
            measured = one_load(played.at(users=users), server.address, mode.name, processes)
            results.append(measured | {"memory_bytes": server.memory()})
        device = _engine(server)
    return {
        "name": mode.name,
        "title": mode.title,
        "bits": mode.bits,
        "use": mode.use,
        "command": server.command,
        "commit": surroundings()["commit"],
        **device,
        "loads": results,
    }


def warm_up(scenario: Scenario, address: str) -> None:
    """What first requests compile and load is no load's cost: neither are adapters that come from the disk."""
    client = Client(address)
    try:
        names = [] if scenario.adapters.popularity == "base" else client.adapter_names(scenario.adapters.count)
        for name in names[:1] if scenario.adapters.popularity == "one" else names:
            client.load(name)
    finally:
        client.close()
    play(msgspec.structs.replace(scenario.at(users=1, seconds=2), warmup=0.0), address, quiet=True)


def measure_echo(scenario: Scenario, loads: Sequence[int], processes: int) -> list[dict[str, Any]]:
    """The same loads on a server that computes nothing: what the load generator itself takes here."""
    with echoing() as address:
        results = []
        for users in loads:
            _say(f"echo: {users} users for {scenario.seconds} s")
            results.append(one_load(scenario.at(users=users), address, "echo", processes))
        return results


def one_load(scenario: Scenario, address: str, mode: str, processes: int) -> dict[str, Any]:
    """Played, without what is the same for all loads."""
    measured = dict(play(scenario, address, mode=mode, quiet=True, processes=processes))
    del measured["scenario"], measured["adapters"]
    return measured


def _engine(server: Server) -> dict[str, str]:
    """What the engine runs on."""
    for sample in server.samples():
        if sample.name == "lorikeet_engine_info":
            return dict(sample.labels)
    return {}


def _left_out(mode: Mode, why: str) -> dict[str, str]:
    _say(f"{mode.title}: left out: {why}")
    return {"name": mode.name, "title": mode.title, "why": why}


def _say(line: str) -> None:
    print(line, file=sys.stderr)
