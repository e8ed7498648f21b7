"""Relabelling, deleting and collecting under a server's feet: a real store, the real front end and a real socket, with
an engine process that has no model."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from adapters.registry import AdapterRegistry
from adapters.store import AdapterStore
from adapters.stores import Store, open_store
from lorikeet.v1 import adapter_pb2, common_pb2, inference_pb2
from lorikeet.v1.adapter_pb2_grpc import AdapterServiceStub
from lorikeet.v1.inference_pb2_grpc import InferenceServiceStub
from server.frontend.frontend import Frontend
from server.metrics import Metrics
from server.rpc.lifecycle import run
from tests.adapters.builders import BASE_DIGEST, PUBLISH, write_adapter
from tests.adapters.s3_server import S3Server
from tests.frontend.fake_engine import ECHO, HOLD
from tests.frontend.harness import FAKE_ENGINE, base_model
from tests.rpc.fakes import BASE, CONFIG, interrupt
from tests.rpc.test_services import failure

Adapter = adapter_pb2.Adapter


@dataclass
class World:
    """A server over a store with two versions of "a", the old one and `latest`, the new one."""

    store: AdapterStore
    old: str
    new: str
    inference: InferenceServiceStub
    adapters: AdapterServiceStub
    metrics: Metrics

    def hold(self) -> Any:
        """A stream that sends one token and goes on until it is cancelled."""
        return self.inference.StreamGenerate(self._request(inference_pb2.StreamGenerateRequest, HOLD))

    async def served_by(self) -> str:
        answer = await self.inference.Generate(self._request(inference_pb2.GenerateRequest, ECHO))
        return str(answer.adapter_digest)

    def _request(self, kind: Any, opcode: int) -> Any:
        return kind(adapter_id="a", token_ids=common_pb2.TokenIds(ids=[opcode, 5]))

    async def get(self, digest: str) -> Adapter:
        request = adapter_pb2.GetAdapterRequest(adapter_id=f"a@{digest}")
        return (await self.adapters.GetAdapter(request)).adapter

    async def move(self, digest: str, **expected: str) -> None:
        request = adapter_pb2.MoveAdapterLabelRequest(name="a", label="latest", digest=digest, **expected)
        assert (await self.adapters.MoveAdapterLabel(request)).adapter.digest == digest


@asynccontextmanager
async def serving_from(store: Store, directory: Path) -> AsyncIterator[tuple[grpc.aio.Channel, Metrics]]:
    """A server over a store, and a channel to it."""
    config = replace(CONFIG, grace=0.0)
    metrics = Metrics()
    registry = AdapterRegistry(store, BASE_DIGEST)
    frontend = Frontend(config, base_model(directory), registry, metrics, engine_command=FAKE_ENGINE)
    started: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    serving = run(
        config, BASE, frontend, frontend.catalog, metrics, on_started=lambda port, _: started.set_result(port)
    )
    task = asyncio.create_task(serving)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{await started}") as channel:
        yield channel, metrics
        interrupt()
        await task


@asynccontextmanager
async def world(directory: Path) -> AsyncIterator[World]:
    store = AdapterStore(directory / "store")
    old, new = (
        store.publish(write_adapter(directory / str(seed), seed=seed), "a", **PUBLISH).digest for seed in range(2)
    )
    async with serving_from(store, directory) as (channel, metrics):
        yield World(store, old, new, InferenceServiceStub(channel), AdapterServiceStub(channel), metrics)


async def code_of(call: Any) -> grpc.StatusCode:
    """Of a call that may fail."""
    found: grpc.StatusCode = await call.code()
    return found


def test_who_runs_stays_on_its_version_and_who_comes_gets_the_new_one(tmp_path: Path) -> None:
    """The label is moved, moved back and rolled back, and the name deleted, while streams run on each version."""

    async def scenario() -> None:
        async with world(tmp_path) as server:
            streams = [(server.new, server.hold())]
            assert (await streams[0][1].read()).adapter_digest == server.new
            for turn in range(4):
                digest = (server.old, server.new)[turn % 2]
                if turn < 3:
                    await server.move(digest)
                else:
                    request = adapter_pb2.RollbackAdapterLabelRequest(name="a")
                    assert (await server.adapters.RollbackAdapterLabel(request)).adapter.digest == digest
                assert await server.served_by() == digest
                streams.append((digest, server.hold()))
                assert (await streams[-1][1].read()).adapter_digest == digest
            assert {(await server.get(digest)).tiers[0].num_leases for digest in (server.old, server.new)} == {2, 3}
            server.store.remove("a")
            code, _, _ = await failure(server.hold())
            assert code == grpc.StatusCode.NOT_FOUND
            # The streams of both versions live: the first goes on to hold the files of its own.
            assert sorted(server.store.gc().leased) == sorted((server.old, server.new))
            for _, stream in streams:
                assert not stream.done()
                stream.cancel()

    asyncio.run(scenario())


def test_the_files_of_what_is_in_memory_stay_until_it_is_unloaded(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as server:
            await server.served_by()
            server.store.remove("a")
            assert (server.store.gc().leased, server.store.gc().removed) == ([server.new], [])
            source = tmp_path / "1"
            assert server.store.publish(source, "a", **PUBLISH).digest == server.new
            await server.adapters.UnloadAdapter(adapter_pb2.UnloadAdapterRequest(adapter_id="a"))
            server.store.remove("a")
            await failure(server.hold())  # a turn of the loop
            assert server.store.gc().removed == [server.new]

    asyncio.run(scenario())


def test_a_label_that_somebody_else_moved_is_not_moved(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as server:
            server.store.move_label("a", "latest", server.old)
            request = adapter_pb2.MoveAdapterLabelRequest(
                name="a", label="latest", digest=server.old, expected_digest=server.new
            )
            code, _, details = await failure(server.adapters.MoveAdapterLabel(request))
            assert (code, details["ErrorInfo"].reason) == (grpc.StatusCode.ABORTED, "LABEL_MOVED")
            await server.move(server.new, expected_digest=server.old)
            code, _, details = await failure(
                server.adapters.MoveAdapterLabel(
                    adapter_pb2.MoveAdapterLabelRequest(
                        name="a", label="prod", digest=server.old, expected_digest=server.old
                    )
                )
            )
            assert code == grpc.StatusCode.ABORTED, "there is no such label yet"
            request = adapter_pb2.MoveAdapterLabelRequest(name="a", label="prod", digest=server.old, expected_digest="")
            assert list((await server.adapters.MoveAdapterLabel(request)).adapter.labels) == ["prod"]

    asyncio.run(scenario())


def test_an_unload_drains_or_refuses(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as server:
            stream = server.hold()
            await stream.read()
            refusing = server.adapters.UnloadAdapter(adapter_pb2.UnloadAdapterRequest(adapter_id="a"))
            code, _, details = await failure(refusing)
            assert (code, details["ErrorInfo"].reason) == (grpc.StatusCode.FAILED_PRECONDITION, "ADAPTER_IN_USE")
            draining = server.adapters.StreamUnloadAdapter(
                adapter_pb2.StreamUnloadAdapterRequest(adapter_id="a", mode=adapter_pb2.UNLOAD_MODE_DRAIN)
            )
            assert (await draining.read()).progress.stage == adapter_pb2.Progress.STAGE_DRAINING
            assert (await server.get(server.new)).residency == Adapter.RESIDENCY_DEVICE
            stream.cancel()
            last = await draining.read()
            assert (last.adapter.digest, last.adapter.residency) == (server.new, Adapter.RESIDENCY_DISK)
            assert await draining.read() == grpc.aio.EOF

    asyncio.run(scenario())


@pytest.mark.parametrize("version", [False, True])
def test_a_deletion_drains_or_refuses(tmp_path: Path, version: bool) -> None:
    """Of the name, or of its new version once no label points to it."""

    async def scenario() -> None:
        async with world(tmp_path) as server:
            stream = server.hold()
            await stream.read()
            digest = server.new if version else ""
            if version:
                code, _, details = await failure(
                    server.adapters.DeleteAdapter(
                        adapter_pb2.DeleteAdapterRequest(name="a", digest=digest, mode=adapter_pb2.UNLOAD_MODE_DRAIN)
                    )
                )
                assert (code, details["ErrorInfo"].reason) == (grpc.StatusCode.FAILED_PRECONDITION, "ADAPTER_IN_USE")
                await server.move(server.old)
            refusing = server.adapters.DeleteAdapter(adapter_pb2.DeleteAdapterRequest(name="a", digest=digest))
            code, message, _ = await failure(refusing)
            assert code == grpc.StatusCode.FAILED_PRECONDITION
            assert "1 request" in message
            assert server.store.resolve(f"a@{server.new}").digest == server.new, "nothing has happened"
            get = adapter_pb2.GetAdapterRequest(adapter_id=f"a@{server.new}")
            draining = asyncio.ensure_future(
                server.adapters.DeleteAdapter(
                    adapter_pb2.DeleteAdapterRequest(name="a", digest=digest, mode=adapter_pb2.UNLOAD_MODE_DRAIN)
                )
            )
            while await code_of(server.adapters.GetAdapter(get)) != grpc.StatusCode.NOT_FOUND:
                assert not draining.done()  # no new one finds it while the old one runs
            assert not draining.done()
            stream.cancel()
            gone = list((await draining).digests)
            assert gone == ([server.new] if version else [server.new, server.old])

    asyncio.run(scenario())


def test_a_pinned_adapter_says_so_until_it_is_unpinned(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as server:
            pinned = (await server.adapters.PinAdapter(adapter_pb2.PinAdapterRequest(adapter_id="a"))).adapter
            assert (pinned.pinned, [tier.residency for tier in pinned.tiers]) == (
                True,
                [Adapter.RESIDENCY_DEVICE, Adapter.RESIDENCY_HOST],
            )
            assert server.metrics.registry.get_sample_value("lorikeet_adapters_pinned", {"tier": "device"}) == 1
            unpinned = (await server.adapters.UnpinAdapter(adapter_pb2.UnpinAdapterRequest(adapter_id="a"))).adapter
            assert (unpinned.pinned, unpinned.residency) == (False, Adapter.RESIDENCY_DEVICE)

    asyncio.run(scenario())


def test_a_load_tells_how_far_it_is(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as server:
            request = adapter_pb2.StreamLoadAdapterRequest(adapter_id="a")
            *told, last = [message async for message in server.adapters.StreamLoadAdapter(request)]
            assert [(event.progress.stage, event.progress.done_bytes) for event in told] == [
                (adapter_pb2.Progress.STAGE_READING, 0),
                (adapter_pb2.Progress.STAGE_READING, 8),
            ]
            assert (last.adapter.digest, last.adapter.residency) == (server.new, Adapter.RESIDENCY_DEVICE)

    asyncio.run(scenario())


def test_a_store_in_a_bucket_goes_away_and_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in memory is served all the while; what is not is refused, with a time to come back, until it is back."""
    bucket = S3Server()
    bucket.tell(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "server"))
    bucket.make_bucket("adapters")
    location = "s3://adapters/all"

    def publish(seed: int, name: str) -> str:
        """From another machine, whose cache is its own."""
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
        version = open_store(location).publish(write_adapter(tmp_path / name, seed=seed), name, **PUBLISH)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "server"))
        return version.digest

    digests = {name: publish(seed, name) for seed, name in enumerate(("hot", "cold"))}

    async def scenario() -> None:
        async with serving_from(open_store(location), tmp_path) as (channel, metrics):
            stub = InferenceServiceStub(channel)

            def ask(name: str) -> Any:
                prompt = common_pb2.TokenIds(ids=[ECHO, 5])
                return stub.Generate(inference_pb2.GenerateRequest(adapter_id=name, token_ids=prompt))

            load = AdapterServiceStub(channel).StreamLoadAdapter(adapter_pb2.StreamLoadAdapterRequest(adapter_id="hot"))
            stages = [event.progress.stage async for event in load if event.HasField("progress")]
            assert stages[0] == adapter_pb2.Progress.STAGE_FETCHING
            assert (await ask("hot")).adapter_digest == digests["hot"]
            bucket.stop()
            for _ in range(3):
                assert (await ask("hot")).adapter_digest == digests["hot"]
                code, _, details = await failure(ask("cold"))
                assert (code, details["ErrorInfo"].reason) == (grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE")
                assert details["RetryInfo"].retry_delay.ToSeconds() > 0
            assert metrics.registry.get_sample_value("lorikeet_store_up") == 0
            bucket.start()
            while metrics.registry.get_sample_value("lorikeet_store_up") == 0:
                await asyncio.sleep(0.1)
                await code_of(ask("cold"))
            assert (await ask("cold")).adapter_digest == digests["cold"]

    try:
        asyncio.run(scenario())
    finally:
        bucket.stop()
