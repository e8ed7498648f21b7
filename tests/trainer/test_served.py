"""The server's forward pass as the trainer calls it, against transformers and PEFT in float32."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from server.base.resolve import BaseModel
from tests.engine.inprocess import make_adapter
from trainer import served as module
from trainer.encoding import Example
from trainer.served import Loss, ServedBase

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def adapter(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("adapter")
    make_adapter(AutoModelForCausalLM.from_pretrained(base.path), directory, seed=3, r=6, std=0.05)
    return directory


def oracle(base: BaseModel, adapter: Path | None) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(base.path)
    return (model if adapter is None else PeftModel.from_pretrained(model, str(adapter))).eval()


def rows(*lengths: int) -> list[Example]:
    """Random ones, some of whose tokens are learned, the last always."""
    rng = random.Random(7)
    masks = [[rng.random() < 0.4 for _ in range(length - 1)] + [True] for length in lengths]
    return [Example.of([rng.randrange(3, 300) for _ in mask], mask) for mask in masks]


@torch.no_grad()
def expected_loss(model: Any, row: Example) -> Loss:
    logits = model(torch.tensor([row.ids.tolist()])).logits[0].log_softmax(-1)
    nats = [-float(logits[at - 1, row.ids[at]]) for at in range(1, len(row)) if row.mask[at]]
    return Loss(sum(nats), len(nats))


@pytest.mark.parametrize("has_adapter", [True, False])
@pytest.mark.parametrize("step_tokens", [1024, 16], ids=["whole", "in parts"])
def test_losses_are_those_of_transformers_and_peft(
    has_adapter: bool, step_tokens: int, base: BaseModel, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STEP_TOKENS", step_tokens)
    served = ServedBase(base.path, base.spec, CPU)
    model = oracle(base, adapter if has_adapter else None)
    given = rows(3, 40, 17, 2, 5, 33)
    found = served.losses(given, served.load_adapter(adapter) if has_adapter else None)
    for row, loss in zip(given, found, strict=True):
        want = expected_loss(model, row)
        assert loss.num_tokens == want.num_tokens
        assert loss.total == pytest.approx(want.total, rel=1e-5)


@pytest.mark.parametrize("step_tokens", [1024, 16], ids=["whole", "in parts"])
def test_answers_are_those_of_transformers_and_peft(
    step_tokens: int, base: BaseModel, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STEP_TOKENS", step_tokens)
    monkeypatch.setattr(module, "BATCH_ROWS", 3)
    served = ServedBase(base.path, base.spec, CPU)
    model = oracle(base, adapter)
    prompts = [row.ids.tolist() for row in rows(4, 37, 9, 21, 1)]
    found = served.generate(prompts, 10, {1}, served.load_adapter(adapter))
    for prompt, answer in zip(prompts, found, strict=True):
        said = model.generate(
            input_ids=torch.tensor([prompt]), max_new_tokens=10, do_sample=False, eos_token_id=1, pad_token_id=0
        )[0, len(prompt) :].tolist()
        assert answer == (said[: said.index(1)] if 1 in said else said)


def test_an_answer_ends_before_its_end_token(base: BaseModel) -> None:
    served = ServedBase(base.path, base.spec, CPU)
    prompt = rows(8)[0].ids.tolist()
    (long,) = served.generate([prompt], 6, set())
    assert len(long) == 6
    (short,) = served.generate([prompt], 6, {long[2]})
    assert short == long[: long.index(long[2])]
