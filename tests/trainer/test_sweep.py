"""Adapters trained side by side are those that each job makes alone."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, BloomForCausalLM

from server.base.resolve import BaseModel
from trainer import sweep as module
from trainer.cli import main
from trainer.errors import SettingsError, TrainingError
from trainer.fit import fit
from trainer.settings import Settings
from trainer.sweep import read_jobs, sweep

LINES = ("the dog", "a lazy fox", "seven parrots answer", "who minds", "languages of each visitor", "not at all", "ten")


def silent(message: str) -> None:
    """Say nothing."""


def rows(path: Path, count: int, answer: str) -> Path:
    said = [LINES[i % len(LINES)] + " " + str(i) for i in range(count)]
    path.write_text(
        "\n".join(
            json.dumps({"messages": [{"role": "user", "content": line}, {"role": "assistant", "content": answer}]})
            for line in said
        )
    )
    return path


def jobs(base: BaseModel, directory: Path, **changes: Any) -> list[Settings]:
    """Different in everything that jobs of one sweep may differ in."""
    few, many = rows(directory / "few.jsonl", 5, "a fox"), rows(directory / "many.jsonl", 13, "the parrot jumps")
    shared: dict[str, Any] = {"base": str(base.path), "dtype": "float32", "device": "cpu", "learning_rate": 1e-2}
    each: list[dict[str, Any]] = [
        {"name": "one", "data": str(few), "rank": 4, "epochs": 3, "batch_size": 2},
        {"name": "two", "data": str(many), "rank": 7, "epochs": 2, "batch_size": 4, "seed": 5, "rslora": True},
        {
            "name": "three",
            "data": str(many),
            "target_modules": ("q_proj", "down_proj"),
            "lora_plus": 4.0,
            "epochs": 1,
            "init": "eva",
        },
        {"name": "four", "data": str(few), "rank_pattern": {"v_proj": 3}, "weight_decay": 0.1, "schedule": "linear"},
    ]
    return [Settings(**{**shared, **job, **changes}) for job in each]


@pytest.mark.parametrize("changes", [{}, {"method": "qlora"}, {"packing": True, "max_length": 64}], ids=str)
def test_each_job_makes_what_it_makes_alone(changes: dict[str, Any], base: BaseModel, tmp_path: Path) -> None:
    given = jobs(base, tmp_path, **changes)
    together = sweep(given, tmp_path / "together", at_once=3, note=silent)
    for job, outcome in zip(given, together, strict=True):
        alone = fit(job, tmp_path / "alone" / str(job.name))
        assert outcome.result is not None
        assert outcome.result.num_steps == alone.result.num_steps
        assert outcome.result.num_tokens == alone.result.num_tokens
        assert outcome.result.final_loss == pytest.approx(alone.result.final_loss, rel=1e-4)
        mine, theirs = (load_file(run.adapter / "adapter_model.safetensors") for run in (outcome.run, alone.run))
        assert mine.keys() == theirs.keys()
        for name in theirs:
            torch.testing.assert_close(mine[name], theirs[name], rtol=1e-3, atol=1e-4)
        mine_config, their_config = (
            json.loads((run.adapter / "adapter_config.json").read_text()) for run in (outcome.run, alone.run)
        )
        assert mine_config == their_config
        losses = [[line["loss"] for line in run.metrics()] for run in (outcome.run, alone.run)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_peft_loads_what_a_sweep_leaves(base: BaseModel, tmp_path: Path) -> None:
    for outcome in sweep(jobs(base, tmp_path), tmp_path / "runs", at_once=16, note=silent):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.path), str(outcome.run.adapter))
        assert any(value.abs().sum() > 0 for name, value in model.named_parameters() if "lora_B" in name)
        assert outcome.run.info()["result"]["num_steps"] == len(list(outcome.run.metrics()))


def test_one_that_fails_does_not_harm_the_others(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = module.start_lane

    def spoil(causal_lm: Any, settings: Settings, *rest: Any) -> Any:
        lane = real(causal_lm, settings, *rest)
        if settings.name == "two":
            with torch.no_grad():
                next(iter(lane.parts.values())).b.fill_(float("nan"))
        return lane

    given = jobs(base, tmp_path)
    well = sweep(given, tmp_path / "well", at_once=4, note=silent)
    monkeypatch.setattr(module, "start_lane", spoil)
    spoiled = sweep(given, tmp_path / "spoiled", at_once=4, note=silent)
    assert [outcome.error is None for outcome in spoiled] == [True, False, True, True]
    assert "the loss became nan at step 1" in str(spoiled[1].error)
    assert not spoiled[1].run.adapter.exists()
    for one, other in zip(well, spoiled, strict=True):
        if other.result:
            tensors = [load_file(run.run.adapter / "adapter_model.safetensors") for run in (one, other)]
            assert all(torch.allclose(tensors[0][name], tensors[1][name], atol=1e-4) for name in tensors[0])


def test_a_base_that_cannot_be_packed_is_found_out(base: BaseModel, tmp_path: Path) -> None:
    config = BloomConfig(vocab_size=400, hidden_size=32, n_layer=1, n_head=2, eos_token_id=1)
    BloomForCausalLM(config).save_pretrained(tmp_path / "bloom")
    AutoTokenizer.from_pretrained(base.path).save_pretrained(tmp_path / "bloom")
    given = replace(jobs(base, tmp_path)[0], base=str(tmp_path / "bloom"), packing=True)
    with pytest.raises(TrainingError, match="packing needs a model that takes position_ids"):
        sweep([given], tmp_path / "runs", at_once=1, note=silent)


def test_a_file_of_jobs_from_the_command_line(
    base: BaseModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = rows(tmp_path / "rows.jsonl", 4, "a fox")
    shared = f"base: {base.path}\ndata: {data}\nstore: {tmp_path / 'store'}\n"
    (tmp_path / "jobs.yaml").write_text(
        f"{shared}dtype: float32\ndevice: cpu\nepochs: 1\nlearning-rate: 0.01\n"
        "jobs:\n- name: small\n  rank: 2\n- name: large\n  rank: 16\n"
    )
    arguments = ["sweep", str(tmp_path / "jobs.yaml"), "--out", str(tmp_path / "runs"), "--publish", "--json"]
    assert main(arguments) == 0
    outcome = json.loads(capsys.readouterr().out)
    assert [Path(job["run"]).name for job in outcome["jobs"]] == ["small", "large"]
    from adapters.store import AdapterStore

    store = AdapterStore(tmp_path / "store")
    assert [store.resolve(name).digest for name in ("small", "large")] == [job["digest"] for job in outcome["jobs"]]
    assert [store.resolve(name).manifest.rank for name in ("small", "large")] == [2, 16]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rank: 8", "needs a list `jobs`"),
        ("jobs: [{rank: 8}]", "job 1: needs a name"),
        ("jobs: [{name: a, rnak: 8}]", "job 1: 'rnak' is no setting"),
        ("jobs: [{name: a}, {name: a}]", "two jobs are named 'a'"),
        ("jobs: [{name: a}, {name: b, method: qlora}]", "job b: method must be the same for all jobs"),
        ("jobs: [{name: a, method: full}]", "job a: method full changes the base"),
        ("dropout: 0.1\njobs: [{name: a}]", "job a: a sweep has no dropout"),
        ('jobs: [{name: a, gradient-checkpointing: "on"}]', "job a: a sweep has no gradient-checkpointing"),
    ],
)
def test_jobs_that_cannot_be_one_sweep_are_refused(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "jobs.yaml").write_text(text)
    with pytest.raises(SettingsError, match=words):
        read_jobs(tmp_path / "jobs.yaml")
