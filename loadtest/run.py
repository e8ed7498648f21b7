"""`python -m loadtest run` and `echo`: one scenario, headless, and a short table of what it took."""

import json
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

from loadtest.play import Results, echoing, play
from loadtest.scenario import read_scenario
from loadtest.serving import publish_for, serving
from server.base.resolve import resolve_base


def run(options: Namespace) -> int:
    """Against --server, or a server of its own; 1 if a request failed, else 0."""
    scenario = read_scenario(options.scenario).at(users=options.users, rate=options.rate, seconds=options.seconds)
    if options.server:
        results = play(scenario, options.server, csv=options.csv, processes=options.processes)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            base = resolve_base(options.base, lambda line: print(line, file=sys.stderr))
            store = publish_for(scenario, base, Path(scratch))
            with serving(base, store, *options.options) as server:
                results = play(scenario, server.address, csv=options.csv, processes=options.processes)
    return show(results, options.json)


def echo(options: Namespace) -> int:
    """The same against a server that computes nothing: what the load test itself takes."""
    scenario = read_scenario(options.scenario).at(users=options.users, rate=options.rate, seconds=options.seconds)
    with echoing(options.interval) as address:
        return show(play(scenario, address, processes=options.processes), options.json)


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
