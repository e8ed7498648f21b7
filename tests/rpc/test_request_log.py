"""One line for each call through a real socket, however it ends, and no word of what was asked or answered."""

import asyncio
import io
import json
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

import grpc
import pytest

from adapters.errors import AdapterNotFound, InvalidAdapterId
from lorikeet.v1 import adapter_pb2, common_pb2, inference_pb2, server_pb2
from server.engine.messages import Serving, Timings
from server.errors import InvalidRequest, ServerBusy
from server.frontend.types import Delta, GenerateRequest, Usage
from server.logs import JsonFormatter
from server.rpc.request_log import RequestLog
from tests.rpc.fakes import DIGEST, FakeBackend, Running, Script, interrupt, serving

Stream = inference_pb2.StreamGenerateRequest
Whole = inference_pb2.GenerateRequest

PROMPT = "my-secret-prompt"
ANSWER = "a-secret-answer"

Ask = Callable[[Running], Coroutine[Any, Any, None]]


async def answer(request: GenerateRequest) -> AsyncGenerator[Delta]:
    timings = Timings(queue=0.25, load=0.125, prefill=0.5, decode=0.0)
    yield Delta(ANSWER[:5], [1, 2], DIGEST, usage=Usage(7, 4, 2), timings=timings, serving=Serving.MERGED)
    yield Delta(ANSWER[5:9], [3], DIGEST, serving=Serving.MERGED)
    usage, timings = Usage(7, 4, 4), Timings(queue=0.25, load=0.125, prefill=0.5, decode=1.5)
    yield Delta(ANSWER[9:], [4], DIGEST, None, "stop", usage, timings, Serving.MERGED)


async def one_then_hang(request: GenerateRequest) -> AsyncGenerator[Delta]:
    async for delta in answer(request):
        yield delta
        await asyncio.Event().wait()


def failing(error: Exception) -> Script:
    async def script(request: GenerateRequest) -> AsyncGenerator[Delta]:
        raise error
        yield

    return script


def lines_of(backend: FakeBackend, ask: Ask, **settings: Any) -> list[dict[str, Any]]:
    """What the log has once `ask` is done and the server has stopped."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    handler.setFormatter(JsonFormatter())
    logger = logging.Logger("requests")
    logger.addHandler(handler)

    async def scenario() -> None:
        async with serving(backend, observers=[RequestLog(logger)], **settings) as running:
            await ask(running)

    asyncio.run(scenario())
    assert settings.get("log_prompts") or "secret" not in text.getvalue()
    return [json.loads(line) for line in text.getvalue().splitlines()]


def only(lines: list[dict[str, Any]]) -> dict[str, Any]:
    (line,) = lines
    assert line["event"] == "request"
    assert line["level"] == "info"
    assert line["seconds"] >= 0
    return line


async def read(call: Any) -> None:
    """To its end, whichever that is."""
    try:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call
    except grpc.aio.AioRpcError:
        pass


@pytest.mark.parametrize("method", ["Generate", "StreamGenerate"])
def test_an_answer_is_told_by_its_numbers(method: str) -> None:
    async def ask(running: Running) -> None:
        request = {"Generate": Whole, "StreamGenerate": Stream}[method]
        await read(getattr(running.inference, method)(request(text=PROMPT, adapter_id="pirate@prod", request_id="a-1")))

    line = only(lines_of(FakeBackend(answer), ask))
    assert 0 <= line.pop("first_token_seconds") <= line.pop("seconds")
    del line["time"]
    assert line == {
        "level": "info",
        "logger": "requests",
        "event": "request",
        "request_id": "a-1",
        "method": method,
        "code": "OK",
        "adapter": "pirate",
        "adapter_id": "pirate@prod",
        "digest": DIGEST,
        "serving": "merged",
        "prompt_tokens": 7,
        "cached_prompt_tokens": 4,
        "completion_tokens": 4,
        "queue_seconds": 0.25,
        "adapter_load_seconds": 0.125,
        "finish_reason": "stop",
    }


def test_the_base_is_called_the_base() -> None:
    async def base(request: GenerateRequest) -> AsyncGenerator[Delta]:
        yield Delta("x", [1], "", None, "length", Usage(1, 0, 1), Timings(0.0, 0.0, 0.0, 0.0))

    line = only(lines_of(FakeBackend(base), lambda running: read(running.inference.Generate(Whole(text=PROMPT)))))
    assert line["serving"] == "base"
    assert not line.keys() & {"adapter", "adapter_id", "digest"}


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ServerBusy("64 are waiting", retry_after=1.0), ("RESOURCE_EXHAUSTED", "SERVER_BUSY", None, "64 are waiting")),
        (AdapterNotFound("no adapter 'x'"), ("NOT_FOUND", "ADAPTER_NOT_FOUND", None, "no adapter 'x'")),
        (InvalidRequest("messages", f"says {PROMPT}"), ("INVALID_ARGUMENT", "REQUEST_INVALID", "messages", None)),
    ],
)
@pytest.mark.parametrize("streams", [False, True])
def test_a_refusal_leaves_one_line_with_its_reason(
    error: Exception, expected: tuple[str | None, ...], streams: bool
) -> None:
    async def ask(running: Running) -> None:
        stub, fields = running.inference, {"text": PROMPT, "adapter_id": "x"}
        await read(stub.StreamGenerate(Stream(**fields)) if streams else stub.Generate(Whole(**fields)))

    line = only(lines_of(FakeBackend(failing(error)), ask))
    assert tuple(line.get(key) for key in ("code", "reason", "field", "error")) == expected
    assert line["adapter_id"] == "x"
    assert "adapter" not in line
    assert line["completion_tokens"] == 0


def test_what_never_reaches_the_engine_leaves_one_line_too() -> None:
    async def ask(running: Running) -> None:
        raw = running.channel.unary_unary("/lorikeet.v1.InferenceService/Generate")
        await read(raw(b"\xff\xff"))  # no message
        await read(raw(Whole(text=PROMPT).SerializeToString().replace(b"secret", b"\xf0\x9f\x98@@@")))  # no UTF-8
        await read(running.inference.Generate(Whole()))  # no prompt
        await read(running.inference.Generate(Whole(text=PROMPT, request_id="no spaces")))
        await read(running.inference.Generate(Whole(text=PROMPT), metadata=(("x-adapter", "other"),)))

    lines = lines_of(FakeBackend(answer), ask)
    assert [line["field"] for line in lines] == ["request", "text", "prompt", "request_id", "adapter_id"]
    assert {(line["code"], line["reason"]) for line in lines} == {("INVALID_ARGUMENT", "REQUEST_INVALID")}
    assert len({line["request_id"] for line in lines}) == 5


def test_a_method_that_there_is_not_leaves_a_line_and_no_label_of_its_own() -> None:
    methods = ["/lorikeet.v1.InferenceService/Generat", "/other.Service/Generate", "/" + "x" * 400 + "/y", "/lorikeet"]
    codes = []
    counted = []

    async def ask(running: Running) -> None:
        for method in methods:
            for call in (
                running.channel.unary_unary(method)(b"\xff"),
                running.channel.unary_stream(method)(b""),
                running.channel.stream_unary(method)(iter([b"a", b"b"])),
                running.channel.stream_stream(method)(iter([])),
            ):
                await read(call)
                codes.append(await call.code())
        for metric in running.metrics.registry.collect():
            counted.extend(sample for sample in metric.samples if sample.name == "lorikeet_requests_total")

    lines = lines_of(FakeBackend(answer), ask)
    assert codes == [grpc.StatusCode.UNIMPLEMENTED] * 16
    assert {(line["method"], line["code"], line["reason"]) for line in lines} == {
        ("_OTHER", "UNIMPLEMENTED", "METHOD_UNKNOWN")
    }
    assert [len(line["error"]) <= 300 for line in lines] == [True] * 16
    assert all(line["error"].startswith(methods[i // 4][:300]) for i, line in enumerate(lines))
    assert [(sample.labels, sample.value) for sample in counted] == [
        ({"method": "_OTHER", "code": "UNIMPLEMENTED", "adapter": ""}, 16)
    ]


def test_what_a_client_may_write_at_length_is_cut() -> None:
    error = InvalidAdapterId("x" * 100_000)
    request = Whole(text=PROMPT, adapter_id="y" * 100_000)
    line = only(lines_of(FakeBackend(failing(error)), lambda running: read(running.inference.Generate(request))))
    assert (line["adapter_id"], line["error"]) == ("y" * 300, "x" * 300)


def test_a_call_while_the_server_stops_leaves_a_line() -> None:
    is_stopping, may_stop = asyncio.Event(), asyncio.Event()

    class Stopping(FakeBackend):
        async def stop(self, grace: float) -> None:
            is_stopping.set()
            await super().stop(grace)

    async def ask(running: Running) -> None:
        interrupt()
        await is_stopping.wait()
        await read(running.inference.Generate(Whole(text=PROMPT)))
        may_stop.set()
        await running.task

    line = only(lines_of(Stopping(answer, stopping=may_stop), ask))
    assert (line["code"], line["reason"]) == ("UNAVAILABLE", "SHUTTING_DOWN")


def test_an_internal_error_names_the_id_under_which_the_log_has_it(caplog: pytest.LogCaptureFixture) -> None:
    ask: Ask = lambda running: read(running.inference.Generate(Whole(text=PROMPT)))  # noqa: E731
    line = only(lines_of(FakeBackend(failing(KeyError("broken"))), ask))
    assert (line["code"], line["reason"]) == ("INTERNAL", "INTERNAL")
    assert line["error"].rpartition(" ")[2] in caplog.text


@pytest.mark.parametrize("how", ["cancel", "disconnect", "deadline"])
def test_a_client_that_leaves_is_one_line_with_what_it_had(how: str) -> None:
    backend = FakeBackend(one_then_hang)

    async def ask(running: Running) -> None:
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{running.port}")
        await channel.channel_ready()
        timeout = 6.0 if how == "deadline" else None
        stream = type(running.inference)(channel).StreamGenerate(Stream(text=PROMPT), timeout=timeout)
        assert (await stream.read()).token_ids == [1, 2]
        if how == "cancel":
            stream.cancel()
        elif how == "disconnect":
            await channel.close(None)
        await backend.closed.wait()
        await channel.close(None)

    line = only(lines_of(backend, ask))
    assert line["code"] == ("DEADLINE_EXCEEDED" if how == "deadline" else "CANCELLED")
    assert (line["prompt_tokens"], line["completion_tokens"], line["queue_seconds"]) == (7, 2, 0.25)
    assert not line.keys() & {"finish_reason", "error"}


def test_calls_about_adapters_and_the_server_have_lines() -> None:
    async def ask(running: Running) -> None:
        await running.adapters.LoadAdapter(adapter_pb2.LoadAdapterRequest(adapter_id="pirate"))
        await read(running.adapters.GetAdapter(adapter_pb2.GetAdapterRequest(adapter_id="nobody")))
        await running.adapters.DeleteAdapter(adapter_pb2.DeleteAdapterRequest(name="json"))
        await running.server.GetServerInfo(server_pb2.GetServerInfoRequest())

    load, get, delete, info = lines_of(FakeBackend(), ask)
    assert (load["method"], load["code"], load["adapter"], load["digest"]) == ("LoadAdapter", "OK", "pirate", DIGEST)
    assert (get["method"], get["code"], get["adapter_id"]) == ("GetAdapter", "NOT_FOUND", "nobody")
    assert (delete["method"], delete["adapter"]) == ("DeleteAdapter", "json")
    assert info["method"] == "GetServerInfo"
    assert not info.keys() & {"adapter", "adapter_id", "completion_tokens"}


def test_prompts_and_answers_are_logged_on_request() -> None:
    turns = common_pb2.Chat(messages=[common_pb2.ChatMessage(role="user", content=PROMPT)])

    async def ask(running: Running) -> None:
        await read(running.inference.StreamGenerate(Stream(text=PROMPT)))
        await read(running.inference.Generate(Whole(messages=turns)))
        await read(running.inference.Generate(Whole(token_ids=common_pb2.TokenIds(ids=[5, 6]))))

    lines = lines_of(FakeBackend(answer), ask, log_prompts=True)
    assert [line["prompt"] for line in lines] == [PROMPT, [{"role": "user", "content": PROMPT}], [5, 6]]
    assert {line["completion"] for line in lines} == {ANSWER}


@pytest.mark.parametrize(
    ("given", "is_taken"),
    [("trace/7==", True), ("x" * 128, True), ("x" * 129, False), ("two words", False), ("", False), (None, False)],
)
def test_the_request_id_of_the_metadata_is_taken_where_it_is_sane(given: str | None, is_taken: bool) -> None:
    found: list[str] = []

    async def ask(running: Running) -> None:
        metadata = () if given is None else (("x-request-id", given),)
        call = running.inference.StreamGenerate(Stream(text=PROMPT), metadata=metadata)
        found.extend([message.request_id async for message in call])
        trailing = await call.trailing_metadata()
        found.append(dict(trailing)["x-request-id"])

    line = only(lines_of(FakeBackend(answer), ask))
    assert len(found) == 4
    assert set(found) == {line["request_id"]}
    assert (line["request_id"] == given) == is_taken
    assert is_taken or len(line["request_id"]) == 32


def test_a_refused_call_tells_its_id_and_the_message_s_own_goes_first() -> None:
    async def ask(running: Running) -> None:
        metadata = (("x-request-id", "outer"),)
        for request in (Whole(text=PROMPT), Whole(text=PROMPT, request_id="inner")):
            call = running.inference.Generate(request, metadata=metadata)
            await read(call)
            trailing = dict(await call.trailing_metadata())
            assert trailing["x-request-id"] == (request.request_id or "outer")
            assert "grpc-status-details-bin" in trailing

    lines = lines_of(FakeBackend(failing(ServerBusy("full"))), ask)
    assert [line["request_id"] for line in lines] == ["outer", "inner"]
