"""The engine's end of the socket: messages in order, and a loop that is woken."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from server.config import EngineConfig
from server.engine import engine as engine_module
from server.engine.build import build_engine
from server.engine.link import Link
from server.engine.messages import (
    CallDone,
    Cancel,
    LoadAdapter,
    Shutdown,
    ToEngine,
    ToFrontend,
    decode_to_frontend,
    encode,
)
from tests.engine.inprocess import BASE_DIGEST, make_adapter
from tests.model.tiny import save_tiny

NEVER = 1e6  # seconds


class FrontEnd:
    """The other end."""

    def __init__(self, directory: Path) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self.address = f"ipc://{directory}/s"
        self._socket.bind(self.address)

    def send(self, message: ToEngine) -> None:
        self._socket.send(encode(message))

    def receive(self) -> ToFrontend:
        assert self._socket.poll(200_000), "nothing came"
        return decode_to_frontend(self._socket.recv())

    def close(self) -> None:
        self._socket.close(linger=0)
        self._context.term()


@pytest.fixture
def front_end(tmp_path: Path) -> Iterator[FrontEnd]:
    opened = FrontEnd(tmp_path)
    yield opened
    opened.close()


def test_waiting_ends_with_a_message_or_when_woken(front_end: FrontEnd) -> None:
    link = Link(front_end.address)
    for request_id in ("a", "b"):
        front_end.send(Cancel(request_id))
    found: list[ToEngine] = []
    while len(found) < 2:
        found += link.receive(NEVER)
    assert found == [Cancel("a"), Cancel("b")]
    link.wake()
    link.wake()
    assert list(link.receive(NEVER)) == [], "woken before it waited"
    assert list(link.receive(0.0)) == [], "and that once"
    waker = threading.Thread(target=link.wake, daemon=True)
    waker.start()
    assert list(link.receive(NEVER)) == []
    waker.join()
    front_end.send(Cancel("c"))
    assert list(link.receive(NEVER)) == [Cancel("c")]
    link.close()


def test_a_load_wakes_the_loop_that_has_nothing_else_to_do(
    front_end: FrontEnd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny("llama", tmp_path / "base")
    adapter = make_adapter(model, tmp_path / "adapter", 0)
    monkeypatch.setattr(engine_module, "LOADING_WAIT", NEVER)
    monkeypatch.setattr(engine_module, "IDLE_WAIT", NEVER)
    link = Link(front_end.address)
    config = EngineConfig(
        base_path=str(tmp_path / "base"), base_digest=BASE_DIGEST, kv_cache_bytes=1 << 20, adapter_cache_bytes=8 << 20
    )
    loop = threading.Thread(target=build_engine(config, link).run, args=(os.getppid(),), daemon=True)
    loop.start()
    front_end.send(LoadAdapter("load", adapter))
    while not isinstance(message := front_end.receive(), CallDone):
        pass
    assert message == CallDone("load")
    front_end.send(Shutdown())
    loop.join()
    link.close()
