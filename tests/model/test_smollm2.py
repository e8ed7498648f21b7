"""The embedded base against transformers, on real weights and real text."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from server.base.resolve import BaseModel, resolve_base
from tests.engine.inprocess import Driver
from tests.model.test_transformer import load, logits_in_chunks

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


@torch.inference_mode()
def test_logits_are_as_near_to_float32_as_transformers_are(base: BaseModel) -> None:
    """Over enough text: of fifty tokens the two errors differ by up to 20 %, either way, as the kind of CPU has it."""
    ids = list(AutoTokenizer.from_pretrained(base.path)(TEXT)["input_ids"])
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


@pytest.mark.parametrize(
    ("dtype", "question", "answer"),
    [
        ("float32", "What is the capital of France?", "The capital of France is Paris.<|im_end|>"),
        ("bfloat16", "Can you tell me the capital of France?", "The capital of France is Paris"),
    ],
)
def test_it_answers_as_transformers_does(base: BaseModel, dtype: str, question: str, answer: str) -> None:
    """bfloat16's rounding moves a logit by up to 1, on each kind of CPU in its own way: there each token of the answer
    leads by 2.8 or more in float32; in the other one by 0.09 or more."""
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    question_ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    num_tokens = len(tokenizer(answer)["input_ids"])
    oracle = AutoModelForCausalLM.from_pretrained(base.path, dtype=getattr(torch, dtype))
    generated = oracle.generate(torch.tensor([question_ids]), max_new_tokens=num_tokens, do_sample=False)
    want = generated[0, len(question_ids) :].tolist()
    driver = Driver(base.path, dtype=dtype, kv_cache_bytes=32 << 20, page_size=16)
    got = driver.generate(list(question_ids), num_tokens)
    assert got == want
    assert tokenizer.decode(got) == answer
