"""`trainer` as a program: what it prints, its exit codes, and Ctrl-C."""

import fcntl
import io
import json
import re
import signal
import subprocess
import sys
import termios
from pathlib import Path

import psutil
import pytest
import torch

from adapters.store import AdapterStore
from server.base.resolve import BaseModel
from tests.support.waiting import eventually
from trainer.cli import main
from trainer.commands.display import watching
from trainer.loop import Evaluation, Step
from trainer.run_directory import RunDirectory

COMMAND = [sys.executable, "-m", "trainer.cli"]


def options(base: BaseModel, data: Path, directory: Path, *more: str) -> list[str]:
    given = ["--base", str(base.path), "--data", str(data), "--name", "dogs", "--store", str(directory / "store")]
    return ["fit", *given, "--run", str(directory / "run"), "--device", "cpu", "--dtype", "float32", *more]


def waits_for_its_reader(process: subprocess.Popen[bytes]) -> bool:
    """Whether it sleeps with most of a page of its lines unread."""
    assert process.stderr is not None
    unread = bytearray(4)
    fcntl.ioctl(process.stderr, termios.FIONREAD, unread)
    return int.from_bytes(unread, sys.byteorder) > 2048 and psutil.Process(process.pid).status() == "sleeping"


def test_a_run_ends_with_one_object_of_json(base: BaseModel, data: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [*COMMAND, *options(base, data, tmp_path, "--epochs", "2", "--label", "test", "--json")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    version = AdapterStore(tmp_path / "store").resolve("dogs@test")
    assert (outcome["digest"], outcome["steps"], outcome["examples"]) == (version.digest, 2, 8)
    assert "step 2/2  loss " in done.stderr
    assert "trainable params: " in done.stderr
    assert "Warning" not in done.stderr


def test_ctrl_c_saves_and_resume_goes_on(base: BaseModel, data: Path, tmp_path: Path) -> None:
    """Even when it comes in the middle of a line, which stderr's buffer would not be left for."""
    steps = ["--epochs", "100000", "--max-steps", "150", "--eval-data", str(data), "--eval-every", "1"]
    steps += ["--lr", "1e-9", "--checkpoint-every", "1000"]  # nothing is saved before
    with subprocess.Popen(
        [*COMMAND, *options(base, data, tmp_path, *steps)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        bufsize=0,
        pipesize=4096,  # it gets no more lines ahead of who reads than go into that: about 100 evaluations, and waits
    ) as process:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, b"")
        assert any(line.startswith(b"evaluation") for line in lines)
        eventually(lambda: waits_for_its_reader(process), "the pipe is full")
        process.send_signal(signal.SIGINT)
        rest = b"".join(lines).decode().splitlines()
    assert process.returncode == 130
    assert rest[-2:] == [f"stopped; `trainer resume {tmp_path / 'run'}` goes on", "interrupted"]
    assert AdapterStore(tmp_path / "store").names() == []
    (step,) = RunDirectory(tmp_path / "run").checkpoints().steps()[-1:]
    assert step == [line["step"] for line in RunDirectory(tmp_path / "run").metrics()][-1]
    done = subprocess.run([*COMMAND, "resume", str(tmp_path / "run")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"going on after step {step} of 150" in done.stderr
    assert AdapterStore(tmp_path / "store").names() == ["dogs"]


class Terminal(io.StringIO):
    """One on which a bar can move."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_has_a_bar_and_ctrl_c_a_line_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    for name, value in {"TERM": "xterm", "COLUMNS": "120", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    with watching() as watcher:
        watcher.note("loading tiny")
        for index in range(3):
            watcher.on_step(Step(index, 3, 0, 2.0 - index, 5, 8, 1e-3, 1.0, 0.5))
        watcher.on_evaluation(Evaluation(3, 0.25, 5, is_best=True))
        assert not watcher.is_stopped()
        signal.raise_signal(signal.SIGINT)
        assert watcher.is_stopped()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert "0/? loss nan" in shown
    assert "loading tiny\n" in shown
    assert "evaluation after step 3: loss 0.2500, the best so far\n" in shown
    assert re.findall(r"\d/\S+ loss \S+", shown)[-1] == "3/3 loss 0.000"
    assert capfd.readouterr().err == "\nstopping after this step; once more to stop at once\n"


def test_a_file_of_settings_means_what_flags_mean(base: BaseModel, data: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        f"base: {base.path}\ndata: {data}\nrank: 4\nlearning-rate: 0.01\nrank_pattern: {{q_proj: 2}}\n"
        "target-modules: q_proj,v_proj\nmax_steps: 1\ndtype: float32\ndevice: cpu\n"
    )
    assert main(["fit", "--config", str(config), "--run", str(tmp_path / "one"), "--rank", "3", "--packing"]) == 0
    settings = RunDirectory(tmp_path / "one").settings()
    assert (settings.rank, settings.learning_rate, settings.rank_pattern) == (3, 0.01, {"q_proj": 2})
    assert (settings.target_modules, settings.packing, settings.alpha) == (("q_proj", "v_proj"), True, 6.0)
    saved = tmp_path / "one" / "config.yaml"
    assert main(["fit", "--config", str(saved), "--run", str(tmp_path / "two")]) == 0
    assert saved.read_bytes() == (tmp_path / "two" / "config.yaml").read_bytes()
    one, two = (tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (["--data", "none.jsonl"], 2, "none.jsonl: no such file"),
        (["--name", "Not A Name"], 2, "Not A Name"),
        (["--rank", "0"], 2, "rank must be at least 1"),
        (["--lr", "fast"], 2, "'--lr'"),
        (["--method", "half"], 2, "'half'"),
        (["--method", "full"], 2, "it cannot be published"),
        (["--target-modules", "q_proj,nose"], 2, "'nose' is not in the base"),
        (["--base", "./nowhere"], 4, "no such directory"),
        (["--frobnicate"], 2, "--frobnicate"),
        (["--streaming"], 2, "streaming needs max-steps"),
        (["--patience", "2"], 2, "patience needs eval-data"),
        (["--rank-pattern", "q_proj:4"], 2, "use PATTERN=NUMBER"),
        (["--init", "pissa", "--method", "qlora"], 2, "needs method lora"),
        (["--trackers", "nothing"], 2, "tracker 'nothing' is unknown"),
        (["--device", "tpu"], 2, "device 'tpu'"),
        (["--config", "none.yaml"], 2, "none.yaml: cannot be read"),
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
    assert main([*options(base, data, tmp_path), *more]) == code
    output = capsys.readouterr()
    assert output.out == ""
    lines = output.err.splitlines()
    assert words in lines[-1]
    assert lines[-1].startswith("error: ")
    assert not any("Traceback" in line for line in lines)


def test_memory_that_runs_out_outside_of_a_step_is_no_bug(
    base: BaseModel, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("trainer.fit.load_base", lambda settings, prepared: torch.empty(1 << 60))
    assert main(options(base, data, tmp_path)) == 4
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: out of memory outside of a training step; use")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rank: x", "run.yaml: rank: Expected `int`, got `str`"),
        ("nose: 1", "run.yaml: 'nose' is no setting"),
        ("method: half", "run.yaml: method: Invalid enum value 'half'"),
        ("- 1", "run.yaml: must be a mapping"),
        ("rank: 1\n  alpha: [", "run.yaml:2: is not YAML"),
    ],
)
def test_a_broken_file_of_settings_is_named(
    text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(text)
    assert main(["fit", "--config", str(tmp_path / "run.yaml")]) == 2
    assert words in capsys.readouterr().err
