"""The base model's tokenizer, read from its directory without transformers (which would bring torch).

Encodes as transformers' AutoTokenizer does. The way back, from tokens to text, is `detokenizer`.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.processors import TemplateProcessing

from server.errors import BaseModelError, InvalidRequest
from server.frontend.chat_template import ChatTemplate
from server.frontend.text_bound import longest_token
from server.frontend.types import ChatMessage

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """Text or conversation → token ids. Safe to call from any thread; encoding releases the GIL."""

    def __init__(self, backend: tokenizers.Tokenizer, chat_template: ChatTemplate | None) -> None:
        self.backend = backend
        self._chat_template = chat_template
        self._longest_token = longest_token(backend)

    @classmethod
    def load(cls, directory: Path) -> "Tokenizer":
        """Read tokenizer.json, tokenizer_config.json, special_tokens_map.json and the chat template.

        Raises BaseModelError naming the file that is missing or broken.
        """
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise BaseModelError(f"{directory} has no tokenizer.json; save the model's fast tokenizer there")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises nothing narrower
            raise BaseModelError(f"{path} cannot be read: {error}") from error
        config = _read_json(directory / "tokenizer_config.json")
        special = _special_tokens(_read_json(directory / "special_tokens_map.json") | config)
        _prepare(backend, config, special)
        source = _template_source(directory, config)
        return cls(backend, None if source is None else ChatTemplate(source, special))

    def encode_text(self, text: str, max_tokens: int | None = None) -> list[int]:
        """With the special tokens that the model expects around a text, such as a leading <s>. Raises InvalidRequest
        for one that certainly has more than `max_tokens`, without encoding it; others may still have more."""
        return self._encode(text, "text", max_tokens, add_special_tokens=True)

    def encode_chat(self, messages: Sequence[ChatMessage], max_tokens: int | None = None) -> list[int]:
        """The conversation, opened for the assistant's answer. Raises InvalidRequest if the model has no chat
        template, if the template refuses the messages, and as `encode_text` does."""
        if self._chat_template is None:
            raise InvalidRequest("messages", "the base model has no chat template; send the prompt as text")
        return self._encode(self._chat_template.render(messages), "messages", max_tokens, add_special_tokens=False)

    def _encode(self, text: str, field: str, max_tokens: int | None, *, add_special_tokens: bool) -> list[int]:
        longest = self._longest_token
        if max_tokens is not None and longest is not None and len(text) > max_tokens * longest:
            raise InvalidRequest(field, f"has {len(text)} characters, more than {max_tokens} tokens can stand for")
        try:
            # Of the ways to encode, those for a batch release the GIL.
            (encoding,) = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except TypeError as error:  # all that tokenizers says of a string it cannot encode
            raise InvalidRequest(field, "is not valid Unicode: it has an unpaired surrogate") from error
        ids: list[int] = encoding.ids
        return ids


def _prepare(backend: tokenizers.Tokenizer, config: Mapping[str, Any], special: Mapping[str, str]) -> None:
    """Bring a tokenizer.json into the state in which transformers would use it."""
    backend.no_truncation()
    backend.no_padding()
    if "add_bos_token" in config or "add_eos_token" in config:
        bos = special.get("bos_token") if config.get("add_bos_token") else None
        eos = special.get("eos_token") if config.get("add_eos_token") else None
        around = [(token, backend.token_to_id(token)) for token in (bos, eos) if token is not None]
        single = " ".join(part for part in (bos and f"{bos}:0", "$A:0", eos and f"{eos}:0") if part)
        backend.post_processor = TemplateProcessing(single=single, pair=f"{single} $B:1", special_tokens=around)
    known = [token for token in special.values() if backend.token_to_id(token) is not None]
    backend.add_special_tokens(known)  # marks them as special: they are matched whole and add no text


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Name → text of the named special tokens; an entry is a string, or a dict with its text under "content"."""
    entries = {name: config.get(name) for name in _NAMED_TOKENS}
    texts = {name: entry.get("content") if isinstance(entry, dict) else entry for name, entry in entries.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str) and text}


def _template_source(directory: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, else the config's `chat_template`: a string, or a list of named ones."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise BaseModelError(f"{path} is not UTF-8: {error}") from error
    source = config.get("chat_template")
    if isinstance(source, list):
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    return source if isinstance(source, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    """{} when there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BaseModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise BaseModelError(f"{path} must hold a JSON object")
    return content
