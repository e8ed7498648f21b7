"""Keeps an engine running: starts it, hears when it is lost, and starts another after a while."""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import zmq

from adapters.errors import LorikeetError
from server.engine.messages import Ready, ToEngine
from server.errors import EngineUnavailable
from server.frontend.engine_client import EngineClient

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Backoff:
    """Seconds to wait before another start: `first`, doubled with every loss up to `longest`. An engine that lived
    `stable` seconds begins anew."""

    first: float = 0.5
    longest: float = 30.0
    stable: float = 60.0

    def after(self, last: float | None, lived: float) -> float:
        """`last` is the wait before the engine that was lost now, `lived` how long that was ready."""
        if last is None or lived >= self.stable:
            return self.first
        return min(2 * last, self.longest)


class Listener(Protocol):
    """Hears, on the event loop, when there is an engine and when there is none."""

    def engine_up(self, ready: Ready, pid: int) -> None: ...

    def engine_down(self, error: LorikeetError) -> None: ...


class Supervisor:
    """At most one engine at a time. `make_client` makes the client of a process yet to be started."""

    def __init__(self, make_client: Callable[[], EngineClient], listener: Listener, backoff: Backoff) -> None:
        self._make_client = make_client
        self._listener = listener
        self._backoff = backoff
        self._client: EngineClient | None = None
        self._is_up = False
        self._keeper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Returns when the engine is ready. An engine that fails in its first start is not started again: raises
        its error."""
        await self._start_engine()
        self._keeper = asyncio.create_task(self._keep(), name="engine supervisor")

    def send(self, message: ToEngine) -> None:
        """Raises EngineUnavailable while there is none."""
        if not self._is_up or self._client is None:
            raise EngineUnavailable("the engine is not ready; it is being started", retry_after=5.0)
        self._client.send(message)

    async def stop(self, patience: float) -> None:
        """Ends the engine, which has `patience` seconds for its step in progress. May be called again."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait((self._keeper,))
        self._is_up = False
        if self._client is not None:
            await self._client.close(patience)

    async def _start_engine(self) -> None:
        self._client = client = self._make_client()
        try:
            ready = await client.start()
        except BaseException:
            await client.close()
            raise
        self._is_up = True
        self._listener.engine_up(ready, client.pid)

    async def _keep(self) -> None:
        delay: float | None = None
        while True:
            assert self._client is not None, "started"
            since = time.monotonic()
            error = await self._client.ended()
            self._is_up = False
            logger.error("%s", error.message)
            self._listener.engine_down(error)
            await self._client.close()
            delay = await self._restart(self._backoff.after(delay, time.monotonic() - since))

    async def _restart(self, delay: float) -> float:
        """Returns when there is an engine again, with the last wait before it was started."""
        while True:
            await asyncio.sleep(delay)
            logger.warning("starting the engine again")
            try:
                await self._start_engine()
                return delay
            except (LorikeetError, OSError, zmq.ZMQError) as error:  # which is no OSError, though files run out
                logger.error("the engine did not start: %s", error)
                delay = self._backoff.after(delay, 0.0)
