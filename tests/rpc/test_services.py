"""The services through a real socket: what comes back, what goes down, what each failure becomes."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from adapters.errors import AdapterNotFound, InvalidAdapter, LorikeetError
from lorikeet.v1 import adapter_pb2, common_pb2, inference_pb2, server_pb2
from server.engine.messages import SamplingParams, TokenLogprob
from server.errors import EngineUnavailable, ServerBusy
from server.frontend.types import ChatMessage, Delta, GenerateRequest
from tests.rpc.fakes import DIGEST, FakeBackend, last_delta, serving

Stream = inference_pb2.StreamGenerateRequest
Whole = inference_pb2.GenerateRequest


async def failure(call: Any) -> tuple[grpc.StatusCode, str, dict[str, Any]]:
    """The code, message and details (by type) of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (drain(call) if hasattr(call, "__aiter__") else call)
    status = await rpc_status.aio.from_call(call)
    return caught.value.code(), caught.value.details() or "", {} if status is None else unpack(status.details)


async def drain(stream: Any) -> None:
    async for _ in stream:
        pass


def unpack(details: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for detail in details:
        assert isinstance(detail, any_pb2.Any)
        name = detail.TypeName().rpartition(".")[2]
        found[name] = getattr(error_details_pb2, name)()
        detail.Unpack(found[name])
    return found


def test_a_stream_forwards_each_delta_and_ends_with_the_summary() -> None:
    async def scenario() -> None:
        backend = FakeBackend()
        async with serving(backend) as running:
            request = Stream(adapter_id="pirate@prod", text="Hi", request_id="call-1")
            messages = [message async for message in running.inference.StreamGenerate(request)]
            assert [message.text for message in messages] == ["Hel", "lo", ""]
            assert [list(message.token_ids) for message in messages] == [[1, 2], [3], []]
            assert {(message.adapter_digest, message.request_id) for message in messages} == {(DIGEST, "call-1")}
            assert [message.finish_reason for message in messages] == [0, 0, common_pb2.FINISH_REASON_STOP]
            assert not messages[0].HasField("usage")
            last = messages[-1]
            assert last.usage == common_pb2.Usage(prompt_tokens=3, cached_prompt_tokens=1, completion_tokens=3)
            assert last.timings == common_pb2.Timings(
                queue_seconds=0.25, adapter_load_seconds=0.125, prefill_seconds=0.5, decode_seconds=1.5
            )
            assert running.value(
                "lorikeet_requests_total", method="StreamGenerate", code="OK", adapter="pirate"
            ) == pytest.approx(1)
            assert running.value("lorikeet_request_queue_seconds_sum", method="StreamGenerate", code="OK") == 0.25
        assert backend.requests[0].adapter_id == "pirate@prod"

    asyncio.run(scenario())


def test_generate_joins_what_a_stream_would_have_sent() -> None:
    async def with_logprobs(request: GenerateRequest) -> AsyncGenerator[Delta]:
        yield Delta("a", [5], DIGEST, logprobs=[TokenLogprob(-0.5, [(5, -0.5), (6, -1.5)])])
        yield Delta("b", [7], DIGEST, logprobs=[TokenLogprob(-0.75, [])])
        yield last_delta(2, text="!")

    async def scenario() -> None:
        async with serving(FakeBackend(with_logprobs)) as running:
            answer = await running.inference.Generate(Whole(text="Hi"))
            assert (answer.text, list(answer.token_ids)) == ("ab!", [5, 7])
            assert [entry.drawn.token_id for entry in answer.logprobs] == [5, 7]
            assert [(top.token_id, top.logprob) for top in answer.logprobs[0].top] == [(5, -0.5), (6, -1.5)]
            assert answer.finish_reason == common_pb2.FINISH_REASON_STOP
            assert answer.adapter_digest == DIGEST
            assert len(answer.request_id) == 32  # made by the server
            streamed = [m async for m in running.inference.StreamGenerate(Stream(text="Hi"))]
            assert [entry for message in streamed for entry in message.logprobs] == list(answer.logprobs)

    asyncio.run(scenario())


def test_what_is_absent_is_told_from_zero() -> None:
    async def scenario() -> None:
        backend = FakeBackend()
        async with serving(backend) as running:
            sampling = common_pb2.Sampling(temperature=0, top_p=0, seed=0, logprobs=0, repetition_penalty=0)
            stopping = common_pb2.Stopping(max_tokens=0, stop_strings=["x"], stop_token_ids=[9], ignore_eos=True)
            await running.inference.Generate(Whole(token_ids=common_pb2.TokenIds(ids=[1, 2])))
            await running.inference.Generate(
                Whole(
                    messages=common_pb2.Chat(messages=[common_pb2.ChatMessage(role="user", content="Hi")]),
                    sampling=sampling,
                    stopping=stopping,
                )
            )
        plain, zeros = backend.requests
        assert (plain.prompt, plain.sampling, plain.max_tokens) == ([1, 2], SamplingParams(), None)
        assert zeros.prompt == [ChatMessage("user", "Hi")]
        assert zeros.sampling == SamplingParams(temperature=0, top_p=0, seed=0, logprobs=0, repetition_penalty=0)
        assert (zeros.max_tokens, zeros.stop_strings, zeros.stop_token_ids) == (0, ("x",), (9,))
        assert zeros.ignore_eos

    asyncio.run(scenario())


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("after_output", [False, True])
def test_errors_of_the_backend_keep_their_code_reason_and_retry_delay(streams: bool, after_output: bool) -> None:
    async def refuse(request: GenerateRequest) -> AsyncGenerator[Delta]:
        if after_output:
            yield Delta("a", [1], DIGEST)
            raise EngineUnavailable("the engine was lost", retry_after=2.0)
        raise ServerBusy("256 requests are waiting already", retry_after=1.5)

    async def scenario() -> None:
        async with serving(FakeBackend(refuse)) as running:
            stub = running.inference
            call = stub.StreamGenerate(Stream(text="Hi")) if streams else stub.Generate(Whole(text="Hi"))
            code, message, details = await failure(call)
            reason = "ENGINE_UNAVAILABLE" if after_output else "SERVER_BUSY"
            assert code == (grpc.StatusCode.UNAVAILABLE if after_output else grpc.StatusCode.RESOURCE_EXHAUSTED)
            assert message == ("the engine was lost" if after_output else "256 requests are waiting already")
            assert (details["ErrorInfo"].reason, details["ErrorInfo"].domain) == (reason, "lorikeet")
            assert details["RetryInfo"].retry_delay.ToNanoseconds() == (
                2_000_000_000 if after_output else 1_500_000_000
            )
            if not after_output:
                assert running.value("lorikeet_rejected_total", reason="SERVER_BUSY") == 1

    asyncio.run(scenario())


def test_an_unexpected_exception_says_nothing_but_an_id(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(request: GenerateRequest) -> AsyncGenerator[Delta]:
        raise KeyError("/secret/path")
        yield

    async def scenario() -> None:
        async with serving(FakeBackend(broken)) as running:
            code, message, details = await failure(running.inference.StreamGenerate(Stream(text="Hi")))
            assert code == grpc.StatusCode.INTERNAL
            assert "secret" not in message
            error_id = details["ErrorInfo"].metadata["error_id"]
            assert error_id in message
            assert error_id in caplog.text
            assert "/secret/path" in caplog.text
            assert running.value("lorikeet_requests_total", method="StreamGenerate", code="INTERNAL", adapter="") == 1

    asyncio.run(scenario())


def test_every_fault_of_an_adapter_is_listed() -> None:
    async def scenario() -> None:
        backend = FakeBackend(call_error=InvalidAdapter("2 faults", faults=["a.weight: NaN", "b.weight: shape"]))
        async with serving(backend) as running:
            code, _, details = await failure(
                running.adapters.LoadAdapter(adapter_pb2.LoadAdapterRequest(adapter_id="bad"))
            )
            assert code == grpc.StatusCode.FAILED_PRECONDITION
            faults = [violation.description for violation in details["PreconditionFailure"].violations]
            assert faults == ["a.weight: NaN", "b.weight: shape"]

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("request_", "metadata", "field"),
    [
        (Stream(), (), "prompt"),
        (Stream(text="x", request_id="no spaces"), (), "request_id"),
        (Stream(text="x", request_id="x" * 129), (), "request_id"),
        (Stream(text="x", adapter_id="a"), (("x-adapter", "b"),), "adapter_id"),
        (Stream(text="x"), (("x-adapter", "b"),), "adapter_id"),
    ],
)
def test_malformed_requests_name_their_field(
    request_: Stream, metadata: tuple[tuple[str, str], ...], field: str
) -> None:
    async def scenario() -> None:
        backend = FakeBackend()
        async with serving(backend) as running:
            call = running.inference.StreamGenerate(request_, metadata=metadata)
            code, message, details = await failure(call)
            assert code == grpc.StatusCode.INVALID_ARGUMENT
            assert message.startswith(f"{field}: ")
            assert [violation.field for violation in details["BadRequest"].field_violations] == [field]
        assert backend.requests == []

    asyncio.run(scenario())


def test_an_adapter_in_the_metadata_that_agrees_is_fine() -> None:
    async def scenario() -> None:
        async with serving(FakeBackend()) as running:
            await running.inference.Generate(Whole(text="x", adapter_id="a"), metadata=(("x-adapter", "a"),))

    asyncio.run(scenario())


def _bad_text(number: int, data: bytes) -> bytes:
    return bytes([number << 3 | 2, len(data)]) + data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (_bad_text(2, b"\xff\xfe"), "text: is not valid UTF-8"),
        (_bad_text(6, _bad_text(2, b"\xc3")), "stopping.stop_strings: is not valid UTF-8"),
        (b"\x12\x7f", "request: does not parse as lorikeet.v1.StreamGenerateRequest"),
        (b"\xff\xff\xff", "request: does not parse as lorikeet.v1.StreamGenerateRequest"),
    ],
)
def test_bytes_that_are_no_request(data: bytes, message: str) -> None:
    async def scenario() -> None:
        async with serving(FakeBackend()) as running:
            method = running.channel.unary_stream("/lorikeet.v1.InferenceService/StreamGenerate")
            code, said, details = await failure(method(data))
            assert (code, said) == (grpc.StatusCode.INVALID_ARGUMENT, message)
            assert details["ErrorInfo"].reason == "REQUEST_INVALID"
            assert (await running.inference.Generate(Whole(text="Hi"))).text == "Hello"  # it goes on

    asyncio.run(scenario())


def test_a_message_past_the_limit_is_refused() -> None:
    async def scenario() -> None:
        async with serving(FakeBackend(), max_message_bytes=1000) as running:
            code, _, _ = await failure(running.inference.Generate(Whole(text="x" * 1001)))
            assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert (await running.inference.Generate(Whole(text="x" * 900))).text == "Hello"

    asyncio.run(scenario())


def test_an_answer_past_the_limit_ends_the_call_alone(caplog: pytest.LogCaptureFixture) -> None:
    async def talk(request: GenerateRequest) -> AsyncGenerator[Delta]:
        yield Delta("x" * (2000 if request.request_id == "long" else 1), [1], DIGEST)
        yield last_delta(1)

    async def scenario() -> None:
        backend = FakeBackend(talk)
        async with serving(backend, max_message_bytes=1000) as running:
            call = running.inference.StreamGenerate(Stream(text="x", request_id="long"))
            code, _, _ = await failure(call)
            assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
            await backend.closed.wait()
            assert (await running.inference.Generate(Whole(text="x"))).text == "x"
        assert running.value("lorikeet_requests_total", method="StreamGenerate", code="CANCELLED", adapter="base") == 1
        assert "Traceback" not in caplog.text

    asyncio.run(scenario())


async def one_then_hang(request: GenerateRequest) -> AsyncGenerator[Delta]:
    yield Delta("a", [1], DIGEST)
    await asyncio.Event().wait()


@pytest.mark.parametrize("streams", [False, True])
def test_a_deadline_closes_the_generation(streams: bool) -> None:
    async def scenario() -> None:
        backend = FakeBackend(one_then_hang)
        async with serving(backend) as running:
            await running.channel.channel_ready()
            stub = running.inference
            if streams:
                stream = stub.StreamGenerate(Stream(text="Hi"), timeout=6)
                assert (await stream.read()).text == "a"
                with pytest.raises(grpc.aio.AioRpcError):
                    await stream.read()
                code = await stream.code()
            else:
                code, _, _ = await failure(stub.Generate(Whole(text="Hi"), timeout=6))
            assert code == grpc.StatusCode.DEADLINE_EXCEEDED
            await backend.closed.wait()
        method = "StreamGenerate" if streams else "Generate"
        labels = {"method": method, "code": "DEADLINE_EXCEEDED", "adapter": "base"}
        assert running.value("lorikeet_requests_total", **labels) == 1

    asyncio.run(scenario())


@pytest.mark.parametrize("how", ["cancel", "disconnect"])
def test_a_client_that_leaves_closes_the_generation(how: str) -> None:
    async def scenario() -> None:
        backend = FakeBackend(one_then_hang)
        async with serving(backend) as running:
            channel = grpc.aio.insecure_channel(f"127.0.0.1:{running.port}")
            stream = type(running.inference)(channel).StreamGenerate(Stream(text="Hi"))
            assert (await stream.read()).text == "a"
            if how == "cancel":
                stream.cancel()
            else:
                await channel.close(None)
            await backend.closed.wait()
            await channel.close(None)
        labels = {"method": "StreamGenerate", "code": "CANCELLED", "adapter": "base"}
        assert running.value("lorikeet_requests_total", **labels) == 1

    asyncio.run(scenario())


def test_a_client_that_does_not_read_stops_the_generation_and_others_go_on() -> None:
    produced = 0

    async def flood(request: GenerateRequest) -> AsyncGenerator[Delta]:
        nonlocal produced
        if request.request_id != "slow":
            yield last_delta(0)
            return
        while True:
            produced += 1
            yield Delta("x" * 10_000, [1], DIGEST)

    async def scenario() -> None:
        backend = FakeBackend(flood)
        async with serving(backend) as running:
            stream = running.inference.StreamGenerate(Stream(text="Hi", request_id="slow"))
            await stream.read()
            before = -1
            while produced != before:  # until the windows are full
                before = produced
                for _ in range(20):
                    await running.inference.Generate(Whole(text="Hi"))
            assert produced * 10_000 < 64 * 2**20
            backend.closed.clear()
            stream.cancel()
            await backend.closed.wait()  # though it was sending, not generating

    asyncio.run(scenario())


def test_a_client_that_does_not_read_for_too_long_is_let_go(caplog: pytest.LogCaptureFixture) -> None:
    async def flood(request: GenerateRequest) -> AsyncGenerator[Delta]:
        while True:
            yield Delta("x" * 10_000, [1], DIGEST)

    async def scenario() -> None:
        backend = FakeBackend(flood)
        async with serving(backend, stall_timeout=0.1) as running:
            stream = running.inference.StreamGenerate(Stream(text="Hi"))
            await stream.wait_for_connection()
            await backend.closed.wait()
            code, _, details = await failure(stream)  # what was sent, then why it ended
            assert code == grpc.StatusCode.ABORTED
            assert details["ErrorInfo"].reason == "STREAM_STALLED"
        assert running.value("lorikeet_requests_total", method="StreamGenerate", code="ABORTED", adapter="base") == 1
        assert "Traceback" not in caplog.text

    asyncio.run(scenario())


def test_a_whole_answer_past_the_limit_is_refused_and_counted_so(caplog: pytest.LogCaptureFixture) -> None:
    async def talk(request: GenerateRequest) -> AsyncGenerator[Delta]:
        yield Delta("x" * 2000, [1], DIGEST)
        yield last_delta(1)

    async def scenario() -> None:
        async with serving(FakeBackend(talk), max_message_bytes=1000) as running:
            code, message, details = await failure(running.inference.Generate(Whole(text="x")))
            assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "the limit is 1000" in message
            assert details["ErrorInfo"].reason == "ANSWER_TOO_LARGE"
        labels = {"method": "Generate", "code": "RESOURCE_EXHAUSTED", "adapter": "base"}
        assert running.value("lorikeet_requests_total", **labels) == 1
        assert "Traceback" not in caplog.text

    asyncio.run(scenario())


def test_adapters_are_listed_by_page_and_described() -> None:
    async def scenario() -> None:
        backend = FakeBackend()
        async with serving(backend) as running:
            first = await running.adapters.ListAdapters(adapter_pb2.ListAdaptersRequest(page_size=1))
            rest = await running.adapters.ListAdapters(
                adapter_pb2.ListAdaptersRequest(page_token=first.next_page_token)
            )
            assert [adapter.name for adapter in (*first.adapters, *rest.adapters)] == ["json", "pirate"]
            assert rest.next_page_token == ""
            got = (await running.adapters.GetAdapter(adapter_pb2.GetAdapterRequest(adapter_id="pirate"))).adapter
            assert got == rest.adapters[0]
            assert (got.name, got.digest, list(got.labels)) == ("pirate", DIGEST, ["latest", "prod"])
            assert (got.rank, got.alpha, got.dtype, got.method) == (16, 32.0, "F32", "qlora")
            assert list(got.target_modules) == ["down_proj", "q_proj"]
            assert (got.size_bytes, got.num_parameters) == (4096, 1000)
            assert got.create_time.ToJsonString() == "2026-11-22T04:05:06.789Z"
            assert got.residency == adapter_pb2.Adapter.RESIDENCY_DISK

    asyncio.run(scenario())


def test_load_and_unload_reach_the_backend() -> None:
    async def scenario() -> None:
        backend = FakeBackend()
        async with serving(backend) as running:
            loaded = await running.adapters.LoadAdapter(adapter_pb2.LoadAdapterRequest(adapter_id="pirate"))
            assert loaded.adapter.residency == adapter_pb2.Adapter.RESIDENCY_DEVICE
            await running.adapters.UnloadAdapter(adapter_pb2.UnloadAdapterRequest(adapter_id="pirate"))
            assert (backend.loaded, backend.unloaded) == ([], [("pirate", False)])
            code, _, details = await failure(
                running.adapters.GetAdapter(adapter_pb2.GetAdapterRequest(adapter_id="nobody"))
            )
            assert code == grpc.StatusCode.NOT_FOUND
            assert details["ErrorInfo"].reason == "ADAPTER_NOT_FOUND"

    asyncio.run(scenario())


def test_names_that_do_not_exist_make_no_metric_labels() -> None:
    async def unknown(request: GenerateRequest) -> AsyncGenerator[Delta]:
        raise AdapterNotFound(f"no adapter {request.adapter_id!r}")
        yield

    async def scenario() -> None:
        async with serving(FakeBackend(unknown)) as running:
            for index in range(3):
                await failure(running.inference.Generate(Whole(text="x", adapter_id=f"guess-{index}")))
            assert running.value("lorikeet_requests_total", method="Generate", code="NOT_FOUND", adapter="") == 3
            assert running.value("lorikeet_rejected_total", reason="ADAPTER_NOT_FOUND") == 3

    asyncio.run(scenario())


def test_server_info_tells_the_base_and_the_limits() -> None:
    async def scenario() -> None:
        async with serving(FakeBackend(), max_message_bytes=12345) as running:
            info = await running.server.GetServerInfo(server_pb2.GetServerInfoRequest())
            assert (info.base.name, info.base.family, info.base.vocab_size) == ("tiny", "llama", 100)
            assert info.base.digest.startswith("sha256:bb")
            assert (info.device, info.dtype, info.quantization, info.draining) == ("cpu", "bfloat16", "", False)
            assert (info.limits.max_model_len, info.limits.kv_cache_tokens) == (2048, 1600)
            assert (info.limits.max_message_bytes, info.limits.max_waiting) == (12345, 256)

    asyncio.run(scenario())


def test_a_code_the_tree_does_not_set_is_internal() -> None:
    async def scenario() -> None:
        async with serving(FakeBackend(call_error=LorikeetError("ours"))) as running:
            code, message, _ = await failure(running.adapters.LoadAdapter(adapter_pb2.LoadAdapterRequest()))
            assert (code, message) == (grpc.StatusCode.INTERNAL, "ours")

    asyncio.run(scenario())
