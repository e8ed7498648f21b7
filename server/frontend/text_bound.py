"""How much text one token can stand for, so that a prompt far too long is refused without encoding it."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import tokenizers

# Composed characters stand for at most four (ᾂ is α and three marks; a Hangul syllable three letters).
_NFC_FACTOR = 4


def longest_token(backend: tokenizers.Tokenizer) -> int | None:
    """The characters of a text that one token stands for at most; None where there is no bound, as where white space
    is dropped, text is changed before it is cut, or what is unknown is merged into one token."""
    normalizing = _growth(_steps(backend.normalizer, "normalizers"))
    swallows = any(token.lstrip or token.rstrip for token in backend.get_added_tokens_decoder().values())
    if normalizing is None or swallows or not _keeps_all(backend):
        return None
    # A token's own characters are text, or bytes that are at most one character each.
    return normalizing * max(map(len, backend.get_vocab()))


def _growth(normalizers: Iterator[Mapping[str, Any]]) -> int | None:
    """How many characters before normalizing can be one after it at most."""
    factor = 1
    for step in normalizers:
        match step:
            case {"type": "Prepend"}:
                pass
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if len(new) >= len(old):
                pass
            case {"type": "NFC"}:
                factor *= _NFC_FACTOR
            case _:
                return None
    return factor


def _keeps_all(backend: tokenizers.Tokenizer) -> bool:
    """Whether each character is part of a token, and no unknown ones share one."""
    if not isinstance(backend.model, tokenizers.models.BPE):
        return False
    is_byte_level = False
    for step in _steps(backend.pre_tokenizer, "pretokenizers"):
        match step:
            case {"type": "ByteLevel"}:
                is_byte_level = True
            case {"type": "Digits" | "Metaspace"}:
                pass
            case {"type": "Split", "behavior": str(behavior)} if behavior != "Removed":
                pass
            case _:
                return False
    return is_byte_level or backend.model.byte_fallback


def _steps(component: Any, nested: str) -> Iterator[Mapping[str, Any]]:
    """The parts of a normalizer or pre-tokenizer, as tokenizer.json writes them."""
    if component is not None:
        state = json.loads(component.__getstate__())
        yield from state[nested] if state["type"] == "Sequence" else [state]
