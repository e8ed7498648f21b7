"""Where Prometheus reads the metrics, and people the status."""

import logging
import socket
import sys
import threading
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import make_wsgi_app

from server.errors import ConfigError
from server.metrics.history import History
from server.metrics.metrics import Metrics
from server.metrics.status import Published, StatusPage

# Nothing may be loaded by the page, and nothing run in it.
_HEADERS = [
    ("Content-Type", "text/html; charset=utf-8"),
    ("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'"),
    ("Cache-Control", "no-store"),
]

# How long a connection may say nothing, or not read, in seconds: each takes a thread.
PATIENCE = 30.0

_logger = logging.getLogger(__name__)

_App = Callable[[dict[str, Any], Any], Iterable[bytes]]


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke, or was let go, is nobody's error."""
        if not isinstance(sys.exception(), OSError):
            _logger.exception("the metrics page failed")


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = PATIENCE

    def log_message(self, format: str, *args: Any) -> None:
        """Looks are not logged."""


class MetricsPage:
    """The metrics at /metrics and the status page at /, on a port of their own, from threads of their own."""

    def __init__(self, metrics: Metrics, host: str, port: int, published: Published = lambda: ()) -> None:
        """`published` lists the adapters; a thread of the page calls it. Raises ConfigError when the port cannot be
        had; port 0 takes any free one."""
        self._history = History(metrics.moment)
        app = _routes(make_wsgi_app(metrics.registry), StatusPage(metrics, self._history, published))
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            kind = _Server6 if family == socket.AF_INET6 else _Server
            self._server = make_server(host, port, app, kind, _Handler)
        except OSError as error:
            reason = error.strerror or str(error)
            raise ConfigError(f"metrics_port: cannot listen on {host} port {port}: {reason}") from error
        threading.Thread(target=self._server.serve_forever, name="metrics-page", daemon=True).start()
        self._history.start()

    @property
    def port(self) -> int:
        return int(self._server.server_port)

    def close(self) -> None:
        """Returns at once; the port is free within half a second, or when the process ends."""
        self._history.stop()
        threading.Thread(target=self._close, daemon=True).start()

    def _close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _routes(metrics: _App, status: StatusPage) -> _App:
    def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environ["PATH_INFO"] != "/" or environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return metrics(environ, start_response)
        page = status.render().encode()
        start_response("200 OK", [*_HEADERS, ("Content-Length", str(len(page)))])
        return [page] if environ["REQUEST_METHOD"] == "GET" else []

    return app
