"""What is made of a request before the engine hears of it."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from server.engine.messages import Ready
from server.errors import InvalidRequest
from server.frontend.preparation import Preparation
from server.frontend.types import ChatMessage
from tests.frontend.harness import TOKENIZER, base_model, ids, request

INFO = Ready("cpu", "float32", max_model_len=64, max_num_seqs=1, max_batch_tokens=64, page_size=8, num_pages=8)


@pytest.fixture
def preparation(tmp_path: Path) -> Preparation:
    """Of a base that ends before the last token of its tokenizer, <tool>: one that was added later."""
    base = base_model(tmp_path)
    known = TOKENIZER.token_to_id("<tool>")
    assert known == TOKENIZER.get_vocab_size() - 1
    return Preparation(replace(base, spec=replace(base.spec, vocab_size=known)), 4)


def test_a_token_that_the_model_has_not_is_refused(preparation: Preparation) -> None:
    """A model that is given one ends its engine."""
    for field, prompt in (("text", "hello <tool>"), ("messages", [ChatMessage("user", "hello <tool>")])):
        with pytest.raises(InvalidRequest, match=f"{field}.*has the token {TOKENIZER.token_to_id('<tool>')}"):
            asyncio.run(preparation.prepare(request(prompt), INFO, "r", None))
    with pytest.raises(InvalidRequest, match="probe_text"):
        preparation.encode_probe("hello <tool>")
    prepared = asyncio.run(preparation.prepare(request("hello tool"), INFO, "r", None))
    assert prepared.submit.prompt == ids("hello tool") == preparation.encode_probe("hello tool")
