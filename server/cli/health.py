"""`lorikeet health`: whether a server serves, by grpc.health.v1; for probes, and for scripts that wait for a start."""

from typing import Annotated, Any

import typer

from server.cli.exits import ExitCode, Failure
from server.cli.options import DEFAULT_SERVER, Debug, Server, Timeout


def health(
    server: Server = DEFAULT_SERVER,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until it serves, for --timeout at most.")] = False,
    timeout: Timeout = 10.0,
    debug: Debug = False,
) -> None:
    """Ask a server whether it serves: exit code 0, or 6 while it starts, stops or has lost its engine."""
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from server.cli.client import connect

    with connect(server) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)  # whose types leave Watch out
        for state in stub.Watch(health_pb2.HealthCheckRequest(), timeout=timeout, wait_for_ready=wait):
            if state.status == health_pb2.HealthCheckResponse.SERVING:
                print("SERVING")
                return
            if not wait:
                name = health_pb2.HealthCheckResponse.ServingStatus.Name(state.status)
                raise Failure(f"{server} answers, and does not serve ({name})", ExitCode.UNAVAILABLE)
    raise Failure(f"{server} ended before it served", ExitCode.UNAVAILABLE)
