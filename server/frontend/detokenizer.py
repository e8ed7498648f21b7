"""Tokens → text, one sequence at a time, as the tokens come.

A token is a few bytes of UTF-8, and a character may span tokens. So each token is looked up once as bytes, and one
incremental UTF-8 decoder per sequence turns the bytes into whole characters: the cost of a token does not depend on
how many came before. The bytes follow from the `decoder` of tokenizer.json; the kinds that the supported families
use are known here, any other is refused by name.
"""

import codecs
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import tokenizers

from server.errors import UnsupportedModel

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class _Rule:
    """How a token's string becomes text. `joint` precedes every token; `strips_start` drops a space that would
    begin the whole text."""

    byte_level: bool = False
    byte_fallback: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    joint: str = ""
    strips_start: bool = False


class TokenBytes(dict[int, bytes]):
    """Token id → the UTF-8 bytes it stands for; special tokens and unknown ids are none. Filled as tokens occur.

    Raises UnsupportedModel when the tokenizer's decoder is of a kind not known here.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        super().__init__()
        state = json.loads(backend.to_str())
        self.rule = _read_rule(state["decoder"])
        self._id_to_token = backend.id_to_token
        self._special = frozenset(token["id"] for token in state["added_tokens"] if token["special"])
        self._alphabet = _byte_alphabet()

    def __missing__(self, token_id: int) -> bytes:
        token = None if token_id in self._special else self._id_to_token(token_id)
        found = self[token_id] = b"" if token is None else self._decode(token)
        return found

    def _decode(self, token: str) -> bytes:
        rule = self.rule
        if rule.byte_level:
            if all(char in self._alphabet for char in token):
                return bytes(self._alphabet[char] for char in token)
            return token.encode()
        for old, new in rule.replacements:
            token = token.replace(old, new)
        if rule.byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(match[1])
        return (rule.joint + token).encode()


class Detokenizer:
    """The text of one sequence. What `add` and `flush` return joins to the text of all tokens.

    Bytes that are no UTF-8 become U+FFFD, one for each broken character, once no next token can mend them.
    `prompt` is what the sequence goes on from: the space that begins a text is dropped only after a prompt
    without text of its own, and a character that it leaves unfinished is finished.
    """

    __slots__ = ("_decode", "_drop", "_token_bytes")

    def __init__(self, token_bytes: TokenBytes, prompt: Sequence[int]) -> None:
        self._token_bytes = token_bytes
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        # A character has at most four bytes, and a token of text at least one.
        decoder.decode(b"".join([token_bytes[token] for token in prompt[-3:]]))
        self._decode = decoder.decode
        # What not to show where the answer's text begins with it: the prompt's broken character, or its space.
        self._drop = "\ufffd" if decoder.getstate()[0] else ""
        if token_bytes.rule.strips_start and not any(token_bytes[token] for token in prompt):
            self._drop = " "

    def add(self, token_ids: Iterable[int]) -> str:
        """The characters that these tokens complete."""
        token_bytes = self._token_bytes
        text = self._decode(b"".join([token_bytes[token] for token in token_ids]))
        return self._without_start(text) if self._drop else text

    def flush(self) -> str:
        """The end of the sequence: U+FFFD for a character still unfinished, else nothing."""
        text = self._decode(b"", True)
        return self._without_start(text) if self._drop else text

    def _without_start(self, text: str) -> str:
        if not text:
            return text
        drop, self._drop = self._drop, ""
        return text.removeprefix(drop)


def _read_rule(decoder: Mapping[str, Any] | None) -> _Rule:
    """From the `decoder` of tokenizer.json. None joins tokens with spaces."""
    if decoder is None:
        return _Rule(joint=" ", strips_start=True)
    rule = _Rule()
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    for step in steps:
        rule = _with_step(rule, step)
    return rule


def _with_step(rule: _Rule, step: Mapping[str, Any]) -> _Rule:
    match step:
        case {"type": "ByteLevel"}:
            return replace(rule, byte_level=True)
        case {"type": "ByteFallback"}:
            return replace(rule, byte_fallback=True)
        case {"type": "Fuse"}:
            return rule
        case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
            return replace(rule, replacements=(*rule.replacements, (old, new)))
        case {"type": "Strip", "content": " ", "start": 0 | 1 as start, "stop": 0}:
            return replace(rule, strips_start=start == 1)
        case {"type": "Metaspace", "replacement": str(old)}:
            strips = step.get("prepend_scheme", "always") != "never"
            return replace(rule, replacements=(*rule.replacements, (old, " ")), strips_start=strips)
    raise UnsupportedModel(f"tokenizer.json: the decoder {json.dumps(step)} is not supported")


def _byte_alphabet() -> dict[str, int]:
    """The printable characters by which byte-level BPE writes the 256 bytes (GPT-2's `bytes_to_unicode`): the
    printable ones of Latin-1 stand for themselves, the others are numbered from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
