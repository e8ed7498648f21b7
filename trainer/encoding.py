"""Dialogues to token ids and the mask of what to learn: the assistant's words and the token that ends its turn.

Chat templates rarely mark the assistant's part, so it is found by rendering twice: the dialogue before the
turn, with the generation prompt, and the dialogue with the turn. What the second adds to the first is the turn.
The ids before it are exactly those the server would send, so training sees what serving will.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from trainer.data import Dialogue, Message, first_of
from trainer.errors import DataError


class ChatTokenizer(Protocol):
    """What is used of a transformers tokenizer with a chat template."""

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> Any: ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids, and for each whether it is learned (predicted from those before it). `len(mask) == len(ids)`."""

    ids: tuple[int, ...]
    mask: tuple[bool, ...]


class Encoder:
    """Encodes dialogues with a tokenizer. `end_ids` are the tokens that end a turn when the model generates."""

    def __init__(self, tokenizer: ChatTokenizer, end_ids: Iterable[int], max_length: int) -> None:
        self._tokenizer = tokenizer
        self._end_ids = frozenset(end_ids)
        self._max_length = max_length

    def encode_all(self, dialogues: Sequence[Dialogue], path: Path) -> list[Example]:
        """The examples of every dialogue of `path`. Raises DataError naming the lines that do not fit."""
        examples: list[Example] = []
        faults: list[str] = []
        for dialogue in dialogues:
            try:
                examples += self.encode(dialogue.messages)
            except ValueError as error:
                faults.append(f"{path}:{dialogue.line}: {error}")
        if faults:
            raise DataError(first_of(faults))
        return examples

    def encode(self, messages: Sequence[Message]) -> list[Example]:
        """One example for the whole dialogue; one for each assistant turn where the template rewrites earlier turns.

        Raises ValueError if it is longer than `max_length` tokens or the template cannot render it.
        """
        turns = [self._turn(messages, end) for end, message in enumerate(messages) if message.role == "assistant"]
        merged: list[Example] = []
        for turn in turns:
            if merged and (joined := _continue(merged[-1], turn)):
                merged[-1] = joined
            else:
                merged.append(turn)
        for example in merged:
            if len(example.ids) > self._max_length:
                raise ValueError(f"is {len(example.ids)} tokens long; max-length is {self._max_length}")
        return merged

    def _turn(self, messages: Sequence[Message], index: int) -> Example:
        """The dialogue up to and with the assistant's message `index`, that message learned."""
        before = self._render(messages[:index], prompt=True)
        after = self._render(messages[: index + 1], prompt=False)
        if not after.startswith(before):
            raise ValueError(
                f"messages[{index}]: the chat template does not put the answer after its generation prompt"
            )
        prompt = self._tokenizer.encode(before, add_special_tokens=False)
        answer = self._tokenizer.encode(after[len(before) :], add_special_tokens=False)
        ends = [position for position, token in enumerate(answer) if token in self._end_ids]
        learned = ends[-1] + 1 if ends else len(answer)  # what a template writes after the end is never generated
        mask = [False] * len(prompt) + [True] * learned + [False] * (len(answer) - learned)
        return Example(tuple(prompt + answer), tuple(mask))

    def _render(self, messages: Sequence[Message], *, prompt: bool) -> str:
        from jinja2 import TemplateError

        rows = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(rows, tokenize=False, add_generation_prompt=prompt)
        except TemplateError as error:
            raise ValueError(f"the base's chat template refuses it ({error})") from error
        assert isinstance(text, str), "apply_chat_template(tokenize=False) renders text"
        return text


def _continue(earlier: Example, later: Example) -> Example | None:
    """Both as one example, if `later` begins with exactly what `earlier` is; else None."""
    length = len(earlier.ids)
    if later.ids[:length] != earlier.ids:
        return None
    return Example(later.ids, earlier.mask + later.mask[length:])
