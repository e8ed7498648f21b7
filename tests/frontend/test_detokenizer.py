"""Deltas join to what decoding all tokens at once gives, for each kind of decoder, and never cut a character."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders

from server.errors import UnsupportedModel
from server.frontend.detokenizer import Detokenizer, TokenBytes
from tests.frontend.tokenizers_for_tests import byte_level_tokenizer, sentencepiece_tokenizer, words_tokenizer

BYTE_LEVEL = byte_level_tokenizer()
SENTENCEPIECE = sentencepiece_tokenizer()
WORDS = words_tokenizer()
BOS = 0

# Emoji with joiners and modifiers, flags, combining marks, scripts of two and three bytes.
text_parts = st.sampled_from(
    ["👩‍👩‍👧", "👍🏽", "🇫🇷", "é", "e\u0301", "漢字", "ไทย", " the", " ", "\n", "\u200d", "a", "𝔘"]
)
texts = st.one_of(st.text(max_size=30), st.lists(text_parts, max_size=15).map("".join))


def deltas(backend: Tokenizer, prompt: list[int], ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(TokenBytes(backend), prompt)
    return [detokenizer.add([token]) for token in ids] + [detokenizer.flush()]


@given(st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() + 5), max_size=60))
@settings(max_examples=300)
def test_byte_level_equals_decoding_all_at_once(ids: list[int]) -> None:
    assert "".join(deltas(BYTE_LEVEL, [BOS], ids)) == BYTE_LEVEL.decode(ids)


@pytest.mark.parametrize("backend", [BYTE_LEVEL, SENTENCEPIECE], ids=["byte-level", "sentencepiece"])
@given(text=texts)
@settings(max_examples=200)
def test_text_comes_back_in_whole_characters(backend: Tokenizer, text: str) -> None:
    ids = backend.encode(text, add_special_tokens=False).ids
    pieces = deltas(backend, [BOS], ids)
    assert "".join(pieces) == backend.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("backend", [BYTE_LEVEL, SENTENCEPIECE, WORDS], ids=["byte-level", "sentencepiece", "words"])
@pytest.mark.parametrize(("prompt", "answer"), [("the quick", "the lazy dog"), ("jumps", "over")])
def test_goes_on_from_the_prompt_with_its_space(backend: Tokenizer, prompt: str, answer: str) -> None:
    before = backend.encode(prompt, add_special_tokens=False).ids
    after = backend.encode(answer, add_special_tokens=False).ids
    assert backend.decode(before) + "".join(deltas(backend, before, after)) == backend.decode(before + after)


@given(st.text("aé漢👍", max_size=6), st.lists(st.integers(2, 257), max_size=6), st.integers(0, 30))
@settings(max_examples=300)
def test_finishes_a_character_that_the_prompt_began(text: str, more: list[int], cut: int) -> None:
    """Ids 2 to 257 are single bytes, most of which break characters."""
    ids = BYTE_LEVEL.encode(text, add_special_tokens=False).ids + more
    prompt, rest = ids[:cut], ids[cut:]
    before, whole = BYTE_LEVEL.decode(prompt), BYTE_LEVEL.decode(ids)
    joined = "".join(deltas(BYTE_LEVEL, [BOS, *prompt], rest))
    assert before + joined == whole or (before.endswith("\ufffd") and before[:-1] + joined == whole)


def test_broken_bytes_are_shown_once_nothing_can_mend_them() -> None:
    byte = {value: BYTE_LEVEL.token_to_id(token) for value, token in ((0xE4, "ä"), (0xBD, "½"), (0x61, "a"))}
    pieces = deltas(BYTE_LEVEL, [BOS], [byte[0xE4], byte[0xBD], byte[0x61], byte[0xE4]])
    assert pieces == ["", "", "\ufffda", "", "\ufffd"]


def test_special_tokens_add_no_text_and_other_added_tokens_do() -> None:
    special, added = BYTE_LEVEL.token_to_id("<|end|>"), BYTE_LEVEL.token_to_id("<tool>")
    the = BYTE_LEVEL.encode("the", add_special_tokens=False).ids
    assert "".join(deltas(BYTE_LEVEL, [BOS], [*the, special, added])) == "the<tool>"


@pytest.mark.parametrize(
    ("backend", "decoder"),
    [
        (SENTENCEPIECE, decoders.Metaspace()),
        (SENTENCEPIECE, decoders.Metaspace(prepend_scheme="never")),
        (SENTENCEPIECE, decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])),
        (BYTE_LEVEL, decoders.Sequence([decoders.ByteLevel()])),
    ],
    ids=["metaspace", "metaspace-never", "without-strip", "sequence"],
)
def test_other_decoders_of_the_supported_families(backend: Tokenizer, decoder: decoders.Decoder) -> None:
    backend = Tokenizer.from_str(backend.to_str())
    backend.decoder = decoder
    ids = backend.encode("dog fox over", add_special_tokens=False).ids
    assert "".join(deltas(backend, [BOS], ids)) == backend.decode(ids)


@pytest.mark.parametrize("make", [decoders.WordPiece, decoders.CTC, decoders.BPEDecoder])
def test_an_unknown_decoder_is_refused_by_name(make: Callable[[], decoders.Decoder]) -> None:
    backend = Tokenizer.from_str(WORDS.to_str())
    backend.decoder = make()
    with pytest.raises(UnsupportedModel, match=make.__name__):
        TokenBytes(backend)
