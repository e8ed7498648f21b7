"""The scripts that drive the peers tell the same as ours, so that lines of both can be laid side by side."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_base import save_tiny_base

ROOT = Path(__file__).parents[2]
STEPS = ["--length", "32", "--batch", "1", "--steps", "5", "--vocab", "1200"]


def told(*command: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr
    line: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return line


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_trl_and_the_trainer_train_the_same_steps(method: str, tmp_path: Path) -> None:
    lm = save_tiny_base(tmp_path / "tiny")
    lm.resize_token_embeddings(1200)  # the rows' ids begin at 1000
    lm.save_pretrained(tmp_path / "tiny")
    steps = ["--model", str(tmp_path / "tiny"), "--method", method, *STEPS]
    theirs = told("benchmarks/peers/trl_train.py", "--tokenizer", str(tmp_path / "tiny"), *steps)
    ours = told("-m", "benchmarks.train", "--device", "cpu", *steps)
    assert theirs.pop("peer").startswith("trl ")
    assert set(theirs) <= set(ours)
    assert all(theirs[key] == ours[key] for key in ("method", "batch", "length", "checkpointing"))
    assert theirs["tok_s"] > 0
