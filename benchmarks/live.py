"""A server with random adapters, as a process of its own on loopback, and what a timing was made on."""

import json
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from adapters.store import AdapterStore, Version
from benchmarks.random_adapters import write_random_adapters
from server.base.resolve import BaseModel

ROOT = Path(__file__).parents[1]


def publish_random(base: BaseModel, scratch: Path, count: int, rank: int) -> list[Version]:
    """Publishes a0, a1, … in the store `scratch`/store; needs twice their room on the disk for a moment."""
    store = AdapterStore(scratch / "store")
    made = write_random_adapters(base.spec, scratch / "made", count, rank)
    versions = [
        store.publish(path, path.name, base_digest=base.digest, base_name=base.name, linears=base.spec.linears())
        for path in made
    ]
    shutil.rmtree(scratch / "made")
    return versions


@contextmanager
def serving(store: Path, model: str | None, *options: str) -> Iterator[int]:
    """`lorikeet serve` until the block ends; its port."""
    command = [sys.executable, "-m", "server.cli", "serve", "--json", "--store", str(store), "--port", "0"]
    command += ["--metrics-port", "0", "--log-level", "warning", *options, *(["--base", model] if model else [])]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None, "the server's output is a pipe"
        port: int = json.loads(server.stdout.readline())["port"]
        yield port
    finally:
        server.terminate()
        server.wait(60)


def adapter_bytes(base: BaseModel, rank: int, itemsize: int = 2) -> int:
    """What an adapter of every linear layer takes in memory."""
    return sum(map(sum, base.spec.linears().values())) * rank * itemsize


def surroundings() -> dict[str, object]:
    """What a timing was made on: machine, versions, commit, and how busy it was with other things."""
    model = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    return {
        "cpu": model or platform.processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": version("torch"),
        "lorikeet": version("lorikeet"),
        "commit": _commit(),
    }


def quantile(values: Sequence[float], share: float) -> float:
    """The least value that `share` of them are not above, of at least one."""
    ordered = sorted(values)
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)]


def _commit() -> str:
    """Of this repository; empty where there is none, or no git."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
