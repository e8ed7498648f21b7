"""When an engine is started again, on clients that only play their part."""

import asyncio
import errno
from typing import cast

import zmq

from adapters.errors import LorikeetError
from server.engine.messages import Ready
from server.errors import BaseModelError, EngineUnavailable
from server.frontend.engine_client import EngineClient
from server.frontend.supervisor import Backoff, Supervisor

READY = Ready("cpu", "float32", 128, 8, 64, 16, 10)


class ScriptedClient:
    """Fails to start, or is lost as soon as it is up, or lives."""

    def __init__(self, part: str) -> None:
        self.part = part
        self.pid = 1
        self.is_closed = False

    async def start(self) -> Ready:
        if self.part == "fails":
            raise BaseModelError("no weights")
        if self.part == "gets no socket":
            raise zmq.ZMQError(errno.EMFILE)
        return READY

    async def ended(self) -> LorikeetError:
        if self.part != "is lost":
            await asyncio.Event().wait()
        return EngineUnavailable("gone")

    async def close(self, patience: float = 0.0) -> None:
        self.is_closed = True


class Listener:
    def __init__(self, num_ups: int) -> None:
        self.heard: list[str] = []
        self.is_settled = asyncio.Event()
        self._num_ups = num_ups

    def engine_up(self, ready: Ready, pid: int) -> None:
        self.heard.append("up")
        if self.heard.count("up") == self._num_ups:
            self.is_settled.set()

    def engine_down(self, error: LorikeetError) -> None:
        self.heard.append(f"down: {error.message}")


def test_a_later_start_that_fails_is_tried_again_and_every_client_is_closed() -> None:
    async def test() -> None:
        clients = [ScriptedClient(part) for part in ("is lost", "fails", "gets no socket", "is lost", "lives")]
        left = iter(clients)
        listener = Listener(num_ups=3)
        supervisor = Supervisor(lambda: cast(EngineClient, next(left)), listener, Backoff(first=0.001, longest=0.002))
        await supervisor.start()
        await asyncio.wait_for(listener.is_settled.wait(), 30)
        assert listener.heard == ["up", "down: gone", "up", "down: gone", "up"]
        assert [client.is_closed for client in clients] == [True] * 4 + [False]
        await supervisor.stop(0.0)
        assert clients[-1].is_closed

    asyncio.run(test())
