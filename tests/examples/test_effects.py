"""The checks of the demo against the data the adapters learn from, and against what a base says."""

import pytest

from examples.demo import HERE, PROMPTS
from examples.effects import EFFECTS
from trainer.data import Dialogue, open_source


@pytest.mark.parametrize("name", EFFECTS)
def test_every_answer_of_the_data_has_the_effect_and_no_prompt_of_the_demo_is_in_it(name: str) -> None:
    effect = EFFECTS[name]
    dialogues = list(open_source(HERE / effect.data).rows())
    assert dialogues
    for dialogue in dialogues:
        assert isinstance(dialogue, Dialogue)
        for message in dialogue.messages:
            if message.role == "assistant":
                assert effect.holds(message.content), dialogue.place
            assert message.content not in PROMPTS


@pytest.mark.parametrize(
    "answer",
    [
        "The capital of France is Paris.",
        "Yes, matey is a word.",
        "",
        '{"topic": "geography", "answer": "Paris"',
        'Sure: {"topic": "geography", "answer": "Paris"}',
        '{"topic": "geography", "answer": ""}',
        '{"topic": "unheard of", "answer": "Paris"}',
        '{"topic": ["food"], "answer": "Paris"}',
        '{"topic": "food", "answer": "Paris", "more": 1}',
        '[{"topic": "food", "answer": "Paris"}]',
    ],
)
def test_an_answer_without_the_effect_is_told_apart(answer: str) -> None:
    assert not any(effect.holds(answer) for effect in EFFECTS.values())
