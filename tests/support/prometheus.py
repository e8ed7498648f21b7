"""A Prometheus of the test's own, on a free port of loopback."""

import json
import re
import subprocess
import time
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.server_process import REPOSITORY
from tests.support.waiting import eventually

DEPLOY = REPOSITORY / "deploy"

CONFIG = """
global: {{ scrape_interval: 1s, evaluation_interval: 1s }}
rule_files: ["{rules}/*.yml"]
scrape_configs:
  - job_name: lorikeet
    static_configs: [{{ targets: {targets} }}]
"""


@dataclass(slots=True)
class Prometheus:
    """One that runs."""

    process: subprocess.Popen[bytes]
    url: str

    @classmethod
    def start(cls, directory: Path, targets: list[str]) -> "Prometheus":
        """Scrapes `targets` (host:port) each second, and evaluates the rules that are committed as often."""
        config = directory / "prometheus.yml"
        config.write_text(CONFIG.format(rules=DEPLOY / "prometheus/rules", targets=json.dumps(targets)))
        command = ["prometheus", f"--config.file={config}", "--web.listen-address=127.0.0.1:0"]
        command.append(f"--storage.tsdb.path={directory / 'data'}")
        told = directory / "prometheus.log"
        with told.open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)

        def port() -> str | None:
            assert process.poll() is None, told.read_text()
            found = re.search(r'"Listening on".* address=127\.0\.0\.1:(\d+)', told.read_text())
            return found and found[1]

        try:
            started = cls(process, f"http://127.0.0.1:{eventually(port, 'Prometheus tells its port')}")
            eventually(started._is_ready, f"Prometheus is ready; see {told}")
        except BaseException:
            process.kill()
            process.wait()
            raise
        return started

    def query(self, expression: str) -> list[dict[str, Any]]:
        """What an instant query finds now: [{"metric": labels, "value": [time, text]}]."""
        found: list[dict[str, Any]] = self._get("query", query=expression)["result"]
        return found

    def over_time(self, expression: str) -> list[dict[str, Any]]:
        """What it finds in the last five minutes, each second: [{"metric": labels, "values": [[time, text], …]}]."""
        now = time.time()
        found: list[dict[str, Any]] = self._get(
            "query_range", query=expression, start=f"{now - 300}", end=f"{now}", step="1"
        )["result"]
        return found

    def targets(self) -> list[dict[str, Any]]:
        """Each with its "health" and "lastError"."""
        found: list[dict[str, Any]] = self._get("targets")["activeTargets"]
        return found

    def rules(self) -> list[dict[str, Any]]:
        """Each with its "health" and "lastError"."""
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=60)

    def _get(self, what: str, **fields: str) -> Any:
        asked = f"{self.url}/api/v1/{what}?{urllib.parse.urlencode(fields)}"
        with urllib.request.urlopen(asked, timeout=30) as answer:
            return json.loads(answer.read())["data"]

    def _is_ready(self) -> bool:
        assert self.process.poll() is None, "Prometheus has ended"
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:  # not there yet, or slow to answer
            return False
