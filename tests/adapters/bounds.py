"""Has each adapter in a directory of them refused by a process of its own, and tells what that cost.

Run as a script with a directory: prints one JSON object a subdirectory, {"name", "outcomes"}, where each outcome, of
reading and of publishing, is {"kind", "faults", "seconds" of CPU, "bytes" of memory}.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adapters.errors import InvalidAdapter
from adapters.layout import read_layout
from adapters.store import AdapterStore
from tests.adapters.builders import LINEARS, PUBLISH

SECONDS, BYTES = 1, 200 << 20
_TRIES = 3  # of one that took too long: on a busy machine its share of a core is worth less


def _outcome(attempt: Callable[[], object]) -> dict[str, Any]:
    """What one attempt came to, in this process."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    kind, faults = "taken", tuple[str, ...]()
    try:
        attempt()
    except InvalidAdapter as error:
        kind, faults = type(error).__name__, tuple(error.faults)
    except Exception as error:  # noqa: BLE001  (told, and judged elsewhere)
        kind, faults = type(error).__name__, (str(error),)
    seconds = time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"kind": kind, "faults": faults, "seconds": seconds, "bytes": peak * 1024}  # KiB on Linux


def _apart(attempt: Callable[[], object]) -> dict[str, Any]:
    """The same, in a child that cannot have much more memory, and dies when it goes on and on."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (size + BYTES, size + BYTES))
        resource.setrlimit(resource.RLIMIT_CPU, (20 * SECONDS, 20 * SECONDS))
        with os.fdopen(writing, "w") as pipe:
            json.dump(_outcome(attempt), pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        found = pipe.read()
    os.waitpid(child, 0)
    return json.loads(found) if found else {"kind": "died", "faults": (), "seconds": 0.0, "bytes": 0}


def _cheapest(attempt: Callable[[], object]) -> dict[str, Any]:
    outcomes = [_apart(attempt)]
    while outcomes[-1]["seconds"] > SECONDS and len(outcomes) < _TRIES:
        outcomes.append(_apart(attempt))
    return min(outcomes, key=lambda outcome: outcome["seconds"])


def main(directory: Path) -> None:
    stores = directory.parent / "stores"
    for path in sorted(directory.iterdir()):
        outcomes = {
            "read": _cheapest(lambda path=path: read_layout(path, LINEARS)),
            "publish": _cheapest(lambda path=path: AdapterStore(stores / path.name).publish(path, "a", **PUBLISH)),
        }
        print(json.dumps({"name": path.name, "outcomes": outcomes}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
