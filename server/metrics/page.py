"""Where Prometheus reads the metrics."""

import threading

from prometheus_client import start_http_server

from server.errors import ConfigError
from server.metrics.metrics import Metrics


class MetricsPage:
    """The metrics over HTTP, on a port of their own, from a thread of their own."""

    def __init__(self, metrics: Metrics, host: str, port: int) -> None:
        """Raises ConfigError when the port cannot be had; port 0 takes any free one."""
        try:
            self._server, _ = start_http_server(port, host, metrics.registry)
        except OSError as error:
            reason = error.strerror or str(error)
            raise ConfigError(f"metrics_port: cannot listen on {host} port {port}: {reason}") from error

    @property
    def port(self) -> int:
        return int(self._server.server_port)

    def close(self) -> None:
        """Returns at once; the port is free within half a second, or when the process ends."""
        threading.Thread(target=self._close, daemon=True).start()

    def _close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
