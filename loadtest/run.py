"""`python -m loadtest run` and `echo`: one scenario, headless, and a short table of what it took."""

import json
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from loadtest.errors import LoadTestFailed
from loadtest.scenario import Closed, Scenario, read_scenario
from loadtest.serving import locust, publish_for, serving
from server.base.resolve import resolve_base

Results = Mapping[str, Any]


def play(
    scenario: Scenario, address: str, *, mode: str = "", options: tuple[str, ...] = (), quiet: bool = False
) -> Results:
    """Locust against the server at `address`, its tables on the terminal unless `quiet`. Raises LoadTestFailed when it
    ends without results."""
    users = scenario.arrivals.users if isinstance(scenario.arrivals, Closed) else 1
    with tempfile.TemporaryDirectory() as scratch:
        file, results = Path(scratch) / "scenario.json", Path(scratch) / "results.json"
        file.write_bytes(msgspec.json.encode(scenario))
        named = (*options, "--mode", mode) if mode else options
        code = locust(file, address, results, users=users, seconds=scenario.seconds, options=named, quiet=quiet)
        if not results.exists():
            raise LoadTestFailed(f"Locust ended with code {code} and no results; what it wrote says why")
        found: Results = json.loads(results.read_text())
        return found


def run(options: Namespace) -> int:
    """Against --server, or a server of its own; 1 if a request failed, else 0."""
    scenario = read_scenario(options.scenario).at(users=options.users, rate=options.rate, seconds=options.seconds)
    csv = ("--csv", options.csv) if options.csv else ()
    if options.server:
        results = play(scenario, options.server, options=csv)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            base = resolve_base(options.base, lambda line: print(line, file=sys.stderr))
            store = publish_for(scenario, base, Path(scratch))
            with serving(base, store, *options.options) as server:
                results = play(scenario, server.address, options=csv)
    return show(results, options.json)


def echo(options: Namespace) -> int:
    """The same against a server that computes nothing: what the load test itself takes."""
    scenario = read_scenario(options.scenario).at(users=options.users, rate=options.rate, seconds=options.seconds)
    with echoing(options.interval) as address:
        return show(play(scenario, address), options.json)


@contextmanager
def echoing(interval: float = 0.0, refuse_every: int = 0) -> Iterator[str]:
    """An echo server as a process of its own; its address."""
    command = [sys.executable, "-m", "loadtest.echo", "--interval", str(interval)]
    command += ["--refuse-every", str(refuse_every)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None, "its output is a pipe"
        yield f"127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.terminate()
        process.wait(30)


def show(results: Results, file: str | None) -> int:
    """Print the table, write the JSON where asked; the exit code."""
    if file:
        Path(file).write_text(json.dumps(results, indent=1) + "\n")
    print(f"{results['requests']} requests in {results['seconds']:.0f} s after the warm-up:", end=" ")
    print(f"{results['output_tokens_per_second']:.1f} tokens/s, {results['requests_per_second']:.2f} requests/s")
    rows = (("time to first token", "ttft_seconds"), ("time per token", "tpot_seconds"))
    for title, key in (*rows, ("end to end", "end_to_end_seconds")):
        times = "  ".join(f"{name} {value * 1000:8.1f}" for name, value in results[key].items())
        print(f"  {title:20} {times}  ms")
    swaps = results["swaps"]
    if swaps["done"] or swaps["failed"]:
        print(f"  hot swaps            {swaps['done']} done, {swaps['failed']} failed")
    for failure, count in results["failures"].items():
        print(f"  failed: {count} × {failure}")
    return int(bool(results["failures"] or swaps["failed"] or not results["requests"]))
