"""`python -m loadtest overload`: what a server does at the load that it accepts, and at several times that load.

The load that it accepts is as many users as it runs sequences at once: every place is taken and nothing waits. The
other is an open load of `factor` times the requests a second that came of it: whoever is refused does not come again.
"""

import json
import sys
import tempfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.live import surroundings
from loadtest.compare import warm_up
from loadtest.cpu import cores, cpu_seconds
from loadtest.errors import LoadTestFailed
from loadtest.play import Results, play
from loadtest.scenario import Scenario, read_scenario
from loadtest.serving import Server, publish_for, serving
from loadtest.streams import Client
from server.base.resolve import resolve_base

REFUSAL = "RESOURCE_EXHAUSTED SERVER_BUSY"

# A queue of a few seconds, where the server is the measurement's own.
OWN_SERVER = ("--max-num-seqs", "16", "--max-waiting", "16")


def overload(options: Namespace) -> int:
    """Play both loads, as often as asked for, and print one JSON line; 1 if a request failed at the load that the
    server accepts, or at the other one otherwise than refused with RetryInfo; else 0. Times decide nothing. Raises
    LoadTestFailed."""
    scenario = read_scenario(options.scenario).at(seconds=options.seconds)
    server: Server | None = None
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
        users = scenario.at(users=limits["max_num_seqs"])
        rounds = [
            one_round(users, scenario, options.factor, Player(address, server, options.processes))
            for _ in range(options.rounds)
        ]
    line = {"scenario": scenario.name, "server": command, **limits, "factor": options.factor, **together(rounds)}
    text = json.dumps(line | surroundings())
    print(text)
    if options.json:
        with Path(options.json).open("a") as file:
            file.write(text + "\n")
    return int(not all(is_as_promised(found) for found in rounds))


@dataclass(frozen=True, slots=True)
class Player:
    """Plays on the server at `address`; `server` is that one, where it is of our own."""

    address: str
    server: Server | None
    processes: int

    def __call__(self, scenario: Scenario) -> tuple[Results, dict[str, float]]:
        """What was measured, and the cores that it kept busy, by whose work it was; none of another's server."""
        before = None if self.server is None else cpu_seconds(self.server)
        results = play(scenario, self.address, quiet=True, processes=self.processes)
        return results, {} if self.server is None or before is None else cores(before, cpu_seconds(self.server))


def one_round(users: Scenario, scenario: Scenario, factor: float, player: Player) -> dict[str, Any]:
    """Both loads, one after the other. Raises LoadTestFailed when the first is none."""
    _say(f"the load that it accepts for {users.seconds} s")
    accepted, accepted_cores = player(users)
    rate = factor * accepted["requests_per_second"]
    if not rate:
        raise LoadTestFailed("no request ended at the load that the server accepts; give it more --seconds")
    _say(f"{rate:.1f} requests a second for {scenario.seconds} s")
    overloaded, overloaded_cores = player(scenario.at(rate=rate))
    found = compared(accepted, overloaded)
    found["accepted"]["cores"], found["overloaded"]["cores"] = accepted_cores, overloaded_cores
    return found


def together(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The rounds, and of their ratios the medians: a machine's mood changes from one minute to the next."""
    shares = [share for share in rounds[0]["tpot_ratio"] if all(share in found["tpot_ratio"] for found in rounds)]
    ratios = {share: round(median(found["tpot_ratio"][share] for found in rounds), 3) for share in shares}
    return {"tpot_ratio": ratios, "rounds": rounds}


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
            "refusal_ms": _milliseconds(overloaded["failed_seconds"].get(REFUSAL, {})),
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
