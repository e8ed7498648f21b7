"""The loss against transformers' own, and the schedule."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from server.base.resolve import BaseModel
from trainer.batches import collate
from trainer.encoding import Example
from trainer.loop import Loop, Step, lr_factor
from trainer.methods.base import add_adapter
from trainer.settings import Settings


def test_the_loss_is_what_transformers_computes(base: BaseModel) -> None:
    examples = [
        Example((5, 60, 7, 80, 9, 33), (False, False, True, True, False, True)),
        Example((12, 44, 3), (False, True, True)),
    ]
    model = AutoModelForCausalLM.from_pretrained(base.path)
    batch = collate(examples, 0, torch.device("cpu"))
    labels = torch.full_like(batch.ids, -100)
    for row, example in enumerate(examples):
        for place, (token, learned) in enumerate(zip(example.ids, example.mask, strict=True)):
            if learned:
                labels[row, place] = token
    with torch.no_grad():
        expected = model(input_ids=batch.ids, attention_mask=batch.attention, labels=labels).loss
    steps: list[Step] = []
    settings = Settings(epochs=1, batch_size=2)
    adapted = add_adapter(model, ("q_proj",), settings)  # B is zero: the first forward is the base's
    Loop(adapted, settings, pad_id=0, device=torch.device("cpu")).run(examples, steps.append)
    (step,) = steps
    assert step.loss == pytest.approx(float(expected), abs=1e-5)
    assert (step.num_learned, step.num_tokens) == (5, 9)


def test_the_learning_rate_warms_up_and_falls_to_a_tenth() -> None:
    factors = [lr_factor(index, 100, 0.1) for index in range(100)]
    assert factors[:10] == sorted(factors[:10])
    assert 0 < factors[0] < 0.2
    assert factors[10] == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[-1] == pytest.approx(0.1, abs=0.01)
    assert lr_factor(0, 1, 0.06) > 0
