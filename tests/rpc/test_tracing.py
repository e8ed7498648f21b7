"""Spans of calls through a real socket, as OpenTelemetry's own exporter gets them; and none where none are wanted."""

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from lorikeet.v1 import common_pb2, inference_pb2, server_pb2
from server.errors import ConfigError, EngineUnavailable, ServerBusy
from server.rpc.observers import open_tracing
from server.rpc.record import CallRecord
from server.rpc.tracing import Tracing
from tests.rpc.fakes import DIGEST, FakeBackend, Running, serving
from tests.rpc.test_request_log import ANSWER, PROMPT, answer, failing, read
from tests.support.collector import collecting

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"  # the W3C's own example
SAMPLED = (("traceparent", f"00-{TRACE}-{PARENT}-01"),)


class Records:
    """Keeps what an observer hears."""

    def __init__(self) -> None:
        self.records: list[CallRecord] = []

    def ended(self, record: CallRecord) -> None:
        self.records.append(record)


def spans_of(
    backend: FakeBackend, ask: Callable[[Running], Coroutine[Any, Any, None]]
) -> tuple[list[ReadableSpan], list[CallRecord]]:
    """The spans that `ask` leaves, each after its children, and the records as a log would see them."""
    exporter, records = InMemorySpanExporter(), Records()
    tracing = Tracing(exporter, "the-base")

    async def scenario() -> None:
        async with serving(backend, observers=[tracing, records]) as running:
            await ask(running)

    asyncio.run(scenario())
    tracing.close(60.0)
    return list(exporter.get_finished_spans()), records.records


def test_a_generation_is_a_span_below_the_caller_s_with_its_phases_below_it() -> None:
    sampling = common_pb2.Sampling(temperature=0.5, top_k=3)
    request = inference_pb2.StreamGenerateRequest(
        messages=common_pb2.Chat(messages=[common_pb2.ChatMessage(role="user", content=PROMPT)]),
        adapter_id="pirate@prod",
        request_id="a-1",
        sampling=sampling,
        stopping=common_pb2.Stopping(max_tokens=9),
    )

    async def ask(running: Running) -> None:
        await read(running.inference.StreamGenerate(request, metadata=SAMPLED))

    spans, (record,) = spans_of(FakeBackend(answer), ask)
    *phases, span = spans
    assert span.name == "lorikeet.v1.InferenceService/StreamGenerate"
    assert span.kind is SpanKind.SERVER
    assert span.status.status_code is StatusCode.UNSET
    assert span.parent is not None
    assert f"{span.context.trace_id:032x}" == TRACE == record.trace_id
    assert f"{span.parent.span_id:016x}" == PARENT
    found = dict(span.attributes or {})
    assert found.pop("gen_ai.latency.e2e") == record.seconds
    assert 0 <= found.pop("gen_ai.latency.time_to_first_token") <= record.seconds
    assert found == {
        "rpc.system.name": "grpc",
        "rpc.method": "lorikeet.v1.InferenceService/StreamGenerate",
        "rpc.response.status_code": "OK",
        "lorikeet.request.id": "a-1",
        "lorikeet.adapter.id": "pirate@prod",
        "lorikeet.adapter.name": "pirate",
        "lorikeet.adapter.digest": DIGEST,
        "lorikeet.adapter.load_seconds": 0.125,
        "lorikeet.serving": "merged",
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "lorikeet",
        "gen_ai.request.model": "pirate@prod",
        "gen_ai.request.max_tokens": 9,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.top_k": 3,
        "gen_ai.response.model": "the-base",
        "gen_ai.response.id": "a-1",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": 7,
        "gen_ai.usage.cache_read.input_tokens": 4,
        "gen_ai.usage.output_tokens": 4,
        "gen_ai.latency.time_in_queue": 0.25,
        "gen_ai.latency.time_in_model_prefill": 0.5,
        "gen_ai.latency.time_in_model_decode": 1.5,
    }
    assert [phase.name for phase in phases] == ["queue", "prefill", "decode"]
    assert all(phase.parent == span.context for phase in phases)
    assert phases[1].end_time == phases[2].start_time
    assert phases[2].end_time - phases[2].start_time == 1_500_000_000  # type: ignore[operator]
    assert PROMPT not in str([span.to_json() for span in spans])
    assert ANSWER not in str([span.to_json() for span in spans])


def test_a_caller_that_does_not_sample_is_obeyed_and_one_without_a_trace_begins_one() -> None:
    async def ask(running: Running) -> None:
        unsampled = (("traceparent", f"00-{TRACE}-{PARENT}-00"),)
        await running.server.GetServerInfo(server_pb2.GetServerInfoRequest(), metadata=unsampled)
        for metadata in ((), (("traceparent", "nonsense"),)):
            await running.server.GetServerInfo(server_pb2.GetServerInfoRequest(), metadata=metadata)

    spans, records = spans_of(FakeBackend(), ask)
    assert records[0].trace_id == TRACE
    assert [f"{span.context.trace_id:032x}" for span in spans] == [record.trace_id for record in records[1:]]
    assert len({record.trace_id for record in records}) == 3
    assert all(span.parent is None for span in spans)


@pytest.mark.parametrize(
    ("error", "code", "is_failure"),
    [(ServerBusy("full"), "RESOURCE_EXHAUSTED", False), (EngineUnavailable("lost"), "UNAVAILABLE", True)],
)
def test_only_what_is_the_server_s_fault_is_an_error(error: Exception, code: str, is_failure: bool) -> None:
    async def ask(running: Running) -> None:
        largest = common_pb2.Sampling(seed=2**64 - 1)
        await read(running.inference.Generate(inference_pb2.GenerateRequest(text=PROMPT, sampling=largest)))
        no_tokens = common_pb2.TokenIds()
        await read(running.inference.Generate(inference_pb2.GenerateRequest(token_ids=no_tokens)))

    spans, _ = spans_of(FakeBackend(failing(error)), ask)
    assert len(spans) == 2
    for span in spans:
        found = dict(span.attributes or {})
        assert found["rpc.response.status_code"] == code
        assert found.get("error.type") == (code if is_failure else None)
        assert (span.status.status_code is StatusCode.ERROR) == is_failure


WITHOUT_TRACING = """
import asyncio, sys
import server.rpc.server
from lorikeet.v1 import inference_pb2
from server.rpc.observers import observing
from tests.rpc.fakes import CONFIG, FakeBackend, serving

async def main():
    async with observing(CONFIG, {"OTEL_SERVICE_NAME": "x"}) as observers:
        async with serving(FakeBackend(), observers=observers) as running:
            await running.inference.Generate(inference_pb2.GenerateRequest(text="Hi"))

asyncio.run(main())
print([name for name in sys.modules if name.startswith("opentelemetry")])
"""


def test_without_a_collector_opentelemetry_is_not_imported() -> None:
    repository = Path(__file__).parents[2]
    command = [sys.executable, "-c", WITHOUT_TRACING]
    done = subprocess.run(command, check=False, cwd=repository, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


@pytest.mark.parametrize(
    ("environ", "is_on"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, False),
        ({"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://127.0.0.1:1"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:1"}, True),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_TRACES_EXPORTER": "none"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_SDK_DISABLED": "true"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, True),
    ],
)
def test_the_environment_turns_tracing_on_and_off(environ: dict[str, str], is_on: bool) -> None:
    tracing = open_tracing(None, "base", environ)
    assert (tracing is not None) == is_on
    if tracing is not None:
        tracing.close(60.0)


@pytest.mark.parametrize(
    "environ",
    [
        {"OTEL_TRACES_EXPORTER": "zipkin"},
        {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"},
    ],
)
def test_what_is_not_known_of_the_environment_is_refused_by_name(environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=f"{list(environ)[-1]}: '{list(environ.values())[-1]}' is neither"):
        open_tracing(None, "base", environ)


def test_without_the_package_the_option_is_refused_and_the_environment_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delitem(sys.modules, "server.rpc.tracing")
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(ConfigError, match=r"otlp-endpoint: .*pip install 'lorikeet\[tracing\]'"):
        open_tracing("http://127.0.0.1:1", "base", {})
    assert open_tracing(None, "base", {"OTEL_TRACES_EXPORTER": "otlp"}) is None
    assert "lorikeet[tracing]" in caplog.text


def test_what_ended_last_is_still_sent_and_the_environment_names_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.name=ours,region=here")
    with collecting() as collector:
        tracing = open_tracing(collector.endpoint, "base", {})
        assert tracing is not None
        tracing.ended(CallRecord("a.Service", "Method", {}, "id", code="OK", seconds=0.25))
        tracing.close(60.0)
        (span,) = collector.spans
        (resource,) = collector.resources
    assert span.name == "a.Service/Method"
    assert span.end_time_unix_nano - span.start_time_unix_nano == 250_000_000
    assert (resource["service.name"], resource["region"]) == ("ours", "here")
    assert resource["telemetry.sdk.name"] == "opentelemetry"


def test_a_collector_that_is_away_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "600")
    tracing = open_tracing("http://127.0.0.1:1", "base", {})
    assert tracing is not None
    for _ in range(3):
        tracing.ended(CallRecord("a.Service", "Method", {}, "id", code="OK", seconds=0.25))
    closing = threading.Thread(target=tracing.close, args=(0.1,))
    closing.start()
    closing.join(timeout=20)  # by itself it would try again for OTEL_EXPORTER_OTLP_TIMEOUT, which is long here
    assert not closing.is_alive()
