"""`python -m loadtest overload`: what a server does at the load that it accepts, and at several times that load.

The load that it accepts is as many users as it runs sequences at once: every place is taken and nothing waits. The
other is an open load of `factor` times the requests a second that came of it: whoever is refused does not come again.
"""

import json
import sys
import tempfile
from argparse import Namespace
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.live import surroundings
from loadtest.compare import warm_up
from loadtest.errors import LoadTestFailed
from loadtest.play import Results, play
from loadtest.scenario import read_scenario
from loadtest.serving import publish_for, serving
from loadtest.streams import Client
from server.base.resolve import resolve_base

REFUSAL = "RESOURCE_EXHAUSTED SERVER_BUSY"

# A queue of a few seconds, where the server is the measurement's own.
OWN_SERVER = ("--max-num-seqs", "16", "--max-waiting", "16")


def overload(options: Namespace) -> int:
    """Play both loads and print one JSON line; 1 if a request failed at the load that the server accepts, or at the
    other one otherwise than refused with RetryInfo; else 0. Times decide nothing. Raises LoadTestFailed."""
    scenario = read_scenario(options.scenario).at(seconds=options.seconds)
    with ExitStack() as stack:
        if options.server:
            address, command = options.server, f"--server {options.server}"
        else:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            base = resolve_base(options.base, _say)
            server = stack.enter_context(
                serving(base, publish_for(scenario, base, scratch), *(options.options or OWN_SERVER))
            )
            address, command = server.address, server.command
        limits = limits_of(address)
        warm_up(scenario, address)
        _say(f"{limits['max_num_seqs']} users for {scenario.seconds} s")
        accepted = play(scenario.at(users=limits["max_num_seqs"]), address, quiet=True, processes=options.processes)
        rate = options.factor * accepted["requests_per_second"]
        if not rate:
            raise LoadTestFailed("no request ended at the load that the server accepts; give it more --seconds")
        _say(f"{rate:.1f} requests a second for {scenario.seconds} s")
        overloaded = play(scenario.at(rate=rate), address, quiet=True, processes=options.processes)
    result = compared(accepted, overloaded)
    line = {"scenario": scenario.name, "server": command, **limits, "factor": options.factor, **result}
    text = json.dumps(line | surroundings())
    print(text)
    if options.json:
        with Path(options.json).open("a") as file:
            file.write(text + "\n")
    return int(not is_as_promised(result))


def compared(accepted: Results, overloaded: Results) -> dict[str, Any]:
    """Both loads, and how much longer a token of those that were accepted takes at the second."""
    failures = overloaded["failures"]
    refused = failures.get(REFUSAL, 0)
    ratios = {
        share: round(overloaded["tpot_seconds"][share] / accepted["tpot_seconds"][share], 3)
        for share in ("p50", "p95", "p99")
        if accepted["tpot_seconds"].get(share) and share in overloaded["tpot_seconds"]
    }
    return {
        "accepted": _load(accepted) | {"failed": sum(accepted["failures"].values())},
        "overloaded": _load(overloaded)
        | {
            "refused": refused,
            "failed_otherwise": sum(failures.values()) - refused,
            "without_retry_info": overloaded["without_retry"],
            "refusal_ms": _milliseconds(overloaded["failed_seconds"]),
            "retry_seconds": overloaded["retry_seconds"],
        },
        "tpot_ratio": ratios,
    }


def is_as_promised(result: Mapping[str, Any]) -> bool:
    """Nothing failed at the load that the server accepts; at the other some were refused, with RetryInfo, and none
    failed otherwise."""
    over = result["overloaded"]
    is_refused_well = over["refused"] > 0 and not over["failed_otherwise"] and not over["without_retry_info"]
    return not result["accepted"]["failed"] and is_refused_well


def limits_of(address: str) -> dict[str, int]:
    """How many requests the server runs, and lets wait, at once."""
    client = Client(address)
    try:
        limits = client.info().limits
    finally:
        client.close()
    return {"max_num_seqs": limits.max_num_seqs, "max_waiting": limits.max_waiting}


def _load(results: Results) -> dict[str, Any]:
    names = ("users", "seconds", "requests", "requests_per_second", "output_tokens_per_second")
    times = {f"{key}_ms": _milliseconds(results[f"{key}_seconds"]) for key in ("ttft", "tpot")}
    return {name: results[name] for name in names} | times


def _milliseconds(seconds: Mapping[str, float]) -> dict[str, float]:
    return {share: round(value * 1000, 3) for share, value in seconds.items()}


def _say(line: str) -> None:
    print(line, file=sys.stderr)
