"""The front end as the RPC layer sees it: generations and adapters, with the engine process behind them.

The way of a request: check its fields, resolve its adapter to a digest (once), make its prompt tokens, submit it,
then hand out deltas as the engine's outputs come, until it ends or its reader leaves.
"""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from msgspec.structs import replace

from adapters.store import Version
from server.base.resolve import BaseModel
from server.config import ServeConfig
from server.engine.messages import AdapterRef, LoadAdapter, Ready, Stats, Submit, ToEngine, UnloadAdapter
from server.errors import EngineUnavailable, ShuttingDown
from server.frontend.completion import Completion
from server.frontend.detokenizer import Detokenizer, TokenBytes
from server.frontend.dispatcher import Dispatcher, EngineMetrics
from server.frontend.engine_client import ENGINE_COMMAND, EngineClient
from server.frontend.stop_strings import StopStrings
from server.frontend.streams import Stream
from server.frontend.supervisor import Backoff, Supervisor
from server.frontend.tokenizer import Tokenizer
from server.frontend.types import Delta, GenerateRequest
from server.frontend.validation import check_request, output_budget

# Characters that take about a millisecond to encode; longer prompts are encoded in a thread.
_ENCODE_INLINE = 2048

# What the engine gets to finish its step in progress before it is terminated.
_SHUTDOWN_SECONDS = 5.0


class Metrics(EngineMetrics, Protocol):
    """What the front end counts; `server.metrics.Metrics` in a real server. `adapter` is a name, "" the base."""

    def first_token(self, *, adapter: str, residency: str, seconds: float) -> None: ...

    def output_tokens(self, *, adapter: str, count: int, seconds: float) -> None: ...

    def prompt_tokens(self, *, adapter: str, count: int, cached: int) -> None: ...

    def generation_tokens(self, *, adapter: str, count: int) -> None: ...


class Registry(Protocol):
    """Turns adapter ids into versions; `adapters.registry.AdapterRegistry` in a real server."""

    def resolve(self, adapter_id: str) -> Version: ...


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A request that can be submitted. `residency` is where its adapter was when it came."""

    submit: Submit
    completion: Completion
    adapter: str
    residency: str


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
        self._vocab_size = base.spec.vocab_size
        self._registry = registry
        self._metrics = metrics
        self._tokenizer = Tokenizer.load(base.path)
        self._token_bytes = TokenBytes(self._tokenizer.backend)
        self._dispatcher = Dispatcher(self._send, self._set_up, metrics)
        self._supervisor = Supervisor(
            lambda: EngineClient(engine_command, config.engine, self._dispatcher.receive),
            self._dispatcher,
            backoff or Backoff(),
        )
        self._num_active = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._is_up = False
        self._is_stopping = False
        self._on_ready_change: list[Callable[[bool], None]] = []
        self._sweeper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Returns when the engine takes requests. Raises BaseModelError when it refuses the base model, ConfigError
        when a setting, EngineUnavailable when it does not come up otherwise."""
        await self._supervisor.start()
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
        message = "the server has stopped before this request could finish"
        self._dispatcher.fail_all(lambda: ShuttingDown(message, retry_after=1.0))
        await self._supervisor.stop(_SHUTDOWN_SECONDS)
        self._set_up(False)

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
        return self._is_up and not self._is_stopping

    def on_ready_change(self, callback: Callable[[bool], None]) -> None:
        """`callback` is called, on the event loop, with `ready` whenever it may have changed."""
        self._on_ready_change.append(callback)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Delta, None]:
        """The answer as it is made; the last delta has a finish reason. Closing the generator cancels the request
        in the engine.

        Raises InvalidRequest, what the registry raises for the adapter, what the engine reports (ServerBusy,
        InvalidAdapter, …), ShuttingDown, EngineUnavailable, StreamStalled.
        """
        arrival = asyncio.get_running_loop().time()
        with self._active() as info:
            prepared = await self._prepare(request, info)
            completion, adapter = prepared.completion, prepared.adapter
            request_id = prepared.submit.request_id
            stream = self._dispatcher.submit(prepared.submit)
            try:
                is_first, is_last = True, False
                while not is_last:
                    delta = completion.delta(await stream.take(), stream)
                    if is_first:
                        self._count_start(prepared, stream, arrival)
                        is_first = False
                    self._metrics.generation_tokens(adapter=adapter, count=len(delta.token_ids))
                    is_last = delta.finish_reason is not None
                    if is_last:
                        self._dispatcher.leave(request_id)  # the engine need not wait for the reader
                        self._count_end(prepared, stream)
                    yield delta
            finally:
                self._dispatcher.leave(request_id)

    async def load_adapter(self, adapter_id: str) -> Version:
        """Make an adapter resident; returns when it is. Raises as `generate` does for the adapter."""
        with self._active():
            version = self._registry.resolve(adapter_id)
            call_id = self._dispatcher.next_id()
            await self._dispatcher.call(LoadAdapter(call_id, _reference(version)), call_id)
            return version

    async def unload_adapter(self, adapter_id: str) -> Version:
        """Drop an adapter from memory. Raises AdapterInUse while requests hold it."""
        with self._active():
            version = self._registry.resolve(adapter_id)
            call_id = self._dispatcher.next_id()
            await self._dispatcher.call(UnloadAdapter(call_id, version.digest), call_id)
            return version

    def residency(self, digest: str) -> str:
        """Where an adapter is: "device", "host" or "disk", as of the engine's last snapshot."""
        return self._dispatcher.residency.get(digest, "disk")

    async def _prepare(self, request: GenerateRequest, info: Ready) -> _Prepared:
        check_request(
            request,
            vocab_size=self._vocab_size,
            max_model_len=info.max_model_len,
            max_stop_strings=self._config.max_stop_strings,
        )
        version = self._registry.resolve(request.adapter_id) if request.adapter_id else None
        field, prompt = await self._encode(request, info.max_model_len)
        max_tokens = output_budget(field, len(prompt), request.max_tokens, info.max_model_len)
        sampling = request.sampling
        if sampling.seed is None:  # chosen here, so that a sequence that is computed again draws the same tokens
            sampling = replace(sampling, seed=secrets.randbits(63))
        submit = Submit(
            request_id=self._dispatcher.next_id(),
            prompt=prompt,
            sampling=sampling,
            stopping=request.stop_params(max_tokens),
            adapter=None if version is None else _reference(version),
        )
        completion = Completion(
            Detokenizer(self._token_bytes, prompt),
            StopStrings(request.stop_strings) if request.stop_strings else None,
            "" if version is None else version.digest,
            len(prompt),
        )
        if version is None:
            return _Prepared(submit, completion, "", "device")
        return _Prepared(submit, completion, version.name, self.residency(version.digest))

    async def _encode(self, request: GenerateRequest, max_tokens: int) -> tuple[str, list[int]]:
        """The field that holds the prompt, and its tokens. A long one is encoded in a thread, one that is far too
        long not at all."""
        prompt = request.prompt
        if isinstance(prompt, str):
            if len(prompt) > _ENCODE_INLINE:
                return "text", await asyncio.to_thread(self._tokenizer.encode_text, prompt, max_tokens)
            return "text", self._tokenizer.encode_text(prompt, max_tokens)
        token_ids = [token for token in prompt if isinstance(token, int)]
        messages = [message for message in prompt if not isinstance(message, int)]
        if token_ids:
            return "token_ids", token_ids
        if sum(len(message.content) for message in messages) > _ENCODE_INLINE:
            return "messages", await asyncio.to_thread(self._tokenizer.encode_chat, messages, max_tokens)
        return "messages", self._tokenizer.encode_chat(messages, max_tokens)

    @contextlib.contextmanager
    def _active(self) -> Iterator[Ready]:
        """One request or call, for which `stop` waits. Raises ShuttingDown, EngineUnavailable."""
        if self._is_stopping:
            raise ShuttingDown("the server is shutting down and takes no new requests", retry_after=1.0)
        info = self._dispatcher.info
        if info is None or not self._is_up:
            raise EngineUnavailable("the engine is not running; it is being started", retry_after=5.0)
        self._num_active += 1
        self._idle.clear()
        try:
            yield info
        finally:
            self._num_active -= 1
            if self._num_active == 0:
                self._idle.set()

    def _count_start(self, prepared: _Prepared, stream: Stream, arrival: float) -> None:
        assert stream.first_at is not None, "a token has come"
        seconds = stream.first_at - arrival
        self._metrics.first_token(adapter=prepared.adapter, residency=prepared.residency, seconds=seconds)
        self._metrics.prompt_tokens(
            adapter=prepared.adapter, count=len(prepared.submit.prompt), cached=stream.num_cached
        )

    def _count_end(self, prepared: _Prepared, stream: Stream) -> None:
        assert stream.first_at is not None, "a token has come"
        seconds = stream.last_at - stream.first_at
        self._metrics.output_tokens(adapter=prepared.adapter, count=prepared.completion.num_tokens - 1, seconds=seconds)

    def _send(self, message: ToEngine) -> None:
        self._supervisor.send(message)

    def _set_up(self, is_up: bool) -> None:
        self._is_up = is_up
        self._tell_ready()

    def _tell_ready(self) -> None:
        for callback in self._on_ready_change:
            callback(self.ready)

    async def _sweep(self) -> None:
        timeout = self._config.stall_timeout
        while True:
            await asyncio.sleep(timeout / 4)
            self._dispatcher.fail_stalled(timeout)


def _reference(version: Version) -> AdapterRef:
    return AdapterRef(version.digest, str(version.path))
