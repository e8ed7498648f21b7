"""Where a serving process is put together: metrics, front end, gRPC."""

import contextlib
import os
import resource
from collections.abc import Callable

from adapters.registry import AdapterRegistry
from server.base.resolve import BaseModel
from server.config import ServeConfig
from server.frontend.frontend import Frontend
from server.metrics import DroppedLogLines, Metrics
from server.rpc.lifecycle import run
from server.rpc.observers import observing


async def serve(
    config: ServeConfig,
    base: BaseModel,
    registry: AdapterRegistry,
    *,
    on_started: Callable[[int, int], None],
    dropped_log_lines: Callable[[], int] = lambda: 0,
) -> None:
    """Serve until SIGTERM or SIGINT, then let what runs finish within `config.grace` seconds; a second signal ends
    at once. `on_started` is called with the gRPC and the metrics port when requests are taken; `dropped_log_lines` says
    how many lines the log has lost so far.

    Raises ConfigError for a port or a collector that cannot be had, EngineUnavailable when the engine does not start.
    """
    _allow_many_files()
    metrics = Metrics()
    metrics.registry.register(DroppedLogLines(dropped_log_lines))
    backend = Frontend(config, base, registry, metrics)
    async with observing(config, os.environ) as observers:
        await run(config, base, backend, backend.catalog, metrics, observers, on_started=on_started)


def _allow_many_files() -> None:
    """As many open files as this process may have: every connection is one, and every adapter in memory."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
