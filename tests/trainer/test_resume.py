"""A run that was killed and resumed ends with the bits of one that was not."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from server.base.resolve import BaseModel
from tests.trainer.conftest import Train
from trainer.checkpoints import Checkpoint, Checkpoints
from trainer.errors import RunError
from trainer.fit import Watcher, resume
from trainer.loop import Interrupted
from trainer.run_directory import RunDirectory

VARIANTS: dict[str, dict[str, Any]] = {
    "rows": {"epochs": 3, "dropout": 0.1, "eval_every": 3},
    "packed": {"epochs": 5, "packing": True, "max_length": 96, "init": "pissa", "micro_batch": 1},
    "stream": {"streaming": True, "max_steps": 22, "shuffle_buffer": 6, "optimizer": "adamw_8bit", "init": "eva"},
    "packed-stream": {"streaming": True, "max_steps": 16, "shuffle_buffer": 9, "packing": True, "max_length": 96},
}


def write_rows(path: Path, count: int) -> Path:
    rows = [{"prompt": f"{n} {'dog ' * (n % 5)}", "completion": f"{n * n} parrots"} for n in range(count)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def lives(seed: int, count: int, run: Path, settings: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.trainer.lives", str(seed), str(count), str(run), json.dumps(settings)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    outcome: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return outcome


def what_counts(run: Path) -> list[dict[str, Any]]:
    """The metrics but for what a clock or the memory decides."""
    chance = ("seconds", "tokens_per_second", "memory_bytes")
    return [{name: v for name, v in line.items() if name not in chance} for line in RunDirectory(run).metrics()]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_killed_run_ends_with_the_same_bits(name: str, base: BaseModel, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 20)
    settings = {
        "base": str(base.path),
        "data": str(data),
        "batch_size": 3 if "packing" not in VARIANTS[name] else 1,
        "checkpoint_every": 2,
        "dtype": "float32",
        "device": "cpu",
    } | VARIANTS[name]
    if "eval_every" in settings:
        settings["eval_data"] = str(write_rows(tmp_path / "held-out.jsonl", 3))
    with ThreadPoolExecutor(2) as pool:
        never = pool.submit(lives, 0, 1, tmp_path / "never", settings)
        often = pool.submit(lives, sum(name.encode()), 5, tmp_path / "often", settings)
    assert never.result()["ends"] == [0]
    assert often.result()["ends"][0] == -9
    assert often.result()["ends"][-1] == 0
    assert often.result()["state"] == never.result()["state"]
    files = [tmp_path / run / "adapter" / "adapter_model.safetensors" for run in ("never", "often")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert what_counts(tmp_path / "never") == what_counts(tmp_path / "often")


def test_a_stopped_run_saves_at_once_and_goes_on(train: Train, tmp_path: Path) -> None:
    whole, _ = train(epochs=3)
    with pytest.raises(Interrupted) as stopped:
        train(run="stopped", watcher=Watcher(is_stopped=lambda: True), epochs=3)
    assert stopped.value.args == (tmp_path / "stopped",)
    assert RunDirectory(tmp_path / "stopped").checkpoints().steps() == [1]
    before = RunDirectory(tmp_path / "stopped").seconds()
    report = resume(tmp_path / "stopped")
    assert report.result == whole.result
    assert 0 < before < report.run.info()["seconds"] == pytest.approx(report.run.seconds(), abs=1e-3)
    one, other = (run.run.adapter / "adapter_model.safetensors" for run in (whole, report))
    assert one.read_bytes() == other.read_bytes()


def test_a_run_whose_data_changed_is_not_gone_on_with(train: Train, data: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(data.read_bytes())
    with pytest.raises(Interrupted):
        train(run="stopped", watcher=Watcher(is_stopped=lambda: True), data=str(copy))
    copy.write_text(copy.read_text() + "\n" + copy.read_text().splitlines()[0])
    with pytest.raises(RunError, match="stopped: cannot be resumed: data digest is not what it was"):
        resume(tmp_path / "stopped")
    with pytest.raises(RunError, match=r"none: is no run; it has no config\.yaml"):
        resume(tmp_path / "none")


def test_a_damaged_checkpoint_is_named(train: Train, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(run="stopped", watcher=Watcher(is_stopped=lambda: True))
    path = tmp_path / "stopped" / "checkpoints" / "step-00000001"
    (path / "weights.safetensors").write_bytes(b"x" * 10)
    with pytest.raises(RunError, match="step-00000001: the checkpoint cannot be read"):
        resume(tmp_path / "stopped")


def test_a_full_disk_is_said_and_the_checkpoint_before_stays(tmp_path: Path) -> None:
    """The limit on a file's size stands in for the disk: what is written past it fails the same way."""
    script = (
        "import resource, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from trainer.checkpoints import Checkpoint, Checkpoints\n"
        "from trainer.errors import DiskFull\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "checkpoints = Checkpoints(Path(sys.argv[1]))\n"
        "checkpoints.save(1, Checkpoint({'a': torch.ones(10)}, {}, {}))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "try:\n"
        "    checkpoints.save(2, Checkpoint({'a': torch.ones(100_000)}, {}, {}))\n"
        "except DiskFull as error:\n"
        "    print(error.message)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{tmp_path}/step-00000002: no room on the disk; free some and run `trainer resume`")
    assert Checkpoints(tmp_path).steps() == [1]
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000001"}
    assert Checkpoints(tmp_path).load(1).weights["a"].tolist() == [1.0] * 10


@pytest.mark.parametrize(("method", "written"), [("lora", "adapter"), ("full", "model")])
def test_a_disk_that_is_full_at_the_end_is_said_and_the_run_goes_on_from_there(
    method: str, written: str, base: BaseModel, data: Path, tmp_path: Path
) -> None:
    script = (
        "import resource, signal, sys\n"
        "from trainer import fit\n"
        "from trainer.cli import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "def gather(*args, **kwargs):\n"  # the last before the result is written
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "fit.gather = gather\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    run = tmp_path / "run"
    options = ["--base", str(base.path), "--data", str(data), "--method", method, "--run", str(run), "--max-steps", "2"]
    command = [sys.executable, "-c", script, "fit", *options, "--device", "cpu", "--dtype", "float32"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == (
        f"error: {run}/{written}: no room on the disk; free some and run `trainer resume` from the last checkpoint"
    )
    assert done.returncode == 5
    assert "result" not in RunDirectory.open(run).info()
    assert resume(run).result.num_steps == 2
    assert (run / written).is_dir()


def test_the_latest_checkpoints_stay(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in range(1, 6):
        checkpoints.save(step, Checkpoint({}, {}, {"step": step}))
    assert checkpoints.steps() == [4, 5]
    assert checkpoints.load(5).state == {"step": 5}
    assert checkpoints.load_best() is None
