"""Several processes train what one does: the same losses, the same weights, resumed too; and they end together."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adapters.store import AdapterStore
from server.base.resolve import BaseModel
from trainer.batches import share
from trainer.cli import main
from trainer.encoding import Example
from trainer.errors import SettingsError
from trainer.fit import fit, resume
from trainer.run_directory import RunDirectory
from trainer.settings import Settings
from trainer.sharding import needs_sharding

VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {"micro_batch": 1},
    "qlora": {"method": "qlora"},
    "packed": {"packing": True, "max_length": 64},
    "full": {"method": "full", "gradient_checkpointing": "on"},
    "sharded": {"shard": "on", "lora_plus": 2.0},
}
STOPPED = 130


@dataclass(frozen=True, slots=True)
class Ended:
    """How a job's processes ended."""

    codes: list[int]
    said: list[str]


def rows(path: Path, count: int) -> str:
    lines = [{"prompt": f"{n} {'dog ' * (n % 5)}", "completion": f"{n * n} parrots"} for n in range(count)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("groups")


@pytest.fixture(scope="module")
def common(base: BaseModel, place: Path) -> dict[str, Any]:
    """21 rows in steps of 4: in each epoch's last one, one process has nothing to learn."""
    return {
        "data": rows(place / "rows.jsonl", 21), "eval_data": rows(place / "held-out.jsonl", 3), "base": str(base.path),
        "rank": 4, "learning_rate": 1e-3, "epochs": 2, "batch_size": 4, "dtype": "float32", "device": "cpu",
    }  # fmt: skip


@pytest.fixture(scope="module")
def ended(common: dict[str, Any], place: Path) -> dict[str, Ended]:
    """What became of the runs in two processes: of each variant a whole one, of two a stopped and a resumed one."""
    jobs: list[dict[str, Any]] = []
    for name, changes in VARIANTS.items():
        jobs.append({"run": name, "size": 2, "settings": common | changes})
    for name in ("lora", "full"):
        settings = common | VARIANTS[name] | {"eval_every": 2}
        jobs.append({"run": f"{name}-whole", "size": 2, "settings": settings})
        for run in (f"{name}-again", f"{name}-alone"):
            jobs.append({"run": run, "size": 2, "settings": settings, "stop": 3})
        jobs.append({"run": f"{name}-again", "size": 2, "resume": True})
    jobs.append({"run": "one-with-less", "size": 2, "settings": common, "memory": [1 << 40, 1000]})
    jobs.append({"run": "faulty", "size": 2, "settings": common, "fail": 3})
    jobs.append({"run": "uneven", "size": 2, "settings": common | {"batch_size": 5}})
    given = [job | {"run": str(place / job["run"])} for job in jobs]
    command = [sys.executable, "-m", "tests.trainer.processes", json.dumps(given)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    outcomes = [Ended(**outcome) for outcome in json.loads(done.stdout.splitlines()[-1])]
    names = [job["run"] + "-resumed" * ("resume" in job) for job in jobs]
    return dict(zip(names, outcomes, strict=True))


def weights(run: Path) -> dict[str, torch.Tensor]:
    adapter = run / "adapter" / "adapter_model.safetensors"
    return load_file(adapter if adapter.is_file() else run / "model" / "model.safetensors")


def assert_same(one: Path, other: Path) -> None:
    """Within 1e-5: every loss and gradient norm, the counts, and the weights."""
    for a, b in zip(RunDirectory(one).metrics(), RunDirectory(other).metrics(), strict=True):
        assert a.keys() == b.keys()
        for name in set(a) & {"step", "loss", "eval_loss", "tokens", "learned", "grad_norm", "is_best"}:
            assert a[name] == pytest.approx(b[name], rel=1e-5)
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_two_processes_train_what_one_does(
    name: str, ended: dict[str, Ended], common: dict[str, Any], place: Path, tmp_path: Path
) -> None:
    assert ended[name] == Ended([0, 0], ["", ""])
    fit(Settings.from_mapping(common | VARIANTS[name]), tmp_path / "one")
    assert_same(place / name, tmp_path / "one")
    assert RunDirectory(place / name).info()["devices"] == 2


@pytest.mark.parametrize("name", ["lora", "full"])
def test_a_run_that_one_process_is_told_to_stop_goes_on_to_the_same_bits(
    name: str, ended: dict[str, Ended], place: Path
) -> None:
    assert ended[f"{name}-again"].codes == [STOPPED, STOPPED]
    assert ended[f"{name}-again-resumed"].codes == [0, 0]
    whole, again = weights(place / f"{name}-whole"), weights(place / f"{name}-again")
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    losses = [
        [line.get("loss") for line in RunDirectory(place / f"{name}-{end}").metrics()] for end in ("whole", "again")
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("name", ["lora", "full"])
def test_one_process_goes_on_with_what_two_began(name: str, ended: dict[str, Ended], place: Path) -> None:
    assert ended[f"{name}-alone"].codes == [STOPPED, STOPPED]
    resume(place / f"{name}-alone")
    assert_same(place / f"{name}-whole", place / f"{name}-alone")


def test_all_do_what_the_one_with_the_least_memory_has_to(ended: dict[str, Ended], place: Path) -> None:
    """It cannot hold the base, nor a step without checkpointing."""
    assert ended["one-with-less"] == Ended([0, 0], ["", ""])
    assert_same(place / "lora", place / "one-with-less")


def test_a_process_that_fails_ends_the_others(ended: dict[str, Ended], place: Path) -> None:
    assert ended["faulty"].codes == [1, 1]
    assert ended["faulty"].said == [
        "another process of this run has ended, so this one does, too",
        "a fault of its own",
    ]
    assert not (place / "faulty" / "adapter").exists()


def test_a_fault_of_the_settings_is_found_by_the_first(ended: dict[str, Ended], place: Path) -> None:
    said = ended["uneven"].said
    assert said[0] == "batch-size 5 cannot be split over 2 devices; take a multiple of that"
    assert said[1].startswith("another process")
    assert not (place / "uneven").exists()


def test_a_step_is_shared_out_evenly_and_whole() -> None:
    step = [[Example.of([1, number], [False, True])] for number in range(7)]
    parts = [list(share(step, rank, 3, 2)) for rank in range(3)]
    assert [[len(part) for part in own] for own in parts] == [[2, 1], [2, 1], [2, 1]]
    dealt = [row[0].ids[1] for own in parts for part in own for row in part if row[0].mask.any()]
    assert sorted(dealt) == list(range(7))
    assert list(share(step, 0, 1, 4)) == [step[:4], step[4:]]


def test_what_is_sharded(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x" * 1000)
    assert not needs_sharding(tmp_path, Settings(method="full"), 1, 10**9)
    assert needs_sharding(tmp_path, Settings(method="full"), 2, 10**9)
    assert not needs_sharding(tmp_path, Settings(), 2, 10**9)
    assert needs_sharding(tmp_path, Settings(), 2, 1200)  # one device cannot hold it
    assert not needs_sharding(tmp_path, Settings(method="qlora"), 2, 1200)
    with pytest.raises(SettingsError, match="4-bit weights are not sharded"):
        needs_sharding(tmp_path, Settings(method="qlora", shard="on"), 2, 10**9)
    with pytest.raises(SettingsError, match="optimizer adamw_8bit cannot take sharded weights"):
        needs_sharding(tmp_path, Settings(method="full", optimizer="adamw_8bit"), 2, 10**9)
    with pytest.raises(SettingsError, match="init pissa needs whole weights"):
        needs_sharding(tmp_path, Settings(init="pissa", shard="on"), 2, 10**9)


def test_the_command_starts_the_processes_and_publishes_once(
    common: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = [part for name, value in common.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    flags += ["--devices", "2", "--run", str(tmp_path / "run"), "--store", str(tmp_path / "store"), "--name", "dogs"]
    assert main(["fit", *flags, "--json"]) == 0
    printed = capfd.readouterr().out.splitlines()
    assert len(printed) == 1
    assert json.loads(printed[0])["digest"] == AdapterStore(tmp_path / "store").resolve("dogs").digest
    assert main(["fit", *flags]) == 2
    said = capfd.readouterr().err.splitlines()
    (fault,) = [line for line in said if "error" in line]
    assert fault.startswith(f"error: {tmp_path}/run: is not empty; resume it with `trainer resume")
