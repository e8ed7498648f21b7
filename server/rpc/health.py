"""grpc.health.v1: SERVING while the engine is ready, NOT_SERVING while it loads, is lost, or the server stops."""

import asyncio
from collections.abc import Sequence

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

SERVICE_NAME: str = health.SERVICE_NAME


class Health:
    """The state of the server ("") and of each of its services: the same for all."""

    def __init__(self, services: Sequence[str]) -> None:
        self._servicer = health.aio.HealthServicer()
        self._services = (health.OVERALL_HEALTH, *services)
        self._ready = False
        self._changed = asyncio.Event()
        self._changed.set()

    def add_to(self, server: grpc.aio.Server) -> None:
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    def set_ready(self, ready: bool) -> None:
        """To be called on the event loop; `follow` makes it visible."""
        self._ready = ready
        self._changed.set()

    async def follow(self) -> None:
        """Publishes every change, for ever."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            await self._publish()

    async def shut_down(self) -> None:
        """NOT_SERVING from now on, whatever comes."""
        await self._servicer.enter_graceful_shutdown()

    async def _publish(self) -> None:
        response = health_pb2.HealthCheckResponse
        status = response.SERVING if self._ready else response.NOT_SERVING
        for service in self._services:
            await self._servicer.set(service, status)
