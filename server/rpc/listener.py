"""The gRPC server's socket and settings: what may come in, how large, and who may ping."""

import contextlib
import errno
import socket
from typing import Any

import grpc

from server.errors import ConfigError

# Dead peers are found after a minute or so; clients may ping, to find a dead server, every ten seconds.
KEEPALIVE_MS = 60_000
KEEPALIVE_TIMEOUT_MS = 20_000
MIN_CLIENT_PING_MS = 10_000


def listen(host: str, port: int, max_message_bytes: int) -> tuple[grpc.aio.Server, int]:
    """A server that has its port, and the port. Raises ConfigError."""
    _check_port(host, port)
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", max_message_bytes),
            ("grpc.so_reuseport", 0),  # or a second server would share the port in silence
            ("grpc.keepalive_time_ms", KEEPALIVE_MS),
            ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", MIN_CLIENT_PING_MS),
            ("grpc.keepalive_permit_without_calls", 1),
        ]
    )
    try:
        bound = server.add_insecure_port(address_of(host, port))
    except RuntimeError as error:
        raise ConfigError(f"port: cannot listen on {host} port {port}") from error
    return server, bound


def address_of(host: str, port: int) -> str:
    """As gRPC and URLs have it: around an IPv6 address, whose colons are its own, are brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _check_port(host: str, port: int) -> None:
    """Raises ConfigError with the reason if `host`:`port` cannot be bound; gRPC would only say so in its log."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"port: {port} is not between 0 and 65535")
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError(f"host: {host!r} is not an address of this machine: {error.strerror}") from error
    failures = [failure for family, *_, address in addresses if (failure := _bind_failure(family, address))]
    in_use = [failure for failure in failures if failure.errno == errno.EADDRINUSE]
    if in_use or len(failures) == len(addresses):  # a name may have addresses, as of IPv6, that are not there
        failure = (in_use or failures)[0]
        raise ConfigError(f"port: cannot listen on {host} port {port}: {failure.strerror}") from failure


def _bind_failure(family: int, address: Any) -> OSError | None:
    with contextlib.closing(socket.socket(family, socket.SOCK_STREAM)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            return error
    return None
