"""The `lorikeet` command against a live server: import, show, generate, info, and how errors end."""

import json
import subprocess
from typing import Any

import pytest

from tests.integration.conftest import World
from tests.support.peft_model import ATTENTION, lora_config
from tests.support.server_process import REPOSITORY, ServerProcess, command


def lorikeet(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        command(*arguments), input=stdin, capture_output=True, cwd=REPOSITORY, timeout=120, check=False
    )


def succeed(*arguments: str, stdin: bytes = b"") -> Any:
    """What a command prints with --json."""
    process = lorikeet(*arguments, "--json", stdin=stdin)
    assert process.returncode == 0, process.stderr.decode()
    return json.loads(process.stdout)


@pytest.fixture(scope="module")
def address(server: ServerProcess) -> tuple[str, str]:
    return "--server", f"127.0.0.1:{server.port}"


def test_import_then_generate(world: World, address: tuple[str, str]) -> None:
    source = world.make("imported", lora_config(4, ATTENTION))
    store, base = ("--store", str(world.store.root)), ("--base", str(world.base.path))
    published = succeed("adapters", "import", str(source), "--name", "imported", *store, *base)
    assert published["digest"] == world.store.resolve("imported").digest
    options = ("--adapter", "imported", "--raw", "--max-tokens", "10", "--temperature", "0", "--ignore-eos", *address)
    answer = succeed("generate", "-", *options, stdin=b"The parrot")
    assert answer["adapter_digest"] == published["digest"]
    tokens = world.oracle.greedy(_ids(world, "The parrot"), 10, "imported")
    assert answer["token_ids"] == tokens
    streamed = lorikeet("generate", "The parrot", *options)
    assert streamed.returncode == 0
    assert streamed.stdout.decode() == answer["text"] + "\n"
    assert succeed("adapters", "show", "imported", *address)["residency"] == "device"


def _ids(world: World, text: str) -> list[int]:
    from tokenizers import Tokenizer

    ids: list[int] = Tokenizer.from_file(str(world.base.path / "tokenizer.json")).encode(text).ids
    return ids


def test_info_names_the_base(world: World, address: tuple[str, str]) -> None:
    info = succeed("info", *address)
    assert info["base"]["digest"] == world.base.digest
    assert info["device"] == "cpu"
    assert info["dtype"] == "float32"


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (("generate", "x", "--adapter", "nobody"), 3, "nobody"),
        (("generate", "x", "--adapter", "../x"), 2, "../x"),
        (("generate", "x", "--temperature", "7"), 2, "sampling.temperature"),
        (("generate", "", "--raw"), 2, "text"),
        (("adapters", "load", "nobody"), 3, "nobody"),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(
    address: tuple[str, str], arguments: tuple[str, ...], code: int, named: str
) -> None:
    process = lorikeet(*arguments, *address)
    assert process.returncode == code
    assert process.stdout == b""
    (line,) = process.stderr.decode().splitlines()
    assert line.startswith("error: ")
    assert named in line


def test_no_server_is_said_so() -> None:
    process = lorikeet("info", "--server", "127.0.0.1:1")
    assert process.returncode == 6
    assert len(process.stderr.decode().splitlines()) == 1
