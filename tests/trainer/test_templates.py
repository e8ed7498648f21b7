"""Masks, token by token, against labels made by hand, through transformers' own tokenizer and template engine."""

import re
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from tests.support.tiny_base import CORPUS
from tests.trainer.templates import DIALOGUE, SAID
from trainer.data import Dialogue, Message
from trainer.encoding import Encoder


def make_tokenizer(template: str, special: tuple[str, ...], end: str) -> Any:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=380, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*CORPUS, *(said for _, said in DIALOGUE)] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end)
    fast.chat_template = template
    return fast


def by_hand(tokenizer: Any, said: str) -> tuple[list[int], list[bool]]:
    """Ids and labels of a text with marks: each part tokenized by itself."""
    ids: list[int] = []
    learned: list[bool] = []
    for number, part in enumerate(re.split("[«»]", said)):
        tokens = tokenizer.encode(part, add_special_tokens=False)
        ids += tokens
        learned += [number % 2 == 1] * len(tokens)
    return ids, learned


@pytest.mark.parametrize("name", SAID)
def test_the_mask_is_the_one_made_by_hand(name: str) -> None:
    template, special, end, said = SAID[name]
    tokenizer = make_tokenizer(template, special, end)
    row = Dialogue(tuple(Message(role, content) for role, content in DIALOGUE), "rows.jsonl:1")
    examples = Encoder(tokenizer, {tokenizer.eos_token_id}, 200).encode(row)
    found = [(example.ids.tolist(), example.mask.tolist()) for example in examples]
    assert found == [by_hand(tokenizer, text) for text in said]
    assert any(len(tokenizer.encode(word)) == 1 for word in ("plus", " two", " four"))  # not all single letters
