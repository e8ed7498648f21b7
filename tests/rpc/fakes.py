"""A real grpc.aio server on a free loopback port, over a backend that plays a script."""

import asyncio
import os
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import grpc

from adapters.errors import AdapterNotFound
from adapters.manifest import Manifest, TrainingInfo
from adapters.registry import AdapterEntry
from adapters.versions import Version
from lorikeet.v1.adapter_pb2_grpc import AdapterServiceStub
from lorikeet.v1.inference_pb2_grpc import InferenceServiceStub
from lorikeet.v1.server_pb2_grpc import ServerServiceStub
from server.base.resolve import BaseModel
from server.base.spec import ModelSpec
from server.config import EngineConfig, ServeConfig
from server.engine.messages import CallProgress, MergeReport, Ready, ResidentAdapter, Timings
from server.frontend.types import Delta, GenerateRequest, MergeOptions, OnProgress, Residency, Usage
from server.metrics import Metrics
from server.rpc.lifecycle import run
from server.rpc.record import Observer

DIGEST = "sha256:" + "a" * 64
BASE_DIGEST = "sha256:" + "b" * 64

Script = Callable[[GenerateRequest], AsyncGenerator[Delta]]


def last_delta(count: int, text: str = "", digest: str = DIGEST) -> Delta:
    return Delta(
        text=text,
        token_ids=[],
        adapter_digest=digest,
        finish_reason="stop",
        usage=Usage(prompt_tokens=3, cached_prompt_tokens=1, completion_tokens=count),
        timings=Timings(queue=0.25, load=0.125, prefill=0.5, decode=1.5),
    )


async def say_hello(request: GenerateRequest) -> AsyncGenerator[Delta]:
    yield Delta(text="Hel", token_ids=[1, 2], adapter_digest=DIGEST)
    yield Delta(text="lo", token_ids=[3], adapter_digest=DIGEST)
    yield last_delta(3)


@dataclass
class FakeBackend:
    """Plays `script` for every request, and remembers what was asked of it."""

    script: Script = say_hello
    requests: list[GenerateRequest] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    unloaded: list[tuple[str, bool]] = field(default_factory=list)
    deleted: list[tuple[str, str | None, bool]] = field(default_factory=list)
    stages: list[CallProgress] = field(default_factory=list)  # told by a load or an unload
    hangs: bool = False  # after that
    pinned: bool = False
    merged: list[tuple[str, MergeOptions]] = field(default_factory=list)
    unmerged: list[tuple[str, MergeOptions]] = field(default_factory=list)
    report: MergeReport | None = None
    merged_digest: str | None = None
    stops: list[float] = field(default_factory=list)
    closed: asyncio.Event = field(default_factory=asyncio.Event)  # a generation ended, however it ended
    starting: asyncio.Event | None = None  # `start` waits for it
    stopping: asyncio.Event | None = None  # `stop` waits for it, unless its grace is zero
    on_start: Callable[[], None] = lambda: None
    start_error: Exception | None = None
    call_error: Exception | None = None
    info: Ready | None = None
    ready: bool = False

    def on_ready_change(self, callback: Callable[[bool], None]) -> None:
        self._callback = callback

    def set_ready(self, ready: bool) -> None:
        self.ready = ready
        self._callback(ready)

    async def start(self) -> None:
        self.on_start()
        if self.starting is not None:
            await self.starting.wait()
        if self.start_error is not None:
            raise self.start_error
        self.info = Ready(
            device="cpu",
            dtype="bfloat16",
            max_model_len=2048,
            max_num_seqs=64,
            max_batch_tokens=512,
            page_size=16,
            num_pages=100,
        )
        self.set_ready(True)

    async def stop(self, grace: float) -> None:
        self.stops.append(grace)
        if self.stopping is not None and grace > 0:
            await self.stopping.wait()

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Delta]:
        self.requests.append(request)
        try:
            async for delta in self.script(request):
                yield delta
        finally:
            self.closed.set()

    async def load_adapter(
        self, adapter_id: str, *, pin: bool = False, on_progress: OnProgress = lambda progress: None
    ) -> Version:
        self.loaded.append(adapter_id)
        await self._work(on_progress)
        self.pinned = self.pinned or pin
        return a_version(adapter_id)

    async def unload_adapter(
        self, adapter_id: str, *, drain: bool = False, on_progress: OnProgress = lambda progress: None
    ) -> Version:
        self.unloaded.append((adapter_id, drain))
        await self._work(on_progress)
        self.loaded.clear()
        return a_version(adapter_id)

    async def unpin_adapter(self, adapter_id: str) -> Version:
        self.pinned = False
        return a_version(adapter_id)

    async def merge_adapter(
        self, adapter_id: str, options: MergeOptions, *, on_progress: OnProgress = lambda progress: None
    ) -> tuple[Version, MergeReport | None]:
        self.merged.append((adapter_id, options))
        await self._work(on_progress)
        self.merged_digest = DIGEST
        return a_version(adapter_id), self.report

    async def unmerge_adapter(
        self, adapter_id: str, options: MergeOptions, *, on_progress: OnProgress = lambda progress: None
    ) -> Version:
        self.unmerged.append((adapter_id, options))
        await self._work(on_progress)
        self.merged_digest = None
        return a_version(adapter_id)

    async def delete_adapter(self, name: str, digest: str | None = None, *, drain: bool = False) -> Sequence[str]:
        self.deleted.append((name, digest, drain))
        if self.call_error is not None:
            raise self.call_error
        return [digest or DIGEST]

    async def _work(self, on_progress: OnProgress) -> None:
        for progress in self.stages:
            on_progress(progress)
            await asyncio.sleep(0)
        if self.hangs:
            try:
                await asyncio.Event().wait()
            finally:
                self.closed.set()
        if self.call_error is not None:
            raise self.call_error

    def residency(self, digest: str) -> Residency:
        if not self.loaded:
            return Residency()
        return Residency(
            (ResidentAdapter(digest, "device", 8192, 2, self.pinned), ResidentAdapter(digest, "host", 4096, 0))
        )


def a_version(name: str) -> Version:
    manifest = Manifest(
        digest=DIGEST,
        base_digest=BASE_DIGEST,
        base_name="tiny",
        rank=16,
        ranks=(8, 16),
        alpha=32.0,
        target_modules=("q_proj", "down_proj"),
        dtype="F32",
        num_parameters=1000,
        size_bytes=4096,
        created_at="2026-11-22T04:05:06.789Z",
        files={},
        training=TrainingInfo(method="qlora"),
    )
    return Version(name=name, digest=DIGEST, path=Path("unused"), labels=("latest", "prod"), manifest=manifest)


@dataclass
class FakeCatalog:
    """Knows "pirate" and "json"; a page token is the name it begins at."""

    moves: list[tuple[str | None, ...]] = field(default_factory=list)
    error: Exception | None = None

    async def resolve(self, adapter_id: str) -> Version:
        if adapter_id not in ("pirate", "json"):
            raise AdapterNotFound(f"no adapter {adapter_id!r}")
        return a_version(adapter_id)

    async def move_label(self, name: str, label: str, digest: str, expected: str | None) -> Version:
        return self._move("move", name, label, digest, expected)

    async def rollback(self, name: str, label: str, expected: str | None) -> Version:
        return self._move("rollback", name, label, expected)

    def _move(self, *asked: str | None) -> Version:
        self.moves.append(asked)
        if self.error is not None:
            raise self.error
        return a_version(str(asked[1]))

    async def list(self, page_size: int, page_token: str) -> tuple[Sequence[AdapterEntry], str]:
        names = [name for name in ("json", "pirate") if name >= page_token]
        entries = [
            AdapterEntry(name=name, version=a_version(name), labels={}, digests=(DIGEST,), matches_base=True)
            for name in names[: page_size or None]
        ]
        return entries, names[page_size] if 0 < page_size < len(names) else ""


BASE = BaseModel(
    name="tiny",
    path=Path("unused"),
    digest=BASE_DIGEST,
    spec=ModelSpec.from_config(
        {
            "model_type": "llama",
            "hidden_size": 8,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 2048,
            "vocab_size": 100,
        }
    ),
)

CONFIG = ServeConfig(
    engine=EngineConfig(base_path="unused", base_digest=BASE_DIGEST),
    base_name="tiny",
    store="unused",
    port=0,
    metrics_port=0,
    grace=20.0,
)


@dataclass
class Running:
    """A server, and a channel to it. `task` ends when the server has."""

    task: asyncio.Task[None]
    channel: grpc.aio.Channel
    metrics: Metrics
    port: int
    metrics_port: int

    @property
    def inference(self) -> InferenceServiceStub:
        return InferenceServiceStub(self.channel)

    @property
    def adapters(self) -> AdapterServiceStub:
        return AdapterServiceStub(self.channel)

    @property
    def server(self) -> ServerServiceStub:
        return ServerServiceStub(self.channel)

    def value(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, labels)


class NotStarted(Exception):
    """The server ended, in good order, before it took requests."""


def interrupt() -> None:
    """What an operator's `kill` does."""
    os.kill(os.getpid(), signal.SIGTERM)


@asynccontextmanager
async def serving(
    backend: FakeBackend,
    catalog: FakeCatalog | None = None,
    observers: Sequence[Observer] = (),
    **settings: object,
) -> AsyncIterator[Running]:
    """A server with CONFIG and `settings`, stopped by SIGTERM at the end."""
    started: asyncio.Future[tuple[int, int]] = asyncio.get_running_loop().create_future()
    metrics = Metrics()
    task = asyncio.create_task(
        run(
            replace(CONFIG, **settings),  # type: ignore[arg-type]
            BASE,
            backend,
            catalog or FakeCatalog(),
            metrics,
            observers,
            on_started=lambda port, metrics_port: started.set_result((port, metrics_port)),
        )
    )
    await asyncio.wait((task, started), return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        await task
        raise NotStarted
    port, metrics_port = await started
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Running(task, channel, metrics, port, metrics_port)
        if not task.done():
            interrupt()
            await task
