"""What the README promises and a program can check."""

import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest

from lorikeet.v1 import inference_pb2, inference_pb2_grpc
from server.cli.exits import ExitCode

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


class Parrot(inference_pb2_grpc.InferenceServiceServicer):
    """Answers with the adapter and the prompt, a word at a time."""

    def StreamGenerate(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        for word in (request.adapter_id, request.messages.messages[0].content):
            yield inference_pb2.StreamGenerateResponse(text=f"{word};")


@pytest.fixture
def address() -> Iterator[str]:
    server = grpc.server(futures.ThreadPoolExecutor(1))
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(Parrot(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


def test_the_client_runs_as_it_stands(address: str) -> None:
    (client,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert "127.0.0.1:50051" in client
    script = client.replace("127.0.0.1:50051", address)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "pirate;What is the capital of France?;"


def test_the_table_of_exit_codes_is_whole() -> None:
    assert [int(code) for code in re.findall(r"^\| (\d+) \|", README, re.MULTILINE)] == sorted(ExitCode)


def test_the_targets_of_make_are_there() -> None:
    code = "".join(re.findall(r"```.*?```|`.*?`", README + (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL))
    named = set(re.findall(r"\bmake ([a-z]+)", code))
    defined = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "serve", "test", "lint"} <= named <= defined


def test_the_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
