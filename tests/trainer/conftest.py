"""A tiny base, chat rows, and a run of the trainer over them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from adapters.store import AdapterStore
from server.base.resolve import BaseModel, resolve_base
from tests.support.tiny_base import save_tiny_base
from trainer.fit import Job, Report, run
from trainer.loop import Step
from trainer.settings import Settings

ANSWER = "seven lazy dogs"
SETTINGS = Settings(rank=8, learning_rate=2e-2, epochs=12, batch_size=4)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    directory = tmp_path_factory.mktemp("base") / "tiny"
    save_tiny_base(directory)
    return resolve_base(str(directory))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Different questions, one answer: what even a tiny random model can learn."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    questions = ("one", "the quick fox", "who jumps over the dog", "a parrot answers", "ten", "why not", "is it", "go")
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": ANSWER}]}
        for question in questions
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


Fit = Callable[..., tuple[Report, list[Step]]]


@pytest.fixture
def fit(base: BaseModel, data: Path, tmp_path: Path) -> Fit:
    """Train on `data`; keyword arguments replace fields of the settings."""

    def call(
        name: str = "dogs", method: str = "lora", store: Path | None = None, **changes: object
    ) -> tuple[Report, list[Step]]:
        steps: list[Step] = []
        settings = replace(SETTINGS, **changes)  # type: ignore[arg-type]
        job = Job(data, name, "latest", method, settings, dtype="float32", device="cpu")
        report = run(job, base, AdapterStore(store or tmp_path / "store"), lambda _: None, steps.append)
        return report, steps

    return call
