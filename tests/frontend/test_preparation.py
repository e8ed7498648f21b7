"""What is made of a request before the engine hears of it."""

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from server.engine.messages import Ready, Submit, decode_to_engine, encode
from server.errors import InvalidRequest
from server.frontend.preparation import Preparation
from server.frontend.stop_strings import StopStrings
from server.frontend.tokenizer import Tokenizer
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


@pytest.mark.parametrize(
    ("messages", "is_inline"),
    [
        ([ChatMessage("user", "hi")] * 5, True),
        ([ChatMessage("user", "hi " * 1000)], False),
        ([ChatMessage("hi " * 1000, "")], False),
        ([ChatMessage("user", "")] * 400, False),
    ],
    ids=["little", "a long content", "a long role", "many messages"],
)
def test_a_conversation_that_takes_long_to_encode_does_not_hold_up_others(
    preparation: Preparation, monkeypatch: pytest.MonkeyPatch, messages: list[ChatMessage], is_inline: bool
) -> None:
    threads = []

    def encode_chat(self: Tokenizer, messages: Sequence[ChatMessage], max_tokens: int | None = None) -> list[int]:
        threads.append(threading.current_thread())
        return [5]

    monkeypatch.setattr(Tokenizer, "encode_chat", encode_chat)
    asyncio.run(preparation.prepare(request(messages), INFO, "r", None))
    assert [thread is threading.main_thread() for thread in threads] == [is_inline]


@pytest.mark.parametrize(("length", "is_inline"), [(20, True), (1000, False)])
def test_long_stop_strings_do_not_hold_up_others(
    preparation: Preparation, monkeypatch: pytest.MonkeyPatch, length: int, is_inline: bool
) -> None:
    threads = []

    class Watched(StopStrings):
        __slots__ = ()

        def __init__(self, strings: Sequence[str]) -> None:
            threads.append(threading.current_thread())
            super().__init__(strings)

    monkeypatch.setattr("server.frontend.preparation.StopStrings", Watched)
    asked = request("hi", stop_strings=tuple(letter * length for letter in "abcd"))
    asyncio.run(preparation.prepare(asked, INFO, "r", None))
    assert [thread is threading.main_thread() for thread in threads] == [is_inline]


def test_a_conversation_of_more_messages_than_the_context_has_tokens_is_refused(preparation: Preparation) -> None:
    """Before anything is made of them: rendering 400,000, which fit a message, takes seconds."""
    with pytest.raises(InvalidRequest, match="messages: has 65 messages"):
        preparation.check(request([ChatMessage("user", "")] * 65), INFO)
    preparation.check(request([ChatMessage("user", "")] * 64), INFO)


def test_stop_tokens_reach_the_engine_as_a_set(preparation: Preparation) -> None:
    """It looks for each token that it draws among them, between two steps that all others wait for."""
    prepared = asyncio.run(preparation.prepare(request("hello", stop_token_ids=(5, 7, 5)), INFO, "r", None))
    arrived = decode_to_engine(encode(prepared.submit))
    assert isinstance(arrived, Submit)
    assert arrived.stopping.stop_token_ids == {5, 7}
