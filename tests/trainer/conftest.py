"""A tiny base, chat rows, and a run of the trainer over them."""

import json
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from server.base.resolve import BaseModel, resolve_base
from tests.support.tiny_base import save_tiny_base
from trainer.fit import Report, Watcher, fit
from trainer.loop import Step
from trainer.settings import Settings

ANSWER = "seven lazy dogs"
QUESTIONS = ("one", "the quick fox", "who jumps over the dog", "a parrot answers", "ten", "why not", "is it", "go")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    directory = tmp_path_factory.mktemp("base") / "tiny"
    save_tiny_base(directory)
    return resolve_base(str(directory))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Different questions, one answer: what even a tiny random model can learn."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": ANSWER}]}
        for question in QUESTIONS
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


Train = Callable[..., tuple[Report, list[Step]]]


@pytest.fixture
def train(base: BaseModel, data: Path, tmp_path: Path) -> Train:
    """Train on `data`; keyword arguments are settings, `run` the directory's name."""
    numbers = count()

    def call(run: str | None = None, watcher: Watcher | None = None, **changes: object) -> tuple[Report, list[Step]]:
        steps: list[Step] = []
        defaults: dict[str, object] = {
            "base": str(base.path),
            "data": str(data),
            "learning_rate": 2e-2,
            "epochs": 12,
            "batch_size": 4,
            "dtype": "float32",
            "device": "cpu",
        }
        settings = Settings(**(defaults | changes))  # type: ignore[arg-type]
        directory = tmp_path / (run or f"run-{next(numbers)}")
        report = fit(settings, directory, watcher or Watcher(on_step=steps.append))
        return report, steps

    return call
