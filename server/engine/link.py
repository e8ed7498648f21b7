"""The engine's end of the socket to the front end."""

import os
from collections.abc import Iterator

import zmq

from server.engine.messages import ToEngine, ToFrontend, decode_to_engine, encode


class Link:
    """A ZeroMQ PAIR socket connected to the front end's; one message a frame, in order, none lost."""

    def __init__(self, address: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.connect(address)
        self._woken = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._woken, zmq.POLLIN)

    def receive(self, timeout: float) -> Iterator[ToEngine]:
        """All messages that are there, waiting up to `timeout` seconds for a first one or for `wake`."""
        found = dict(self._poller.poll(round(timeout * 1000)))
        if self._woken in found:
            os.eventfd_read(self._woken)
        if self._socket in found:
            while True:
                try:
                    frame = self._socket.recv(zmq.NOBLOCK)
                except zmq.Again:
                    return
                yield decode_to_engine(frame)

    def wake(self) -> None:
        """End the wait of `receive`, or the next one; from any thread."""
        os.eventfd_write(self._woken, 1)

    def send(self, message: ToFrontend) -> None:
        self._socket.send(encode(message))

    def close(self) -> None:
        """Give what was sent a second to leave."""
        self._socket.close(linger=1000)
        self._context.term()  # a loader may still call `wake`
