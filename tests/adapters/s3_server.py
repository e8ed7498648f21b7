"""A real S3 server (moto's) on loopback, in this process, that can be stopped and started again."""

import logging
import socket
import threading
import urllib.request
from collections.abc import Iterable
from typing import Any

import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server

from adapters import bucket


class S3Server:
    """Its objects outlive a stop. Requests are worked on one at a time: moto looks at If-Match and then writes, with
    nothing to keep another writer from coming in between, which S3 promises there is not."""

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._app = DomainDispatcherApplication(create_backend_app)
        self._lock = threading.Lock()
        self._claim = socket.socket()  # bound and no more: while stopped, nobody is there and nobody else gets the port
        self._claim.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._claim.bind(("127.0.0.1", 0))
        self.port: int = self._claim.getsockname()[1]
        self.start()

    @property
    def environment(self) -> dict[str, str]:
        """How a client is told of it."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
        }

    def tell(self, patch: pytest.MonkeyPatch) -> None:
        """Clients in this process find it, and wait long: a busy machine may stand still for seconds."""
        for name, value in self.environment.items():
            patch.setenv(name, value)
        for limit in ("_QUICK_SECONDS", "_SILENT_SECONDS"):
            patch.setattr(bucket, limit, 240)

    def make_bucket(self, name: str) -> None:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/{name}", method="PUT")
        urllib.request.urlopen(request, timeout=30).close()

    def start(self) -> None:
        """On the same port as before."""
        self._server = make_server(
            "127.0.0.1", self.port, self._serialised, threaded=True, request_handler=MotoRequestHandler
        )
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _serialised(self, environment: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        with self._lock:
            return list(self._app(environment, start_response))
