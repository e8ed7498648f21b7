"""The embedded base in bfloat16 against transformers, on real weights and real text."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from server.base.resolve import BaseModel, resolve_base
from tests.engine.inprocess import Driver
from tests.model.test_transformer import load, logits_in_chunks

QUESTION = [{"role": "user", "content": "Can you tell me the capital of France?"}]
TEXT = (
    "The lorikeet is a small parrot with a brush-tipped tongue, with which it feeds on nectar. It lives in flocks in "
    "the forests of Australia and New Guinea, and is known for its bright plumage and its loud, rolling calls. "
    "Its tongue ends in a brush of fine hairs, which soak up nectar as it climbs from flower to flower. In the morning "
    "the flock leaves the trees where it has slept and flies, often for many miles, to wherever something is in bloom. "
    "Fruit and insects are eaten too, and in orchards the birds can be a nuisance. They nest in the hollows of "
    "eucalyptus trees, where the female sits on two or three white eggs for about three weeks while the male brings "
    "her food."
)


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return resolve_base(None)


def encode(directory: Path) -> tuple[list[int], list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    chat = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=True)["input_ids"]
    return list(chat), list(tokenizer(TEXT)["input_ids"])


@torch.inference_mode()
def test_logits_are_as_near_to_float32_as_transformers_are(base: BaseModel) -> None:
    """Over enough text: of fifty tokens the two errors differ by up to 20 %, either way, as the kind of CPU has it."""
    _, ids = encode(base.path)
    exact = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)(torch.tensor([ids])).logits[0]
    theirs = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.bfloat16)(torch.tensor([ids])).logits[0]
    model, cache = load(base.path, torch.bfloat16)
    ours = logits_in_chunks(model, cache, torch.tensor(ids), [20, 1, len(ids) - 21])
    assert (ours.float() - exact).norm() <= 1.2 * (theirs.float() - exact).norm()
    # Where float32 leaves no doubt about the next token, neither may bfloat16.
    margin = exact.topk(2).values.diff().abs().squeeze(-1)
    sure = margin > 4 * (theirs.float() - exact).abs().max(-1).values
    assert int(sure.sum()) >= 10
    assert torch.equal(ours.argmax(-1)[sure], exact.argmax(-1)[sure])


def test_it_answers_as_transformers_does(base: BaseModel) -> None:
    """In bfloat16, whose rounding moves a logit by up to 1, on each kind of CPU in its own way: each of these tokens
    leads by 2.8 or more in float32."""
    chat, _ = encode(base.path)
    oracle = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.bfloat16)
    want = oracle.generate(torch.tensor([chat]), max_new_tokens=6, do_sample=False)[0, len(chat) :].tolist()
    driver = Driver(base.path, kv_cache_bytes=32 << 20, page_size=16)
    got = driver.generate(chat, len(want))
    assert got == want
    assert AutoTokenizer.from_pretrained(base.path).decode(got) == "The capital of France is Paris"
