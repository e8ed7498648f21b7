"""`lorikeet health`, against grpc's own health service."""

import threading
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import HealthServicer

from server.cli import main
from server.cli.exits import ExitCode

UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Watched(HealthServicer):
    """Knows when somebody has begun to watch."""

    def __init__(self) -> None:
        super().__init__()
        self.watching = threading.Event()

    def Watch(self, *arguments: Any) -> Any:
        states = super().Watch(*arguments)
        self.watching.set()
        return states


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    servicer = Watched()
    wire = grpc.server(futures.ThreadPoolExecutor(2))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, wire)
    monkeypatch.setenv("LORIKEET_SERVER", f"127.0.0.1:{wire.add_insecure_port('127.0.0.1:0')}")
    wire.start()
    yield servicer
    wire.stop(None).wait()


def test_serving_is_success(server: Watched, capsys: pytest.CaptureFixture[str]) -> None:
    server.set("", SERVING)
    assert main(["health"]) == ExitCode.OK
    assert capsys.readouterr().out == "SERVING\n"


@pytest.mark.parametrize("state", [NOT_SERVING, UNKNOWN])
def test_not_serving_is_unavailable_at_once(server: Watched, state: int, capsys: pytest.CaptureFixture[str]) -> None:
    server.set("", state)
    assert main(["health", "--timeout", "60"]) == ExitCode.UNAVAILABLE
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1


def test_waiting_ends_when_it_serves(server: Watched, capsys: pytest.CaptureFixture[str]) -> None:
    server.set("", NOT_SERVING)

    def start() -> None:
        if server.watching.wait(60):
            server.set("", SERVING)

    starting = threading.Thread(target=start)
    starting.start()
    assert main(["health", "--wait", "--timeout", "60"]) == ExitCode.OK
    starting.join()
    assert capsys.readouterr().out == "SERVING\n"


def test_waiting_has_an_end(server: Watched) -> None:
    server.set("", NOT_SERVING)
    assert main(["health", "--wait", "--timeout", "0.2"]) == ExitCode.TIMEOUT


def test_nobody_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["health", "--server", "127.0.0.1:1"]) == ExitCode.UNAVAILABLE
    assert "no server can be reached at 127.0.0.1:1" in capsys.readouterr().err
    assert main(["health", "--server", "127.0.0.1:1", "--wait", "--timeout", "0.2"]) == ExitCode.TIMEOUT
