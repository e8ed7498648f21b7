"""The life of a serving process: listen, load, serve, drain, end."""

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_reflection.v1alpha import reflection

from adapters.errors import StoreUnavailable
from adapters.registry import AdapterEntry
from server.base.resolve import BaseModel
from server.config import ServeConfig
from server.metrics import Metrics, MetricsPage
from server.rpc import health, service_adapters, service_inference, service_server
from server.rpc.backend import Backend, Catalog
from server.rpc.call import Calls
from server.rpc.handlers import UnknownMethods, service_handler
from server.rpc.listener import listen
from server.rpc.record import Observer

# Time for the last messages of calls that have ended, and for health watchers, to leave the process.
FLUSH_SECONDS = 0.3

# Adapters on the status page, and how long the store may take to list them.
MAX_LISTED = 1000
LISTING_SECONDS = 5.0

SERVICES = (service_inference.DESCRIPTOR, service_adapters.DESCRIPTOR, service_server.DESCRIPTOR)


async def run(
    config: ServeConfig,
    base: BaseModel,
    backend: Backend,
    catalog: Catalog,
    metrics: Metrics,
    observers: Sequence[Observer] = (),
    *,
    on_started: Callable[[int, int], None],
) -> None:
    """`serve` with its parts given; the observers hear of each call. Listens (not yet SERVING) before the backend
    starts: a port in use is found before a model is loaded, and probes are answered meanwhile."""
    calls = Calls(metrics, observers, keeps_texts=config.log_prompts, max_message_bytes=config.max_message_bytes)
    checks = health.Health([service.full_name for service in SERVICES])
    loop = asyncio.get_running_loop()

    def published() -> Sequence[AdapterEntry]:
        """For the status page's thread. Raises what the catalog raises, StoreUnavailable when that takes too long."""
        listing = asyncio.run_coroutine_threadsafe(catalog.list(MAX_LISTED, ""), loop)
        try:
            return listing.result(LISTING_SECONDS)[0]
        except TimeoutError:
            raise StoreUnavailable(f"no answer within {LISTING_SECONDS:g} s") from None

    page = MetricsPage(metrics, config.metrics_host, config.metrics_port, published)
    try:
        server, port = listen(config.host, config.port, config.max_message_bytes)
        checks.add_to(server)
        _add_services(server, config, base, backend, catalog, calls)
        backend.on_ready_change(checks.set_ready)
        await server.start()
        following = asyncio.create_task(checks.follow())
        with _signals() as signals:
            try:
                if await _unless(signals.first, backend.start()):
                    checks.set_ready(backend.ready)
                    on_started(port, page.port)
                    await signals.first.wait()
                    await checks.shut_down()
                    calls.drain()
                    await _drain(backend, calls, config.grace, signals.second)
            finally:
                following.cancel()
                await backend.stop(0.0)
                await server.stop(FLUSH_SECONDS)
    finally:
        page.close()


def _add_services(
    server: grpc.aio.Server,
    config: ServeConfig,
    base: BaseModel,
    backend: Backend,
    catalog: Catalog,
    calls: Calls,
) -> None:
    inference = service_inference.InferenceService(backend, config.stall_timeout)
    adapters = service_adapters.AdapterService(backend, catalog)
    info = service_server.ServerService(config, base, backend, calls)
    server.add_generic_rpc_handlers(
        (
            service_handler(service_inference.DESCRIPTOR, inference.methods, calls),
            service_handler(service_adapters.DESCRIPTOR, adapters.methods, calls),
            service_handler(service_server.DESCRIPTOR, info.methods, calls, while_draining=True),
        )
    )
    if config.reflection:
        names = [service.full_name for service in SERVICES]
        reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
    server.add_generic_rpc_handlers((UnknownMethods(calls),))


async def _drain(backend: Backend, calls: Calls, grace: float, hurry: asyncio.Event) -> None:
    """Let the backend stop within `grace` seconds and, as long, the calls send what they got; until `hurry`."""
    deadline = time.monotonic() + grace
    if await _unless(hurry, backend.stop(grace)):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(deadline - time.monotonic()):
                await _unless(hurry, calls.idle())


async def _unless(event: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Run `work` unless `event` comes first, which cancels it. Whether it ran to its end."""
    task = asyncio.ensure_future(work)
    waiting = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait((task, waiting), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            await task  # raises what it raised
            return True
        return False
    finally:
        for unfinished in (task, waiting):
            unfinished.cancel()
        await asyncio.wait((task, waiting))


@dataclass(frozen=True, slots=True)
class Signals:
    """Set by the first and the second SIGTERM or SIGINT."""

    first: asyncio.Event
    second: asyncio.Event


@contextlib.contextmanager
def _signals() -> Iterator[Signals]:
    """Signals as events while the block runs; a third one ends the process as if nobody listened."""
    loop = asyncio.get_running_loop()
    signals = Signals(asyncio.Event(), asyncio.Event())
    kinds = (signal.SIGTERM, signal.SIGINT)

    def release() -> None:
        for kind in kinds:
            loop.remove_signal_handler(kind)

    def received() -> None:
        if not signals.first.is_set():
            signals.first.set()
        else:
            signals.second.set()
            release()

    for kind in kinds:
        loop.add_signal_handler(kind, received)
    try:
        yield signals
    finally:
        release()
