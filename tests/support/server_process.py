"""`lorikeet serve` as a process of its own, on free ports."""

import json
import os
import select
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import psutil
from prometheus_client.parser import text_string_to_metric_families

REPOSITORY = Path(__file__).parents[2]


def command(*arguments: str) -> list[str]:
    """A `lorikeet` command line."""
    return [sys.executable, "-m", "server.cli", *arguments]


@dataclass(slots=True)
class ServerProcess:
    """A server that has said it is ready. `log` is what it and its engine wrote on stderr."""

    process: subprocess.Popen[bytes]
    log: Path
    port: int
    metrics_port: int

    @classmethod
    def start(
        cls, directory: Path, base: Path, store: Path | str, *options: str, timeout: float = 120.0
    ) -> "ServerProcess":
        """Start with one thread and wait until it is ready; `directory` takes its log."""
        arguments = ["serve", "--json", "--base", str(base), "--store", str(store), "--device", "cpu"]
        arguments += ["--port", "0", "--metrics-port", "0", "--threads", "1", *options]
        return cls.launch(command(*arguments), directory, dict(os.environ), timeout)

    @classmethod
    def launch(
        cls, whole: list[str], directory: Path, environment: dict[str, str], timeout: float = 120.0
    ) -> "ServerProcess":
        """`start` with a whole command line, which has --json."""
        log = directory / "server.log"
        with log.open("wb") as stderr:
            process = subprocess.Popen(whole, stdout=subprocess.PIPE, stderr=stderr, cwd=REPOSITORY, env=environment)
        try:
            ready = json.loads(_first_line(process, timeout))
        except BaseException:
            process.kill()
            process.wait()
            print(log.read_text(errors="replace"), file=sys.stderr)
            raise
        assert ready["event"] == "ready"
        return cls(process, log, ready["port"], ready["metrics_port"])

    def engine(self) -> psutil.Process:
        """The engine process."""
        children = psutil.Process(self.process.pid).children()
        (engine,) = [child for child in children if "server.engine.process" in child.cmdline()]
        return engine

    def metrics(self) -> dict[str, float]:
        """The samples of the Prometheus page that have no labels by name, those with labels summed."""
        url = f"http://127.0.0.1:{self.metrics_port}/metrics"
        with urllib.request.urlopen(url, timeout=60) as response:
            page = response.read().decode()
        samples: dict[str, float] = {}
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                samples[sample.name] = samples.get(sample.name, 0.0) + sample.value
        return samples

    def is_idle(self) -> bool:
        """Nothing runs or waits, and no page, row or adapter is held."""
        metrics = self.metrics()
        names = ("requests_running", "requests_waiting", "kv_cache_usage_ratio", "adapter_leases")
        return all(metrics[f"lorikeet_{name}"] == 0 for name in names)

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def stop(self) -> int:
        """End it in order, by force after a while; its exit code."""
        if self.process.poll() is None:
            self.terminate()
        try:
            return self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()
        finally:
            if self.process.stdout is not None:
                self.process.stdout.close()


def _first_line(process: subprocess.Popen[bytes], timeout: float) -> bytes:
    assert process.stdout is not None
    deadline, line = time.monotonic() + timeout, b""
    while not line.endswith(b"\n"):
        remaining = deadline - time.monotonic()
        assert remaining > 0, f"the server was not ready within {timeout} s"
        if select.select([process.stdout], [], [], remaining)[0]:
            piece = os.read(process.stdout.fileno(), 4096)
            assert piece, f"the server ended before it was ready, with exit code {process.wait()}"
            line += piece
    return line
