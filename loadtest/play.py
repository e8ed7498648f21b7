"""A scenario, played by one or several Locust processes against a server, and what they measured together."""

import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from loadtest.errors import LoadTestFailed
from loadtest.records import Run, summary
from loadtest.scenario import Closed, Open, Scenario

Results = Mapping[str, Any]

# Beyond what a run has to take: starting Python, and what ends late.
SLACK_SECONDS = 60.0


def play(
    scenario: Scenario,
    address: str,
    *,
    mode: str = "",
    csv: str | None = None,
    quiet: bool = False,
    processes: int = 1,
) -> Results:
    """Locust against the server at `address`. One process takes one core and, with it, some thousand messages a second:
    `processes` share the users (or the rate). What they write is on the terminal unless `quiet`; `csv` is the prefix
    of Locust's files, with -1, -2, … for those of further processes. Raises LoadTestFailed when one ends without
    results, or does not end."""
    shares = split(scenario, processes)
    with tempfile.TemporaryDirectory() as scratch:
        files = [Path(scratch) / f"records-{i}.json" for i in range(len(shares))]
        commands = []
        for i, (share, file) in enumerate(zip(shares, files, strict=True)):
            played = Path(scratch) / f"scenario-{i}.json"
            played.write_bytes(msgspec.json.encode(share))
            options = ["--records", str(file), "--share", f"{i}/{len(shares)}", "--together", scratch]
            options += ["--mode", mode] if mode else []
            options += ["--csv", csv if i == 0 else f"{csv}-{i}"] if csv else []
            commands.append(locust_command(share, played, address, options))
        _run_all(commands, files, scenario.seconds + 2 * scenario.timeout + SLACK_SECONDS, quiet)
        return summary([msgspec.json.decode(file.read_bytes(), type=Run) for file in files], scenario)


def split(scenario: Scenario, processes: int) -> list[Scenario]:
    """What each process plays; fewer processes where there are fewer users, or requests at once. One alone does the hot
    swaps."""
    arrivals = scenario.arrivals
    whole = arrivals.users if isinstance(arrivals, Closed) else arrivals.most_in_flight
    processes = min(processes, whole)
    shares = [whole // processes + (i < whole % processes) for i in range(processes)]
    parts: list[Closed | Open]
    if isinstance(arrivals, Closed):
        parts = [msgspec.structs.replace(arrivals, users=share) for share in shares]
    else:
        rate = arrivals.rate / processes
        parts = [msgspec.structs.replace(arrivals, rate=rate, most_in_flight=share) for share in shares]
    alone = [scenario.swap, *[None] * (processes - 1)]
    return [
        msgspec.structs.replace(scenario, arrivals=part, swap=swap) for part, swap in zip(parts, alone, strict=True)
    ]


def locust_command(scenario: Scenario, file: Path, address: str, options: Sequence[str]) -> list[str]:
    """Headless, until the scenario's seconds are over and what is under way then has ended, or its timeout."""
    users = scenario.arrivals.users if isinstance(scenario.arrivals, Closed) else 1
    command = [sys.executable, "-m", "locust", "-f", str(Path(__file__).parent / "locustfile.py"), "--headless"]
    command += ["--host", address, "--scenario", str(file), "--users", str(users), "--spawn-rate", str(users)]
    stop = str(math.ceil(scenario.timeout))  # Locust knows whole seconds alone
    return [*command, "--run-time", f"{scenario.seconds}s", "--stop-timeout", stop, *options]


def meet(folder: Path, index: int, count: int, timeout: float = SLACK_SECONDS) -> None:
    """Wait until all `count` processes of one load are here, so that one's run is not over when another's begins.
    Raises LoadTestFailed."""
    (folder / f"here-{index}").touch()
    deadline = time.monotonic() + timeout
    while (here := sum(1 for _ in folder.glob("here-*"))) < count:
        if time.monotonic() > deadline:
            raise LoadTestFailed(f"{here} of {count} processes of Locust were there after {timeout:g} s")
        time.sleep(0.01)


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


def _run_all(commands: Sequence[Sequence[str]], files: Sequence[Path], timeout: float, quiet: bool) -> None:
    with tempfile.TemporaryFile() as log:
        output = log if quiet else None
        running = [subprocess.Popen(command, stdout=output, stderr=output) for command in commands]
        try:
            codes = [process.wait(timeout) for process in running]
        except subprocess.TimeoutExpired as error:
            raise LoadTestFailed(f"Locust has not ended after {timeout:g} s") from error
        finally:
            for process in running:
                process.kill()
                process.wait()
        for code, file in zip(codes, files, strict=True):
            if not file.exists():
                if quiet:
                    log.seek(0)
                    sys.stderr.buffer.write(log.read())
                raise LoadTestFailed(f"Locust ended with code {code} and no results; what it wrote says why")
