"""The bound on a token's text, against what tokenizers really make of it."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers

from server.errors import InvalidRequest
from server.frontend.text_bound import longest_token
from server.frontend.tokenizer import Tokenizer as OurTokenizer
from tests.frontend.tokenizers_for_tests import byte_level_tokenizer, sentencepiece_tokenizer, words_tokenizer

COMPOSED = [unicodedata.normalize("NFD", char) for char in ("ᾂ", "각", "é", "Å")]
TEXTS = st.lists(st.one_of(st.characters(codec="utf-8"), st.sampled_from([*COMPOSED, "hello there", " ", "<|begin|>"])))


def composing() -> Tokenizer:
    tokenizer = byte_level_tokenizer()
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens(["ᾂ각", "<|a long added token|>"])
    return tokenizer


@pytest.mark.parametrize("make", [byte_level_tokenizer, sentencepiece_tokenizer, composing])
def test_no_text_has_more_characters_than_its_tokens_can_stand_for(make: object) -> None:
    assert callable(make)
    tokenizer = make()
    longest = longest_token(tokenizer)
    assert longest is not None

    @given(TEXTS.map("".join))
    def holds(text: str) -> None:
        assert len(text) <= len(tokenizer.encode(text, add_special_tokens=False).ids) * longest

    holds()


def test_there_is_no_bound_where_text_may_vanish() -> None:
    swallowing = byte_level_tokenizer()
    swallowing.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    stripping = byte_level_tokenizer()
    stripping.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Strip()])
    shrinking = byte_level_tokenizer()
    shrinking.normalizer = normalizers.Replace("  ", " ")
    splitting = byte_level_tokenizer()
    splitting.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel()])
    for tokenizer in (swallowing, stripping, shrinking, splitting, words_tokenizer()):
        assert longest_token(tokenizer) is None


def test_a_text_far_too_long_is_refused_without_encoding_it() -> None:
    backend = byte_level_tokenizer()
    longest = longest_token(backend)
    assert longest is not None
    tokenizer = OurTokenizer(backend, None)
    assert len(tokenizer.encode_text("x" * 10 * longest, 10)) > 10  # it may be as long as ten tokens
    with pytest.raises(InvalidRequest, match="more than 10 tokens can stand for") as caught:
        tokenizer.encode_text("x" * (10 * longest + 1), 10)
    assert caught.value.field == "text"
