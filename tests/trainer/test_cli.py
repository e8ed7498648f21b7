"""`trainer` as a program: what it prints, its exit codes, and Ctrl-C."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from adapters.store import AdapterStore
from server.base.resolve import BaseModel
from trainer.cli import main

COMMAND = [sys.executable, "-m", "trainer.cli", "fit"]


def options(base: BaseModel, data: Path, store: Path, *more: str) -> list[str]:
    return ["--base", str(base.path), "--data", str(data), "--name", "dogs", "--store", str(store), *more]


def test_a_run_ends_with_one_object_of_json(base: BaseModel, data: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [*COMMAND, *options(base, data, tmp_path, "--epochs", "2", "--label", "test", "--json")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    version = AdapterStore(tmp_path).resolve("dogs@test")
    assert (outcome["digest"], outcome["steps"], outcome["examples"]) == (version.digest, 2, 8)
    assert "step 2/2  loss " in done.stderr
    assert "Warning" not in done.stderr


def test_ctrl_c_publishes_nothing(base: BaseModel, data: Path, tmp_path: Path) -> None:
    command = [*COMMAND, *options(base, data, tmp_path, "--epochs", "100000")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        assert any(line.startswith("loading") for line in lines)
        process.send_signal(signal.SIGINT)
        rest = list(lines)
    assert process.returncode == 130
    assert rest[-1] == "interrupted\n"
    assert "Traceback" not in "".join(rest)
    assert AdapterStore(tmp_path).names() == []


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (["--data", "none.jsonl"], 2, "none.jsonl: no such file"),
        (["--name", "Not A Name"], 2, "Not A Name"),
        (["--rank", "0"], 2, "rank must be at least 1"),
        (["--lr", "fast"], 2, "'--lr'"),
        (["--method", "full"], 2, "'full'"),
        (["--target-modules", "q_proj,nose"], 2, "'nose' is not in the base"),
        (["--base", "./nowhere"], 4, "no such directory"),
        (["--frobnicate"], 2, "--frobnicate"),
    ],
)
def test_a_mistake_is_one_line_and_an_exit_code(
    more: list[str],
    code: int,
    words: str,
    base: BaseModel,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["fit", *options(base, data, tmp_path), *more]) == code
    output = capsys.readouterr()
    assert output.out == ""
    assert words in output.err
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
