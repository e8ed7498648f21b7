"""The command line, against a server that is real on the wire and scripted behind it."""

import io
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import typer
from google.protobuf import any_pb2, duration_pb2, timestamp_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from lorikeet.v1 import (
    adapter_pb2,
    adapter_pb2_grpc,
    common_pb2,
    inference_pb2,
    inference_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
)
from server.cli import main
from server.cli.exits import ExitCode
from server.cli.options import parse_address, parse_size, parse_size_or_none
from tests.support.base_files import write_base

DIGEST = "sha256:" + "ab" * 32
HEAVY = ("torch", "transformers", "grpc", "google.protobuf", "tokenizers", "msgspec", "jinja2", "numpy")


@dataclass
class FakeServer(
    inference_pb2_grpc.InferenceServiceServicer,
    adapter_pb2_grpc.AdapterServiceServicer,
    server_pb2_grpc.ServerServiceServicer,
):
    """Answers from a script and keeps what it was asked. `refusal`, if set, is the answer to everything; one that
    `holds` gives its pieces and never ends the answer by itself: `held` then, and `released` when the call is over."""

    refusal: status_pb2.Status | None = None
    requests: list[Any] = field(default_factory=list)
    pieces: list[inference_pb2.StreamGenerateResponse] = field(default_factory=list)
    adapters: list[adapter_pb2.Adapter] = field(default_factory=list)
    address: str = ""
    holds: bool = False
    held: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)

    def _take(self, request: Any, context: grpc.ServicerContext) -> None:
        self.requests.append(request)
        if self.refusal is not None:
            context.abort_with_status(rpc_status.to_status(self.refusal))

    def _hold(self, context: grpc.ServicerContext) -> None:
        if self.holds and context.add_callback(self.released.set):
            self.held.set()
            self.released.wait()

    def Generate(self, request: Any, context: grpc.ServicerContext) -> inference_pb2.GenerateResponse:
        self._take(request, context)
        self._hold(context)
        whole = inference_pb2.GenerateResponse()
        for piece in self.pieces:
            whole.MergeFromString(piece.SerializeToString())
        whole.text = "".join(piece.text for piece in self.pieces)
        return whole

    def StreamGenerate(
        self, request: Any, context: grpc.ServicerContext
    ) -> Iterator[inference_pb2.StreamGenerateResponse]:
        self._take(request, context)
        yield from self.pieces
        self._hold(context)

    def ListAdapters(self, request: Any, context: grpc.ServicerContext) -> adapter_pb2.ListAdaptersResponse:
        self._take(request, context)
        start = int(request.page_token or 0)
        token = str(start + 1) if start + 1 < len(self.adapters) else ""
        return adapter_pb2.ListAdaptersResponse(adapters=self.adapters[start : start + 1], next_page_token=token)

    def GetAdapter(self, request: Any, context: grpc.ServicerContext) -> adapter_pb2.GetAdapterResponse:
        self._take(request, context)
        return adapter_pb2.GetAdapterResponse(adapter=self.adapters[0])

    def LoadAdapter(self, request: Any, context: grpc.ServicerContext) -> adapter_pb2.LoadAdapterResponse:
        self._take(request, context)
        return adapter_pb2.LoadAdapterResponse(adapter=self.adapters[0])

    def StreamMergeAdapter(
        self, request: Any, context: grpc.ServicerContext
    ) -> Iterator[adapter_pb2.StreamMergeAdapterResponse]:
        self._take(request, context)
        stage = adapter_pb2.Progress.Stage
        for reached in (stage.STAGE_DRAINING, stage.STAGE_MERGING, stage.STAGE_MERGING):
            yield adapter_pb2.StreamMergeAdapterResponse(progress=adapter_pb2.Progress(stage=reached))
        layers = [
            adapter_pb2.MergeReport.Layer(index=index, weight_error=0.001, delta_error=0.25 * (index + 1))
            for index in range(2)
        ]
        report = adapter_pb2.MergeReport(kl=0.0125, largest_kl=0.1, layers=layers, held_bytes=1 << 20)
        yield adapter_pb2.StreamMergeAdapterResponse(adapter=self.adapters[0], report=report)

    def StreamUnmergeAdapter(
        self, request: Any, context: grpc.ServicerContext
    ) -> Iterator[adapter_pb2.StreamUnmergeAdapterResponse]:
        self._take(request, context)
        yield adapter_pb2.StreamUnmergeAdapterResponse(adapter=self.adapters[0])

    def UnloadAdapter(self, request: Any, context: grpc.ServicerContext) -> adapter_pb2.UnloadAdapterResponse:
        self._take(request, context)
        return adapter_pb2.UnloadAdapterResponse(adapter=self.adapters[0])

    def PinAdapter(self, request: Any, context: grpc.ServicerContext) -> adapter_pb2.PinAdapterResponse:
        self._take(request, context)
        return adapter_pb2.PinAdapterResponse(adapter=self.adapters[0])

    def UnpinAdapter(self, request: Any, context: grpc.ServicerContext) -> adapter_pb2.UnpinAdapterResponse:
        self._take(request, context)
        return adapter_pb2.UnpinAdapterResponse(adapter=self.adapters[0])

    def GetServerInfo(self, request: Any, context: grpc.ServicerContext) -> server_pb2.GetServerInfoResponse:
        self._take(request, context)
        return server_pb2.GetServerInfoResponse(
            version="1.2.3",
            base=server_pb2.BaseModel(name="tiny", digest=DIGEST, family="llama", vocab_size=64),
            device="cpu",
            dtype="bfloat16",
            limits=server_pb2.Limits(max_model_len=2048, kv_cache_tokens=2**40),
        )


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    fake = FakeServer()
    wire = grpc.server(futures.ThreadPoolExecutor(2))
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(fake, wire)
    adapter_pb2_grpc.add_AdapterServiceServicer_to_server(fake, wire)
    server_pb2_grpc.add_ServerServiceServicer_to_server(fake, wire)
    fake.address = f"127.0.0.1:{wire.add_insecure_port('127.0.0.1:0')}"
    wire.start()
    monkeypatch.setenv("LORIKEET_SERVER", fake.address)
    fake.pieces = [
        inference_pb2.StreamGenerateResponse(text="Ahoy", token_ids=[1, 2], request_id="r", adapter_digest=DIGEST),
        inference_pb2.StreamGenerateResponse(
            text=", mate",
            token_ids=[3],
            finish_reason=common_pb2.FINISH_REASON_LENGTH,
            usage=common_pb2.Usage(prompt_tokens=5, completion_tokens=3),
            timings=common_pb2.Timings(decode_seconds=0.5),
            request_id="r",
            adapter_digest=DIGEST,
            serving=common_pb2.SERVING_COMPENSATED,
            trained_quantization="nf4",
        ),
    ]
    fake.adapters = [_adapter("pirate"), _adapter("json-reply")]
    yield fake
    wire.stop(None).wait()


def _adapter(name: str) -> adapter_pb2.Adapter:
    return adapter_pb2.Adapter(
        name=name,
        digest=DIGEST,
        labels=["latest", "v2"],
        rank=8,
        alpha=16,
        target_modules=["q_proj", "v_proj"],
        size_bytes=3 * 2**20,
        method="lora",
        create_time=timestamp_pb2.Timestamp(seconds=1_800_000_000),
        residency=adapter_pb2.Adapter.RESIDENCY_DEVICE,
    )


def _refusal(code: str, message: str, *details: Any) -> status_pb2.Status:
    status = status_pb2.Status(code=code_pb2.Code.Value(code), message=message)
    for detail in (error_details_pb2.ErrorInfo(reason="WHY", domain="lorikeet"), *details):
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def _error(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert captured.err.endswith("\n")
    return captured.err.removeprefix("error: ").rstrip()


# Starting


@pytest.mark.parametrize("arguments", [["--help"], ["serve", "--help"], ["adapters", "import", "--help"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    script = (
        "import sys; from server.cli import main; code = main(sys.argv[1:]); "
        f"print(code, [name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    assert done.stderr == "0 []\n"
    assert "Usage: lorikeet" in done.stdout


def test_serving_does_not_load_torch() -> None:
    modules = ("server.rpc.server", "adapters.registry", "server.base.resolve")
    script = f"import sys, {', '.join(modules)}; print([n for n in ('torch', 'transformers') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_help_documents_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == ExitCode.OK
    text = capsys.readouterr().out
    assert all(str(code.value) in text[text.index("Exit codes") :] for code in ExitCode)


def test_without_a_command_shows_help_and_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["adapters"]):
        assert main(arguments) == ExitCode.USAGE
        assert "Commands:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nonsense"], "nonsense"),
        (["generate"], "PROMPT"),
        (["generate", "x", "--top-k", "-1"], "--top-k"),
        (["generate", "x", "--raw", "--system", "y"], "--system"),
        (["info", "--server", "localhost"], "--server"),
        (["serve", "--kv-cache-memory", "lots"], "--kv-cache-memory"),
        (["serve", "--otlp-endpoint", "localhost:4317"], "--otlp-endpoint"),
        (["adapters", "import", "."], "--name"),
    ],
)
def test_wrong_usage_names_the_option(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == ExitCode.USAGE
    assert named in _error(capsys)


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("2GiB", 2**31), ("512M", 512 * 10**6), ("1.5 gb", 1_500_000_000), ("1ki", 1024)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "GiB", "1e9", "1 PiB", "½GiB", "1..5G"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        parse_size(text)


def test_only_a_size_that_may_be_nothing_takes_zero() -> None:
    assert (parse_size_or_none("0"), parse_size_or_none("2KiB")) == (0, 2048)
    with pytest.raises(typer.BadParameter, match="above zero"):
        parse_size("0")


@pytest.mark.parametrize("text", ["localhost", ":1", "a:0", "a:65536", "a b:1", "::1:50051", "a:1:2"])
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        parse_address(text)


def test_ipv6_address() -> None:
    assert parse_address("[::1]:50051") == "[::1]:50051"


# Generating


def test_generate_streams_an_answer_to_a_chat(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "Hello", "--adapter", "pirate", "--system", "Be brief.", "--temperature", "0"]
    assert main([*arguments, "--stop", "a", "--stop", "b", "--stop-token-id", "7", "--max-tokens", "9"]) == ExitCode.OK
    assert capsys.readouterr().out == "Ahoy, mate\n"
    (request,) = server.requests
    assert isinstance(request, inference_pb2.StreamGenerateRequest)
    assert request.adapter_id == "pirate"
    turns = [(message.role, message.content) for message in request.messages.messages]
    assert turns == [("system", "Be brief."), ("user", "Hello")]
    assert request.sampling.temperature == 0
    assert request.sampling.HasField("temperature")
    assert request.stopping == common_pb2.Stopping(max_tokens=9, stop_strings=["a", "b"], stop_token_ids=[7])


def test_generate_leaves_out_what_is_not_asked_for(server: FakeServer) -> None:
    """So that the server's defaults hold, not a second set of them here."""
    assert main(["generate", "x"]) == ExitCode.OK
    assert server.requests[0].sampling == common_pb2.Sampling()
    assert server.requests[0].stopping == common_pb2.Stopping()


def test_generate_raw_from_standard_input(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Où est\n".encode())))
    assert main(["generate", "-", "--raw"]) == ExitCode.OK
    assert server.requests[0].text == "Où est\n"


@pytest.mark.parametrize("prompt", ["-", "\udcff"])
def test_generate_refuses_what_is_not_utf8(
    prompt: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe")))
    assert main(["generate", prompt]) == ExitCode.USAGE
    assert _error(capsys) == "prompt: not valid UTF-8"


def test_generate_json_is_one_object(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.pieces[1].logprobs.add(drawn=common_pb2.Logprob(token_id=3, logprob=-0.5))
    assert main(["generate", "x", "--json", "--logprobs", "0", "--seed", "18446744073709551615"]) == ExitCode.OK
    (request,) = server.requests
    assert isinstance(request, inference_pb2.GenerateRequest)
    assert request.messages.messages[0].content == "x"
    assert request.sampling.seed == 2**64 - 1
    assert request.sampling.HasField("logprobs")
    answer = json.loads(capsys.readouterr().out)
    assert answer == {
        "request_id": "r",
        "adapter_digest": DIGEST,
        "text": "Ahoy, mate",
        "token_ids": [1, 2, 3],
        "logprobs": [{"token_id": 3, "logprob": -0.5, "top": []}],
        "finish_reason": "length",
        "serving": "compensated",
        "trained_quantization": "nf4",
        "usage": {"prompt_tokens": 5, "cached_prompt_tokens": 0, "completion_tokens": 3},
        "timings": {"queue_seconds": 0, "adapter_load_seconds": 0, "prefill_seconds": 0, "decode_seconds": 0.5},
    }


def test_generate_json_stream_is_one_object_a_piece(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "x", "--json", "--stream"]) == ExitCode.OK
    first, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["text"], last["text"]) == ("Ahoy", ", mate")
    assert "finish_reason" not in first
    assert last["finish_reason"] == "length"


def test_both_requests_have_the_same_fields() -> None:
    """`generate --no-stream` turns the one message into the other by its bytes."""
    both = (inference_pb2.GenerateRequest, inference_pb2.StreamGenerateRequest)
    one, other = ([(f.name, f.number, f.type) for f in message.DESCRIPTOR.fields] for message in both)
    assert one == other


def test_terminals_get_no_escape_sequences(
    server: FakeServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    del server.pieces[1]
    server.pieces[0].text = "a\x1b]0;x\x07\tb\n"
    assert main(["generate", "x"]) == ExitCode.OK
    assert capsys.readouterr().out == "a\x1b]0;x\x07\tb\n\n"  # a pipe gets the bytes as they are
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert main(["generate", "x"]) == ExitCode.OK
    assert capsys.readouterr().out == "a�]0;x�\tb\n\n"


def test_errors_have_no_escape_sequences(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    """What is refused may be quoted: a tensor's name, a message that a chat template does not take."""
    server.refusal = _refusal("FAILED_PRECONDITION", "no layer \x1b]0;x\x07\x9b2J")
    assert main(["adapters", "load", "x"]) == ExitCode.REFUSED
    assert _error(capsys) == "no layer �]0;x��2J"


# Failing


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [
        ("INVALID_ARGUMENT", ExitCode.USAGE),
        ("NOT_FOUND", ExitCode.NOT_FOUND),
        ("FAILED_PRECONDITION", ExitCode.REFUSED),
        ("RESOURCE_EXHAUSTED", ExitCode.EXHAUSTED),
        ("UNAVAILABLE", ExitCode.UNAVAILABLE),
        ("INTERNAL", ExitCode.FAILURE),
    ],
)
@pytest.mark.parametrize("arguments", [["generate", "x"], ["generate", "x", "--json"], ["adapters", "load", "x"]])
def test_a_refusal_is_one_line_and_a_code(
    code: str, exit_code: ExitCode, arguments: list[str], server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.refusal = _refusal(code, "adapter 'x':\n  is not there")
    assert main(arguments) == exit_code
    assert _error(capsys) == "adapter 'x': is not there"


def test_a_refusal_says_when_to_try_again(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    delay = duration_pb2.Duration(seconds=1, nanos=500_000_000)
    server.refusal = _refusal("RESOURCE_EXHAUSTED", "256 requests wait", error_details_pb2.RetryInfo(retry_delay=delay))
    assert main(["generate", "x"]) == ExitCode.EXHAUSTED
    assert _error(capsys) == "256 requests wait (try again in 1.5 s)"


def test_debug_shows_the_traceback(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.refusal = _refusal("NOT_FOUND", "nothing there")
    for arguments in (["--debug", "generate", "x"], ["generate", "x", "--debug"]):
        assert main(arguments) == ExitCode.NOT_FOUND
        lines = capsys.readouterr().err.splitlines()
        assert lines[0].startswith("Traceback")
        assert lines[-1] == "error: nothing there"


def test_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--server", "127.0.0.1:1"]) == ExitCode.UNAVAILABLE
    assert "lorikeet serve" in _error(capsys)


def test_timeout(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.pieces, server.holds = [], True
    assert main(["generate", "x", "--timeout", "0.2"]) == ExitCode.TIMEOUT
    assert "--timeout" in _error(capsys)


def test_a_timeout_past_what_grpc_can_count_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    """It would have passed at once."""
    for command in (["generate", "x"], ["info"], ["health", "--wait"]):
        assert main([*command, "--timeout", "inf", "--server", "127.0.0.1:1"]) == ExitCode.USAGE
        assert "--timeout" in _error(capsys)


@pytest.mark.parametrize("options", [["--stream"], ["--no-stream"]])
def test_interrupting_cancels_the_call(options: list[str], server: FakeServer) -> None:
    server.holds = True
    command = [sys.executable, "-m", "server.cli", "generate", "x", "--server", server.address, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        if options == ["--stream"]:
            assert process.stdout.read(4) == "Ahoy"
        assert server.held.wait(60)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == ExitCode.INTERRUPTED
    assert errors == ""
    assert server.released.wait(60)


def test_a_bug_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr("server.cli.info.print_fields", broken)
    monkeypatch.setattr("server.cli.client.connect", broken)
    assert main(["info"]) == ExitCode.FAILURE
    assert "ZeroDivisionError: two lines" in _error(capsys)


def test_the_reader_may_leave_early(server: FakeServer) -> None:
    server.pieces[:1] = [inference_pb2.StreamGenerateResponse(text="line\n" * 2000)] * 200
    command = (
        f"{sys.executable} -m server.cli generate x --server {server.address} | head -n 1; echo ${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("line\n1\n", "")


# Server and adapters


def test_info(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == ExitCode.OK
    fields = json.loads(capsys.readouterr().out)
    assert fields["base"] == {"name": "tiny", "digest": DIGEST, "family": "llama", "vocab_size": 64}
    assert fields["limits"]["kv_cache_tokens"] == 2**40
    assert main(["info"]) == ExitCode.OK
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["base.name"] == "tiny"
    assert "quantization" not in lines


def test_list_reads_every_page(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapters", "list", "--json"]) == ExitCode.OK
    entries = json.loads(capsys.readouterr().out)["adapters"]
    assert [entry["name"] for entry in entries] == ["pirate", "json-reply"]
    assert entries[0]["labels"] == ["latest", "v2"]
    assert entries[0]["create_time"] == "2027-01-15T08:00:00+00:00"
    assert entries[0]["residency"] == "device"
    assert main(["adapters", "list"]) == ExitCode.OK
    header, _, first, second = capsys.readouterr().out.splitlines()[:4]
    assert header.split()[:2] == ["name", "digest"]
    assert first.split()[:4] == ["pirate", "abababababab", "latest,", "v2"]
    assert second.startswith("json-reply")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("show", "digest"),
        ("load", "loaded"),
        ("unload", "unloaded"),
        ("pin", "pinned"),
        ("unpin", "unpinned"),
    ],
)
def test_commands_on_one_adapter(
    command: str, said: str, server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["adapters", command, "pirate@v2"]) == ExitCode.OK
    assert server.requests[0].adapter_id == "pirate@v2"
    out = capsys.readouterr().out
    assert said in out
    assert DIGEST in out
    assert main(["adapters", command, "pirate@v2", "--json"]) == ExitCode.OK
    assert json.loads(capsys.readouterr().out)["digest"] == DIGEST


def test_merge_tells_how_far_it_is_from_unmerged_serving(
    server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "probe.txt").write_text("So it goes.")
    options = ["--force", "--drain-seconds", "5", "--probe", str(tmp_path / "probe.txt")]
    assert main(["adapters", "merge", "pirate@v2", *options]) == ExitCode.OK
    request = server.requests[0]
    assert (request.adapter_id, request.force, request.drain_seconds) == ("pirate@v2", True, 5)
    assert request.probe_text == "So it goes."
    said = capsys.readouterr()
    assert said.err.splitlines() == ["draining …", "merging …"]
    assert DIGEST in said.out
    assert "0.0125 nats" in said.out
    assert "50.0% of the adapter in layer 1" in said.out
    assert main(["adapters", "merge", "pirate@v2", "--json"]) == ExitCode.OK
    report = json.loads(capsys.readouterr().out)["report"]
    assert (report["kl"], report["held_bytes"]) == (0.0125, 1 << 20)
    assert [layer["delta_error"] for layer in report["layers"]] == [0.25, 0.5]
    assert main(["adapters", "unmerge", "pirate@v2", "--json"]) == ExitCode.OK
    assert json.loads(capsys.readouterr().out)["digest"] == DIGEST
    assert server.requests[-1].drain_seconds == 60


def test_unload_waits_only_when_told(server: FakeServer) -> None:
    for options, mode in (([], adapter_pb2.UNLOAD_MODE_REFUSE), (["--drain"], adapter_pb2.UNLOAD_MODE_DRAIN)):
        assert main(["adapters", "unload", "pirate", *options]) == ExitCode.OK
        assert server.requests[-1].mode == mode


# Serving


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base")


def test_serve_reads_its_options(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    async def serve(
        config: Any,
        model: Any,
        registry: Any,
        *,
        on_started: Callable[[int, int], None],
        dropped_log_lines: Callable[[], int],
    ) -> None:
        assert dropped_log_lines() == 0
        seen.append((config, model))
        on_started(1234, 5678)

    monkeypatch.setattr("server.rpc.server.serve", serve)
    store = tmp_path / "store"
    command = ["serve", "--base", str(base), "--store", str(store), "--device", "cpu", "--dtype", "float32", "--json"]
    limits = ["--kv-cache-memory", "64MiB", "--max-num-seqs", "3", "--no-prefix-caching", "--grace", "1.5"]
    limits += ["--merge", "pirate@v2", "--merge-force", "--merged-others", "compensate"]
    assert main([*command, *limits, "--port", "0"]) == ExitCode.OK
    ready = json.loads(capsys.readouterr().out)
    assert (ready["event"], ready["port"], ready["metrics_port"]) == ("ready", 1234, 5678)
    ((config, model),) = seen
    assert (config.port, config.grace, config.store) == (0, 1.5, str(store))
    assert config.engine.base_path == str(base)
    assert config.engine.base_digest == model.digest
    assert (config.engine.device, config.engine.dtype, config.engine.max_num_seqs) == ("cpu", "float32", 3)
    assert config.engine.kv_cache_bytes == 64 * 2**20
    assert config.engine.prefix_caching is False
    assert (config.merge, config.merge_force, config.engine.compensates_merged) == ("pirate@v2", True, True)


def test_serve_tells_addresses_that_clients_can_take(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def serve(*parts: Any, on_started: Callable[[int, int], None], **settings: Any) -> None:
        on_started(1234, 5678)

    monkeypatch.setattr("server.rpc.server.serve", serve)
    command = ["serve", "--base", str(base), "--store", str(tmp_path / "store")]
    assert main([*command, "--host", "::1", "--metrics-host", "::1"]) == ExitCode.OK
    said = capsys.readouterr().out
    assert said == "ready: base on [::1]:1234, metrics on http://[::1]:5678/metrics\n"
    assert parse_address(said.split()[3].rstrip(","))


def test_serve_refuses_a_base_without_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--base", str(tmp_path)]) == ExitCode.REFUSED
    assert str(tmp_path) in _error(capsys)
