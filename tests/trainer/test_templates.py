"""Masks, token by token, against labels made by hand, through transformers' own tokenizer and template engine."""

import re
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from tests.support.tiny_base import CORPUS
from tests.trainer.templates import DIALOGUE, LLAMA2, SAID
from trainer.data import Completion, Dialogue, Message
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


def test_nothing_comes_between_prompt_and_answer_where_a_text_begins_with_a_blank() -> None:
    """As SentencePiece's tokenizers write it: by itself an answer is "▁4", behind its prompt "4"."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    special = ["<s>", "</s>"]
    trainer = BpeTrainer(vocab_size=200, special_tokens=special, initial_alphabet=["\n"], show_progress=False)
    tokenizer.train_from_iterator([*CORPUS, *(said for _, said in DIALOGUE), "[INST] 2+2=4"] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    fast.chat_template = LLAMA2
    encoder = Encoder(fast, {fast.eos_token_id}, 400, end_id=fast.eos_token_id)
    for prompt, completion in (("2+2=", "4"), ("who", " minds")):  # "=4" is one token, if both are one text
        (plain,) = encoder.encode(Completion(prompt, completion, "rows.jsonl:1"))
        assert fast.decode(plain.ids) == f"{prompt}{completion}</s>"
        assert plain.ids[~plain.mask].tolist() == fast.encode(prompt)
    (chat,) = encoder.encode(Dialogue(tuple(Message(role, content) for role, content in DIALOGUE), "rows.jsonl:2"))
    _, _, _, (said,) = SAID["llama2"]
    assert chat.ids.tolist() == fast.encode(said.replace("«", "").replace("»", ""), add_special_tokens=False)
    assert "".join(fast.convert_ids_to_tokens(chat.ids[chat.mask].tolist())) == "▁It▁is▁four.▁</s>▁Six▁</s>"
