"""The log and the traces of a real server with a real engine: one line and one span for each call, and no text."""

import fcntl
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from lorikeet.v1 import inference_pb2, server_pb2
from tests.integration.conftest import StartServer, World
from tests.support.client import Client, generation, read
from tests.support.collector import Collector, attributes, collecting
from tests.support.server_process import REPOSITORY, ServerProcess
from tests.support.waiting import eventually

PROMPT = "xylophone quarrels"
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


@pytest.fixture(scope="module")
def watched(start_server: StartServer, collector: Collector) -> Iterator[ServerProcess]:
    """A server for one request at a time, without a queue, that logs JSON and sends traces."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        server = start_server(
            *("--log-format", "json", "--log-level", "info", "--otlp-endpoint", collector.endpoint),
            *("--kv-cache-memory", "16MiB", "--max-num-seqs", "1", "--max-waiting", "0"),
        )
    yield server
    assert server.stop() == 0


@pytest.fixture(scope="module")
def caller(watched: ServerProcess) -> Iterator[Client]:
    client = Client(watched.port)
    yield client
    client.close()


def entries(server: ServerProcess) -> list[dict[str, Any]]:
    """Every line of the log so far, of both processes: all are JSON."""
    whole, _, _ = server.log.read_text().rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def line_of(server: ServerProcess, request_id: str) -> dict[str, Any]:
    """The one line of a call that has ended, or is about to."""

    def found() -> list[dict[str, Any]]:
        return [entry for entry in entries(server) if entry.get("request_id") == request_id]

    eventually(found, f"{request_id} is logged")
    (line,) = found()
    return line


def span_of(collector: Collector, line: dict[str, Any]) -> Span:
    """The span of a logged call."""

    def found() -> list[Span]:
        return [span for span in collector.trace(line["trace_id"]) if span.kind == Span.SPAN_KIND_SERVER]

    eventually(found, "the span has come")
    (span,) = found()
    return span


def test_an_answer_leaves_a_line_and_a_span_that_agree(
    watched: ServerProcess, caller: Client, collector: Collector, world: World
) -> None:
    metadata = (("x-request-id", "one"), ("traceparent", f"00-{TRACE}-{PARENT}-01"))
    request = inference_pb2.StreamGenerateRequest(**generation(PROMPT, "rank-8", 12))
    call = caller.inference.StreamGenerate(request, metadata=metadata, timeout=60)
    answer = read(call)
    assert answer.last is not None
    assert (answer.last.request_id, dict(call.trailing_metadata())["x-request-id"]) == ("one", "one")
    line = line_of(watched, "one")
    expected = {
        "level": "info",
        "event": "request",
        "method": "StreamGenerate",
        "code": "OK",
        "adapter": "rank-8",
        "digest": world.store.resolve("rank-8").digest,
        "serving": "unmerged",
        "prompt_tokens": answer.last.usage.prompt_tokens,
        "completion_tokens": 12,
        "finish_reason": "length",
        "trace_id": TRACE,
    }
    assert {key: line[key] for key in expected} == expected
    assert 0 <= line["queue_seconds"] <= line["first_token_seconds"] <= line["seconds"]
    span = span_of(collector, line)
    found = attributes(span.attributes)
    assert span.parent_span_id.hex() == PARENT
    assert span.end_time_unix_nano - span.start_time_unix_nano == pytest.approx(line["seconds"] * 1e9, abs=2000)
    assert found["rpc.response.status_code"] == "OK"
    assert found["lorikeet.adapter.digest"] == line["digest"]
    assert found["gen_ai.usage.output_tokens"] == 12
    names = [span.name for span in collector.trace(TRACE)]
    assert sorted(names) == ["decode", "lorikeet.v1.InferenceService/StreamGenerate", "prefill", "queue"]
    children = [span for span in collector.trace(TRACE) if span.kind == Span.SPAN_KIND_INTERNAL]
    assert {child.parent_span_id for child in children} == {span.span_id}
    assert all(child.start_time_unix_nano >= span.start_time_unix_nano for child in children)


def test_a_client_that_leaves_and_one_that_is_refused_leave_a_line_each(
    watched: ServerProcess, caller: Client, collector: Collector
) -> None:
    stream = caller.open(generation(PROMPT, "rank-4", 10_000) | {"request_id": "leaves"})
    next(stream)
    with pytest.raises(grpc.RpcError):
        caller.generate(generation(PROMPT, "rank-4") | {"request_id": "refused"})
    stream.cancel()
    left, refused = line_of(watched, "leaves"), line_of(watched, "refused")
    assert (left["code"], left["adapter"]) == ("CANCELLED", "rank-4")
    assert left["completion_tokens"] >= 1
    assert left["prompt_tokens"] > 0
    assert left["queue_seconds"] >= 0
    assert (refused["code"], refused["reason"]) == ("RESOURCE_EXHAUSTED", "SERVER_BUSY")
    assert refused["adapter_id"] == "rank-4"
    assert attributes(span_of(collector, left).attributes)["rpc.response.status_code"] == "CANCELLED"
    eventually(watched.is_idle, "the stream is let go")


LATE_CLIENT = """
import sys
from tests.support.client import Client, generation
fields = generation(sys.argv[2], "rank-4", 15_000) | {"request_id": "late"}
stream = Client(int(sys.argv[1])).open(fields, timeout=6)
next(stream)
print("streaming", flush=True)
sys.stdin.read()
"""


def line_of_one_too_late(server: ServerProcess) -> dict[str, Any]:
    """Of a call whose time runs out by the server's clock. Its client's is ahead, by as much as a busy machine takes to
    read the call, so the client must not end it: it stands still."""
    command = [sys.executable, "-c", LATE_CLIENT, str(server.port), PROMPT]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPOSITORY)
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"streaming\n"
            process.send_signal(signal.SIGSTOP)
            return line_of(server, "late")
        finally:
            process.kill()


def test_requests_that_cannot_be_served_leave_a_line_each(watched: ServerProcess, caller: Client) -> None:
    for request_id, fields in {
        "stranger": generation(PROMPT, "nobody"),
        "hot": generation(PROMPT, temperature=9.0),
    }.items():
        with pytest.raises(grpc.RpcError):
            caller.generate(fields | {"request_id": request_id})
    stranger, hot, late = line_of(watched, "stranger"), line_of(watched, "hot"), line_of_one_too_late(watched)
    assert (stranger["code"], stranger["adapter_id"]) == ("NOT_FOUND", "nobody")
    assert (hot["code"], hot["field"]) == ("INVALID_ARGUMENT", "sampling.temperature")
    assert late["code"] == "DEADLINE_EXCEEDED"
    eventually(watched.is_idle, "the late one is let go")


def test_both_processes_log_json_and_neither_logs_text(watched: ServerProcess, caller: Client) -> None:
    answer = caller.generate(generation(PROMPT, max_tokens=24) | {"request_id": "quiet"})
    line_of(watched, "quiet")
    assert {entry["level"] for entry in entries(watched)} <= {"info", "warning"}
    assert any(entry["logger"].startswith("server.engine") for entry in entries(watched))
    log = watched.log.read_text()
    assert "xylophone" not in log
    assert len(answer.text) > 8
    assert json.dumps(answer.text)[1:-1] not in log
    assert len({entry["request_id"] for entry in entries(watched) if entry.get("event") == "request"}) == sum(
        entry.get("event") == "request" for entry in entries(watched)
    )


def test_whoever_reads_the_log_may_stop(world: World, tmp_path: Path) -> None:
    """stderr is a pipe that nobody reads, and is full after some twenty calls."""
    log = tmp_path / "server.log"
    os.mkfifo(log)
    reader = os.open(log, os.O_RDONLY | os.O_NONBLOCK)
    fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 4096)
    server = ServerProcess.start(tmp_path, world.base.path, world.store.root, "--log-format", "json")
    client = Client(server.port)
    ids = [f"call-{i}" for i in range(100)]
    for request_id in ids:
        metadata = (("x-request-id", request_id),)
        client.server.GetServerInfo(server_pb2.GetServerInfoRequest(), metadata=metadata, timeout=60)
    assert server.metrics()["lorikeet_log_lines_dropped_total"] == 0, "they wait"
    text = b""
    while ids[-1].encode() not in text:
        select.select([reader], [], [])
        text += os.read(reader, 65536)
    client.close()
    logged = [json.loads(line).get("request_id") for line in text.splitlines()]
    assert [request_id for request_id in logged if request_id] == ids
    assert server.stop() == 0
    os.close(reader)
