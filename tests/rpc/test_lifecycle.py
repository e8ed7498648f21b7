"""Starting and stopping: ports, health, reflection, signals, the grace period."""

import asyncio
import socket
import time
from collections.abc import AsyncGenerator

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status
from prometheus_client.parser import text_string_to_metric_families

from adapters.errors import LorikeetError
from lorikeet.v1 import adapter_pb2, inference_pb2, server_pb2
from server.errors import BaseModelError, ConfigError
from server.frontend.types import Delta, GenerateRequest
from server.rpc.lifecycle import SERVICES
from tests.rpc.fakes import DIGEST, FakeBackend, NotStarted, Running, interrupt, last_delta, serving

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def watch(running: Running, service: str = "") -> "grpc.aio.UnaryStreamCall[object, health_pb2.HealthCheckResponse]":
    return health_pb2_grpc.HealthStub(running.channel).Watch(health_pb2.HealthCheckRequest(service=service))


class Held:
    """A script that says one word, then waits for `go`."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.begun = asyncio.Semaphore(0)  # released once a request

    async def __call__(self, request: GenerateRequest) -> AsyncGenerator[Delta]:
        self.begun.release()
        yield Delta("one", [1], DIGEST)
        await self.go.wait()
        yield last_delta(1, text=" two")


def test_health_follows_the_engine_for_every_service() -> None:
    async def scenario() -> None:
        backend = FakeBackend()
        async with serving(backend) as running:
            names = ["", *(service.full_name for service in SERVICES)]
            watches = [watch(running, name) for name in names]
            assert {(await call.read()).status for call in watches} == {SERVING}
            backend.set_ready(False)
            assert {(await call.read()).status for call in watches} == {NOT_SERVING}
            backend.set_ready(True)
            assert {(await call.read()).status for call in watches} == {SERVING}
            for call in watches:
                call.cancel()

    asyncio.run(scenario())


@pytest.mark.parametrize("enabled", [True, False])
def test_reflection_tells_the_contract_when_enabled(enabled: bool) -> None:
    def services(port: int) -> list[str]:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            return list(ProtoReflectionDescriptorDatabase(channel).get_services())

    async def scenario() -> None:
        async with serving(FakeBackend(), reflection=enabled) as running:
            if enabled:
                found = await asyncio.to_thread(services, running.port)
                assert {service.full_name for service in SERVICES} <= set(found)
                assert "grpc.health.v1.Health" in found
            else:
                with pytest.raises(grpc.RpcError) as caught:
                    await asyncio.to_thread(services, running.port)
                assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED  # type: ignore[attr-defined]

    asyncio.run(scenario())


def test_the_metrics_page_is_served_on_its_own_port() -> None:
    async def page(port: int) -> str:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
        body = (await reader.read()).partition(b"\r\n\r\n")[2]
        writer.close()
        return body.decode()

    async def scenario() -> None:
        async with serving(FakeBackend()) as running:
            await running.inference.Generate(inference_pb2.GenerateRequest(text="Hi"))
            families = list(text_string_to_metric_families(await page(running.metrics_port)))
            samples = {sample.name: sample.value for family in families for sample in family.samples}
            assert samples["lorikeet_requests_total"] == 1
            assert samples["lorikeet_draining"] == 0

    asyncio.run(scenario())


def test_sigterm_lets_running_calls_finish_and_refuses_new_ones() -> None:
    async def scenario() -> None:
        script = Held()
        backend = FakeBackend(script, stopping=script.go)
        async with serving(backend) as running:
            health = watch(running)
            assert (await health.read()).status == SERVING
            stream = running.inference.StreamGenerate(inference_pb2.StreamGenerateRequest(text="Hi"))
            whole = asyncio.ensure_future(running.inference.Generate(inference_pb2.GenerateRequest(text="Hi")))
            assert (await stream.read()).text == "one"
            await script.begun.acquire()
            await script.begun.acquire()

            interrupt()
            assert (await health.read()).status == NOT_SERVING
            refused = running.inference.Generate(inference_pb2.GenerateRequest(text="Hi"))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await refused
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
            status = await rpc_status.aio.from_call(refused)
            info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
            assert status.details[0].Unpack(info)
            assert status.details[1].Unpack(retry)
            assert info.reason == "SHUTTING_DOWN"
            with pytest.raises(grpc.aio.AioRpcError):
                await running.adapters.ListAdapters(adapter_pb2.ListAdaptersRequest())
            assert (await running.server.GetServerInfo(server_pb2.GetServerInfoRequest())).draining
            assert running.value("lorikeet_draining") == 1

            script.go.set()
            assert (await stream.read()).text == " two"
            assert await stream.code() == grpc.StatusCode.OK
            assert (await whole).text == "one two"
            await running.task
        assert backend.stops[0] == 20.0

    asyncio.run(scenario())


def test_what_runs_past_the_grace_period_is_ended() -> None:
    async def scenario() -> None:
        backend = FakeBackend(Held())
        async with serving(backend, grace=0.3) as running:
            stream = running.inference.StreamGenerate(inference_pb2.StreamGenerateRequest(text="Hi"))
            await stream.read()
            started = time.monotonic()
            interrupt()
            await running.task
            assert 0.3 <= time.monotonic() - started < 10  # far below what a stuck stop would take
            assert await stream.code() != grpc.StatusCode.OK
            assert backend.closed.is_set()

    asyncio.run(scenario())


def test_a_second_signal_ends_at_once() -> None:
    async def scenario() -> None:
        script = Held()
        backend = FakeBackend(script, stopping=asyncio.Event())
        async with serving(backend) as running:
            stream = running.inference.StreamGenerate(inference_pb2.StreamGenerateRequest(text="Hi"))
            await stream.read()
            health = watch(running)
            interrupt()
            while (await health.read()).status != NOT_SERVING:
                pass
            interrupt()
            async with asyncio.timeout(10):  # grace is 20
                await running.task
        assert backend.stops == [20.0, 0.0]

    asyncio.run(scenario())


def test_a_signal_while_the_model_loads_ends_the_server() -> None:
    async def scenario() -> None:
        backend = FakeBackend(on_start=interrupt, starting=asyncio.Event())
        with pytest.raises(NotStarted):
            async with serving(backend):
                pytest.fail("it must not get ready")
        assert backend.stops == [0.0]

    asyncio.run(scenario())


def test_the_server_answers_not_serving_while_the_model_loads() -> None:
    async def scenario(port: int) -> None:
        backend = FakeBackend(starting=asyncio.Event())

        async def probe() -> None:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                stub = health_pb2_grpc.HealthStub(channel)
                answer = await stub.Check(health_pb2.HealthCheckRequest(), wait_for_ready=True)
                assert answer.status == NOT_SERVING
            assert backend.starting is not None
            backend.starting.set()

        probing = asyncio.create_task(probe())
        async with serving(backend, port=port) as running:
            assert running.port == port
        await probing

    with socket.socket() as holder:  # bound, not listening: nobody else is given the port, and the server may have it
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        asyncio.run(scenario(holder.getsockname()[1]))


def test_an_engine_that_does_not_start_is_told_and_nothing_stays_behind() -> None:
    async def scenario() -> None:
        backend = FakeBackend(start_error=BaseModelError("no weights in the directory"))
        with pytest.raises(BaseModelError, match="no weights"):
            async with serving(backend):
                pytest.fail("it must not get ready")
        assert backend.stops == [0.0]

    asyncio.run(scenario())


@pytest.mark.parametrize("setting", ["port", "metrics_port"])
def test_a_port_in_use_is_named(setting: str) -> None:
    async def scenario(port: int) -> None:
        backend = FakeBackend()
        with pytest.raises(ConfigError, match=rf"^{setting}: .*127\.0\.0\.1 port {port}: Address already in use"):
            async with serving(backend, **{setting: port}):
                pytest.fail("it must not start")
        assert backend.info is None  # no model was loaded first

    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        asyncio.run(scenario(holder.getsockname()[1]))


@pytest.mark.parametrize(
    "settings",
    [{"port": 70000}, {"host": "203.0.113.1"}, {"host": "no-such-host.invalid"}, {"metrics_host": "203.0.113.1"}],
)
def test_an_address_that_cannot_be_had_is_a_config_error(settings: dict[str, object]) -> None:
    async def scenario() -> None:
        with pytest.raises(LorikeetError) as caught:
            async with serving(FakeBackend(), **settings):
                pytest.fail("it must not start")
        assert isinstance(caught.value, ConfigError)
        assert str(next(iter(settings.values()))) in caught.value.message

    asyncio.run(scenario())
