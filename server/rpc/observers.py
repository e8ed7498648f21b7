"""Who hears of every call: the log, and a collector of traces where one is configured.

Standard variables say where traces go: OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_EXPORTER_OTLP_TRACES_ENDPOINT or
OTEL_TRACES_EXPORTER=otlp turn them on, OTEL_TRACES_EXPORTER=none and OTEL_SDK_DISABLED=true off; all others are
OpenTelemetry's own business: https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import TYPE_CHECKING

from server.config import ServeConfig
from server.errors import ConfigError
from server.rpc.record import Observer
from server.rpc.request_log import RequestLog

if TYPE_CHECKING:
    from server.rpc.tracing import Tracing

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")

# What a collector gets to take the last spans.
CLOSE_SECONDS = 3.0

_logger = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def observing(config: ServeConfig, environ: Mapping[str, str]) -> AsyncGenerator[Sequence[Observer], None]:
    """The observers of one server. At the end, traces that are still here are sent. Raises ConfigError."""
    tracing = open_tracing(config.otlp_endpoint, config.base_name, environ)
    if tracing is None:
        yield (RequestLog(),)
        return
    try:
        yield (tracing, RequestLog())  # the log's lines have the trace's id
    finally:
        await asyncio.to_thread(tracing.close, CLOSE_SECONDS)


def open_tracing(endpoint: str | None, base_name: str, environ: Mapping[str, str]) -> "Tracing | None":
    """None where no traces are asked for; then OpenTelemetry is not imported. Raises ConfigError when it is asked for
    by `endpoint` and not installed."""
    if environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    if endpoint is None and not _is_configured(environ):
        return None
    protocol = next((environ[name] for name in PROTOCOLS if environ.get(name)), "grpc")
    if protocol not in ("grpc", "http/protobuf"):
        raise ConfigError(f"OTEL_EXPORTER_OTLP_PROTOCOL: {protocol!r} is neither grpc nor http/protobuf")
    try:
        from server.rpc.tracing import Tracing, otlp_exporter

        return Tracing(otlp_exporter(endpoint, protocol), base_name)
    except ModuleNotFoundError as error:
        message = f"traces need the package {error.name}; pip install 'lorikeet[tracing]'"
        if endpoint is not None:
            raise ConfigError(f"otlp-endpoint: {message}") from error
        _logger.warning("no traces are sent, though the environment names a collector: %s", message)
        return None


def _is_configured(environ: Mapping[str, str]) -> bool:
    exporter = environ.get("OTEL_TRACES_EXPORTER", "")
    if exporter not in ("", "otlp", "none"):
        raise ConfigError(f"OTEL_TRACES_EXPORTER: {exporter!r} is neither otlp nor none")
    return exporter == "otlp" or (not exporter and any(environ.get(name) for name in ENDPOINTS))
