"""A server of the load test's own, on loopback, with random adapters, and what its metrics page says."""

import json
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from adapters.store import AdapterStore
from loadtest.errors import LoadTestFailed
from loadtest.scenario import Scenario
from server.base.resolve import BaseModel

STOP_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Server:
    """One that is ready. `command` is what a person would type."""

    port: int
    metrics_port: int
    command: str

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def samples(self) -> list[Sample]:
        """All that its metrics page has now."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=30) as page:
            text = page.read().decode()
        return [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def memory(self) -> dict[str, int]:
        """Bytes by what they are for: the device's by kind, the processes' resident, the GPUs' in use."""
        found: dict[str, int] = {}
        for sample in self.samples():
            label = MEMORY_SERIES.get(sample.name)
            if label is not None:
                key = f"{label}{sample.labels.get('kind') or sample.labels.get('process') or ''}"
                found[key] = found.get(key, 0) + int(sample.value)
        return found


MEMORY_SERIES = {
    "lorikeet_memory_bytes": "",
    "lorikeet_process_resident_memory_bytes": "resident ",
    "lorikeet_gpu_memory_used_bytes": "gpu in use",
}


@contextmanager
def serving(base: BaseModel, store: Path, *options: str) -> Iterator[Server]:
    """`lorikeet serve` until the block ends. Raises LoadTestFailed with its last line when it does not start."""
    given = ["--base", str(base.path), "--store", str(store), *options]
    command = [sys.executable, "-m", "server.cli", "serve", "--json", *given, "--port", "0", "--metrics-port", "0"]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert process.stdout is not None, "the server's output is a pipe"
            line = process.stdout.readline()
            if not line:
                process.wait(STOP_SECONDS)
                log.seek(0)
                said = [text for text in log.read().splitlines() if text.strip()]
                raise LoadTestFailed(f"the server did not start: {said[-1] if said else 'it said nothing'}")
            ready = json.loads(line)
            shown = f"lorikeet serve --base {base.name} --store STORE {' '.join(options)}".strip()
            yield Server(ready["port"], ready["metrics_port"], shown)
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()


def publish_for(scenario: Scenario, base: BaseModel, folder: Path) -> Path:
    """A store with the random adapters that a scenario asks for; two versions of each where it moves labels."""
    from benchmarks.random_adapters import write_random_adapters  # torch, which Locust's process has no need of

    store = AdapterStore(folder / "store")
    count = 0 if scenario.adapters.popularity == "base" else scenario.adapters.count
    versions = 2 if scenario.swap is not None and scenario.swap.action == "rollback" else 1
    made = write_random_adapters(base.spec, folder / "made", count * versions, scenario.adapters.rank)
    for i, path in enumerate(made):
        name = f"a{i % count:04d}"
        store.publish(path, name, base_digest=base.digest, base_name=base.name, linears=base.spec.linears())
    return store.root
