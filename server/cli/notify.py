"""Tells a service manager that the server is ready: systemd's protocol, sd_notify(3), for units of `Type=notify`."""

import os
import socket


def notify_ready() -> None:
    """Sends READY=1 to `$NOTIFY_SOCKET`, where that is set. A path that begins with @ is an abstract address."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection:
        connection.connect(address)
        connection.send(b"READY=1")
