"""A comparison from the command line: its runs, its numbers, its table; and that it goes on where it stopped."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from server.base.resolve import BaseModel
from tests.trainer.conftest import ANSWER
from trainer.cli import main
from trainer.compare import Comparison, Score, Trial, as_markdown
from trainer.run_directory import RunDirectory


def arguments(base: BaseModel, data: Path, test: Path, out: Path) -> list[str]:
    return [
        "compare", "--methods", "lora,qlora,full", "--seeds", "1", "--base", str(base.path), "--data", str(data),
        "--test", str(test), "--test-rows", "4", "--out", str(out), "--full-lr", "0.005", "--lr", "0.02", "--rank", "4",
        "--epochs", "10", "--batch-size", "4", "--dtype", "float32", "--device", "cpu", "--json",
    ]  # fmt: skip


def test_a_comparison_trains_asks_and_writes_one_table(
    base: BaseModel, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    test = tmp_path / "test.jsonl"
    asked = ("two", "the fox", "a dog that answers", "who")
    rows = [[{"role": "user", "content": line}, {"role": "assistant", "content": ANSWER}] for line in asked]
    test.write_text("\n".join(json.dumps({"messages": row}) for row in rows))
    out = tmp_path / "out"
    assert main(arguments(base, data, test, out)) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((out / "comparison.json").read_text())
    assert found["base"]["exact_match"] == 0.0
    trials: dict[str, Any] = {trial["method"]: trial for trial in found["trials"]}
    assert {name: trial["score"]["exact_match"] for name, trial in trials.items()} == {
        "lora": 1.0,
        "qlora": 1.0,
        "full": 1.0,
    }
    assert {name for name, trial in trials.items() if trial["score_16bit"] is not None} == {"qlora"}
    in_four_bits, in_sixteen = trials["qlora"]["score"], trials["qlora"]["score_16bit"]
    assert in_four_bits["loss"] != in_sixteen["loss"]
    assert trials["full"]["trained_share"] == 1.0
    assert 0.02 < trials["lora"]["trained_share"] < 0.2
    assert found["ratios"]["lora/full"]["exact match"] == 1.0
    assert RunDirectory.open(out / "full-0").settings().learning_rate == 0.005
    table = (out / "comparison.md").read_text()
    assert all(f"| {method} | 100.0% |" in table for method in trials)
    assert "| qlora, served in 16 bits | " in table
    for picture in ("comparison.png", "losses.png"):
        assert imread(out / picture).shape[:2] == (540, 960)
    before = {path: path.stat().st_mtime_ns for path in (*out.glob("*/metrics.jsonl"), out / "scores.json")}
    assert main(arguments(base, data, test, out)) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert main([*arguments(base, data, test, out), "--rank", "2"]) == 4
    assert "is a run with other settings; take another --out" in capsys.readouterr().err


def test_the_table_has_means_spreads_and_ratios() -> None:
    def trial(method: str, seed: int, exact: float, gib: float) -> Trial:
        return Trial(method, seed, Score(0.5, exact), 10.0, 100.0, int(gib * (1 << 30)), 0.01)

    comparison = Comparison(
        Score(2.0, 0.05),
        (
            trial("lora", 0, 0.90, 2.0),
            trial("full", 0, 1.0, 4.0),
            trial("lora", 1, 0.80, 2.0),
            trial("full", 1, 0.7, 4),
        ),
    )
    table = as_markdown(comparison)
    assert "| lora | 85.0% ± 7.1% | 0.5000 | 10 | 100 | 2.00 GiB | 1.00% |" in table
    assert "- lora / full: exact match 1.000, peak memory 0.500, tokens/s 1.000" in table
    assert "qlora" not in table
    told = (*comparison.trials, replace(trial("qlora", 0, 0.9, 1.0), score_16bit=Score(0.7, 0.6)))
    wider = as_markdown(replace(comparison, trials=told))
    assert "| qlora | 90.0% | 0.5000 | 10 | 100 | 1.00 GiB | 1.00% |" in wider
    assert "| qlora, served in 16 bits | 60.0% | 0.7000 |  |  |  |  |" in wider
    assert "Means over 2 seeds" in table
    assert "Means over 2 (lora), 1 (full) seeds" in as_markdown(replace(comparison, trials=comparison.trials[:3]))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--methods", "lora,dora"], "method 'dora' is unknown"),
        ([], "pass --data and --test, or --task"),
        (["--task", "chess"], "task 'chess' is unknown; known are bookings"),
        (["--task", "bookings", "--data", "x.jsonl"], "--task brings its own rows"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    more: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", "--out", str(tmp_path), *more]) == 2
    assert words in capsys.readouterr().err
