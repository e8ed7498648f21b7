"""A front end on a fake engine process, with a metrics object that remembers and a registry of a few names."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, cast

from adapters.errors import AdapterNotFound
from adapters.leases import Lease
from adapters.manifest import Manifest
from adapters.versions import Version
from server.base.resolve import BaseModel
from server.base.spec import ModelSpec
from server.config import EngineConfig, ServeConfig
from server.engine.messages import Ready, SamplingParams, Stats
from server.frontend.catalog import Registry
from server.frontend.frontend import Frontend
from server.frontend.supervisor import Backoff
from server.frontend.types import Delta, GenerateRequest, Prompt
from tests.frontend.fake_engine import VOCAB_SIZE
from tests.frontend.tokenizers_for_tests import byte_level_tokenizer

FAKE_ENGINE = (sys.executable, str(Path(__file__).with_name("fake_engine.py")))
TOKENIZER = byte_level_tokenizer()


def run(test: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(60):
            await test

    asyncio.run(limited())


class Recorder:
    """The metrics calls in order, and a way to wait for what the engine's Stats say."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.stats: Stats | None = None
        self.names: Mapping[str, str] = {}
        self._changed = asyncio.Event()

    def first_token(self, **values: Any) -> None:
        self.calls.append(("first_token", values))

    def output_tokens(self, **values: Any) -> None:
        self.calls.append(("output_tokens", values))

    def prompt_tokens(self, **values: Any) -> None:
        self.calls.append(("prompt_tokens", values))

    def generation_tokens(self, **values: Any) -> None:
        self.calls.append(("generation_tokens", values))

    def engine_started(self, ready: Ready, pid: int | None = None) -> None:
        self.calls.append(("engine_started", {"pid": pid}))
        self._changed.set()

    def engine_restarted(self) -> None:
        self.calls.append(("engine_restarted", {}))
        self._changed.set()

    def engine_stats(self, stats: Stats, names: Mapping[str, str]) -> None:
        self.calls.append(("engine_stats", {}))
        self.stats = stats
        self.names = names
        self._changed.set()

    def store_up(self, value: bool) -> None:
        self.calls.append(("store_up", {"value": value}))
        self._changed.set()

    def named(self, name: str) -> list[dict[str, Any]]:
        return [values for called, values in self.calls if called == name]

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    async def until_cancels(self, count: int) -> None:
        """The engine has had `count` Cancels and runs nothing."""
        await self.until(lambda: self.stats is not None and self.stats.preemptions == count)
        assert self.stats is not None
        assert self.stats.num_running == 0


class FakeStore:
    """A disk whose files are there whenever one looks."""

    is_remote = False
    is_away = False

    def __init__(self) -> None:
        self.paths: dict[str, Path] = {}

    def fetch(self, digest: str) -> Path:
        return self.paths[digest]

    def lease(self, digest: str) -> Lease:
        return Lease(digest, os.open(os.devnull, os.O_RDONLY))


class FakeRegistry:
    """Every name but "missing" is an adapter, whose digest and path are made of the name."""

    def __init__(self) -> None:
        self.store = FakeStore()

    def resolve(self, adapter_id: str) -> Version:
        if adapter_id == "missing":
            raise AdapterNotFound(f"no adapter is named {adapter_id!r}")
        path = self.store.paths[f"sha256:{adapter_id}"] = Path("/adapters") / adapter_id
        manifest = Manifest(
            digest=f"sha256:{adapter_id}",
            base_digest="sha256:base",
            base_name="base",
            rank=8,
            ranks=(8,),
            alpha=16.0,
            target_modules=("q_proj",),
            dtype="F32",
            num_parameters=1,
            size_bytes=1,
            created_at="2026-11-22T00:00:00Z",
            files={},
        )
        return Version(adapter_id, manifest.digest, path, (), manifest)


def base_model(directory: Path) -> BaseModel:
    config = {
        "model_type": "llama",
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 128,
    }
    TOKENIZER.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (directory / "chat_template.jinja").write_text(template)
    return BaseModel("tiny", directory, "sha256:base", ModelSpec.from_config(config))


def make_frontend(
    directory: Path,
    *engine_options: str,
    backoff: Backoff | None = None,
    registry: Registry | None = None,
    max_waiting: int = 256,
    **settings: Any,
) -> tuple[Frontend, Recorder]:
    recorder = Recorder()
    engine = EngineConfig(base_path=str(directory), base_digest="sha256:base", max_waiting=max_waiting)
    config = ServeConfig(engine=engine, base_name="tiny", store="/store", **settings)
    frontend = Frontend(
        config,
        base_model(directory),
        cast(Registry, FakeRegistry()) if registry is None else registry,
        recorder,
        engine_command=(*FAKE_ENGINE, *engine_options),
        backoff=backoff,
    )
    return frontend, recorder


@asynccontextmanager
async def started(directory: Path, *engine_options: str, **settings: Any) -> AsyncIterator[tuple[Frontend, Recorder]]:
    frontend, recorder = make_frontend(directory, *engine_options, **settings)
    await frontend.start()
    try:
        yield frontend, recorder
    finally:
        await frontend.stop(0.0)


def ids(text: str) -> list[int]:
    found: list[int] = TOKENIZER.encode(text, add_special_tokens=False).ids
    return found


def token_text(token: int) -> str:
    return str(TOKENIZER.decode([token]))


def request(prompt: Prompt, adapter: str = "", **fields: Any) -> GenerateRequest:
    sampling = fields.pop("sampling", SamplingParams())
    return GenerateRequest("r", adapter, prompt, sampling, fields.pop("max_tokens", None), **fields)


async def collect(frontend: Frontend, asked: GenerateRequest) -> list[Delta]:
    async with aclosing(frontend.generate(asked)) as deltas:
        return [delta async for delta in deltas]


def text(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def tokens(deltas: list[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]
