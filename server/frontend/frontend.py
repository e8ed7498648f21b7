"""The front end as the RPC layer sees it: generations and adapters, with the engine process behind them.

The way of a request: check its fields, resolve its adapter to a digest (once), make its prompt tokens, submit it,
then hand out deltas as the engine's outputs come, until it ends or its reader leaves.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from typing import Protocol

from adapters.errors import AdapterInUse
from adapters.versions import Version
from server.base.resolve import BaseModel
from server.config import ServeConfig
from server.engine.messages import (
    CallProgress,
    LoadAdapter,
    MergeReport,
    Ready,
    Stats,
    ToEngine,
    UnloadAdapter,
    UnpinAdapter,
)
from server.errors import EngineUnavailable, ServerBusy, ShuttingDown
from server.frontend.catalog import Catalog, Registry
from server.frontend.dispatcher import Dispatcher, EngineMetrics
from server.frontend.engine_client import ENGINE_COMMAND, EngineClient
from server.frontend.merging import Merging
from server.frontend.preparation import Preparation, Prepared, reference
from server.frontend.streams import Stream
from server.frontend.supervisor import Backoff, Supervisor
from server.frontend.types import Delta, GenerateRequest, MergeOptions, OnProgress, Residency

# What the engine gets to finish its step in progress before it is terminated.
_SHUTDOWN_SECONDS = 5.0


class Metrics(EngineMetrics, Protocol):
    """What the front end counts; `server.metrics.Metrics` in a real server. `adapter` is a name, "" the base."""

    def first_token(self, *, adapter: str, residency: str, seconds: float) -> None: ...

    def output_tokens(self, *, adapter: str, count: int, seconds: float) -> None: ...

    def prompt_tokens(self, *, adapter: str, count: int, cached: int) -> None: ...

    def generation_tokens(self, *, adapter: str, count: int) -> None: ...

    def store_up(self, value: bool) -> None: ...


class Frontend:
    """One engine and all that is asked of it; used from one event loop. Raises BaseModelError when the base's
    tokenizer or chat template cannot be read."""

    def __init__(
        self,
        config: ServeConfig,
        base: BaseModel,
        registry: Registry,
        metrics: Metrics,
        *,
        engine_command: Sequence[str] = ENGINE_COMMAND,
        backoff: Backoff | None = None,
    ) -> None:
        self._config = config
        self._metrics = metrics
        self._preparation = Preparation(base, config.max_stop_strings)
        self.catalog = Catalog(registry, metrics.store_up)
        self._dispatcher = Dispatcher(self._send, self._set_up, self.catalog, metrics)
        self._merging = Merging(self.catalog, self._dispatcher, self._preparation.encode_probe)
        self._supervisor = Supervisor(
            lambda: EngineClient(engine_command, config.engine, self._dispatcher.receive),
            self._dispatcher,
            backoff or Backoff(),
        )
        self._num_active = 0
        self._num_preparing = 0  # requests whose prompt is being encoded
        self._idle = asyncio.Event()
        self._idle.set()
        self._is_up = False
        self._is_started = False
        self._is_stopping = False
        self._has_ended = False
        self._on_ready_change: list[Callable[[bool], None]] = []
        self._sweeper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Returns when the engine takes requests, with the adapter merged that is to be. Raises BaseModelError when it
        refuses the base model, ConfigError when a setting, EngineUnavailable when it does not come up otherwise, and
        what merging raises."""
        await self._supervisor.start()
        if self._config.merge is not None:
            options = MergeOptions(force=self._config.merge_force)
            await self._merging.merge(self._config.merge, options, lambda progress: None)
        self._is_started = True
        self._tell_ready()
        self._sweeper = asyncio.create_task(self._sweep(), name="stalled streams")

    async def stop(self, grace: float) -> None:
        """Refuses new requests, gives those that run `grace` seconds, ends the rest with ShuttingDown, then the
        engine. May be called again, as when a first call was cancelled."""
        self._is_stopping = True
        self._tell_ready()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace):
                await self._idle.wait()
        if self._sweeper is not None:
            self._sweeper.cancel()
        self._dispatcher.fail_all(_stopped)
        self._has_ended = True
        await self._supervisor.stop(_SHUTDOWN_SECONDS)
        await self._merging.close()
        self._set_up(False)
        self.catalog.close()

    @property
    def info(self) -> Ready | None:
        """What the engine said of itself when it was ready; None before the first was."""
        return self._dispatcher.info

    @property
    def stats(self) -> Stats | None:
        """The engine's last snapshot; None before its first."""
        return self._dispatcher.stats

    @property
    def ready(self) -> bool:
        """Whether requests are taken now."""
        return self._is_up and self._is_started and not self._is_stopping

    def on_ready_change(self, callback: Callable[[bool], None]) -> None:
        """`callback` is called, on the event loop, with `ready` whenever it may have changed."""
        self._on_ready_change.append(callback)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Delta, None]:
        """The answer as it is made; the last delta has a finish reason. Closing the generator cancels the request
        in the engine.

        Raises InvalidRequest, what the catalog raises for the adapter, what the engine reports (ServerBusy,
        InvalidAdapter, …), ShuttingDown, EngineUnavailable, StreamStalled.
        """
        arrival = asyncio.get_running_loop().time()
        with self._active() as info:
            self._refuse_if_full(info)
            self._preparation.check(request, info)
            adapter_id = request.adapter_id
            async with self.catalog.hold(adapter_id) if adapter_id else contextlib.nullcontext() as version:
                adapter = "" if version is None else version.name
                residency = "device" if version is None else self.residency(version.digest).fastest
                request_id = self._dispatcher.next_id()
                prepared, stream = await self._submit(request, info, request_id, version)
                try:
                    is_first, is_last = True, False
                    while not is_last:
                        delta = prepared.completion.delta(await stream.take(), stream)
                        if is_first:
                            self._count_start(prepared, stream, adapter, residency, arrival)
                            is_first = False
                        self._metrics.generation_tokens(adapter=adapter, count=len(delta.token_ids))
                        is_last = delta.finish_reason is not None
                        if is_last:
                            self._dispatcher.leave(request_id)  # the engine need not wait for the reader
                            self._count_end(prepared, stream, adapter)
                        yield delta
                finally:
                    self._dispatcher.leave(request_id)

    async def load_adapter(
        self, adapter_id: str, *, pin: bool = False, on_progress: OnProgress = lambda progress: None
    ) -> Version:
        """Make an adapter resident; returns when it is. `pin`: and keep it so until it is unpinned or unloaded.
        Raises as `generate` does for the adapter, AdapterTooLarge, PinRefused."""
        with self._active():
            call_id = self._dispatcher.next_id()
            async with self.catalog.hold(adapter_id, lambda: on_progress(CallProgress(call_id, "fetching"))) as version:
                await self._dispatcher.call(LoadAdapter(call_id, reference(version), pin), call_id, on_progress)
                return version

    async def unload_adapter(
        self, adapter_id: str, *, drain: bool = False, on_progress: OnProgress = lambda progress: None
    ) -> Version:
        """Drop an adapter from memory. While requests use it: AdapterInUse or, with `drain`, wait for their end."""
        with self._active():
            version = await self.catalog.resolve(adapter_id)
            await self._unload(version.digest, drain, on_progress)
            return version

    async def unpin_adapter(self, adapter_id: str) -> Version:
        """Let an adapter be evicted again; one that is not pinned is fine."""
        with self._active():
            version = await self.catalog.resolve(adapter_id)
            call_id = self._dispatcher.next_id()
            await self._dispatcher.call(UnpinAdapter(call_id, version.digest), call_id)
            return version

    async def merge_adapter(
        self, adapter_id: str, options: MergeOptions, *, on_progress: OnProgress = lambda progress: None
    ) -> tuple[Version, MergeReport | None]:
        """Add an adapter to the base's weights, once the requests that run have ended. Raises as `load_adapter` does,
        BaseMerged, MergeRefused, MergeTooLarge, MergeAborted."""
        with self._active():
            return await self._merging.merge(adapter_id, options, on_progress)

    async def unmerge_adapter(
        self, adapter_id: str, options: MergeOptions, *, on_progress: OnProgress = lambda progress: None
    ) -> Version:
        """Give the base its own weights back, likewise; one that is not merged is fine. Raises MergeAborted."""
        with self._active():
            return await self._merging.unmerge(adapter_id, options, on_progress)

    @property
    def merged_digest(self) -> str | None:
        """What is in the base's weights, or will be again once the engine is back."""
        return self._merging.digest

    async def delete_adapter(self, name: str, digest: str | None = None, *, drain: bool = False) -> Sequence[str]:
        """Forget a version of a name, or the name with all it has, and drop it from memory; what was forgotten.
        While requests use the name: AdapterInUse and nothing happens or, with `drain`, no new one finds it and the
        running ones are waited for. AdapterInUse for what is merged. Raises what the catalog raises for the name and
        version."""
        with self._active():
            if (merged := self._merging.digest) is not None and merged in await self.catalog.digests(name, digest):
                raise AdapterInUse(f"adapter {name!r}: version {merged} is merged into the base; unmerge it first")
            if not drain and (num_users := self.catalog.num_users(name, digest)):
                raise AdapterInUse(f"adapter {name!r} is in use by {num_users} requests; drain it, or try again later")
            forgotten = await self.catalog.remove(name, digest)
            for removed in forgotten:
                with contextlib.suppress(AdapterInUse):  # by another name, or by a request that came meanwhile
                    await self._unload(removed, drain)
            return forgotten

    def residency(self, digest: str) -> Residency:
        """Where an adapter is, as of the engine's last snapshot."""
        return self._dispatcher.residency.get(digest, Residency())

    async def _unload(self, digest: str, drain: bool, on_progress: OnProgress = lambda progress: None) -> None:
        call_id = self._dispatcher.next_id()
        await self._dispatcher.call(UnloadAdapter(call_id, digest, drain), call_id, on_progress)

    @contextlib.contextmanager
    def _active(self) -> Iterator[Ready]:
        """One request or call, for which `stop` waits. Raises ShuttingDown, EngineUnavailable."""
        if self._is_stopping:
            raise ShuttingDown("the server is shutting down and takes no new requests", retry_after=1.0)
        info = self._dispatcher.info
        if info is None or not (self._is_up and self._is_started):
            raise EngineUnavailable("the engine is not running; it is being started", retry_after=5.0)
        self._num_active += 1
        self._idle.clear()
        try:
            yield info
        finally:
            self._num_active -= 1
            if self._num_active == 0:
                self._idle.set()

    async def _submit(
        self, request: GenerateRequest, info: Ready, request_id: str, version: Version | None
    ) -> tuple[Prepared, Stream]:
        self._num_preparing += 1
        try:
            prepared = await self._preparation.prepare(request, info, request_id, version)
            return prepared, self._dispatcher.submit(prepared.submit)
        finally:
            self._num_preparing -= 1

    def _refuse_if_full(self, info: Ready) -> None:
        """Raises ServerBusy for what the engine would refuse, before it costs anything: the engine, whose count is the
        one that holds, reads what is sent to it between two steps, which may be long."""
        max_waiting = self._config.engine.max_waiting
        if self._num_preparing + self._dispatcher.num_streams >= info.max_num_seqs + max_waiting:
            stats = self._dispatcher.stats
            raise ServerBusy(
                f"{max_waiting} requests are waiting, more may not; try again later",
                retry_after=1.0 if stats is None else stats.retry_after,
            )

    def _count_start(self, prepared: Prepared, stream: Stream, adapter: str, residency: str, arrival: float) -> None:
        assert stream.first_at is not None, "a token has come"
        self._metrics.first_token(adapter=adapter, residency=residency, seconds=stream.first_at - arrival)
        self._metrics.prompt_tokens(adapter=adapter, count=len(prepared.submit.prompt), cached=stream.num_cached)

    def _count_end(self, prepared: Prepared, stream: Stream, adapter: str) -> None:
        assert stream.first_at is not None, "a token has come"
        seconds = stream.last_at - stream.first_at
        self._metrics.output_tokens(adapter=adapter, count=prepared.completion.num_tokens - 1, seconds=seconds)

    def _send(self, message: ToEngine) -> None:
        if self._has_ended:  # and this was on its way to the engine
            raise _stopped()
        self._supervisor.send(message)

    def _set_up(self, is_up: bool) -> None:
        self._is_up = is_up
        if is_up:
            self._merging.engine_up()
        self._tell_ready()

    def _tell_ready(self) -> None:
        for callback in self._on_ready_change:
            callback(self.ready)

    async def _sweep(self) -> None:
        timeout = self._config.stall_timeout
        while True:
            await asyncio.sleep(timeout / 4)
            self._dispatcher.fail_stalled(timeout)


def _stopped() -> ShuttingDown:
    return ShuttingDown("the server has stopped before this request could finish", retry_after=1.0)
