"""Rows to token ids and the mask of what to learn: the assistant's words and the token that ends its turn.

Few chat templates mark the assistant's part (`{% generation %}`); where one does, its marks count. Elsewhere the part
is found by rendering twice: the dialogue before the turn, with the generation prompt, and the dialogue with the turn.
What the second adds to the first is the turn. The ids before it are exactly those the server would send, so training
sees what serving will.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from trainer.data import Completion, Dialogue, Message, Row, Text
from trainer.errors import DataError

MARKS = re.compile(r"\{%-?\s*generation\b")


class ChatTokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    chat_template: str | None

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> Any: ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """Token ids, and for each whether it is learned (predicted from those before it; so never the first)."""

    ids: NDArray[np.int32]
    mask: NDArray[np.bool_]

    @classmethod
    def of(cls, ids: Sequence[int], mask: Sequence[bool]) -> "Example":
        """From plain sequences of equal length."""
        assert len(ids) == len(mask), f"{len(ids)} ids, {len(mask)} mask entries"
        learned = np.array(mask, dtype=np.bool_)
        learned[:1] = False
        return cls(np.array(ids, dtype=np.int32), learned)

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(slots=True)
class Counts:
    """What became of the rows: nothing is left out without being counted here."""

    rows: int = 0
    examples: int = 0
    tokens: int = 0
    learned: int = 0
    truncated: int = 0
    dropped: int = 0

    def __str__(self) -> str:
        said = f"{self.rows} rows, {self.examples} examples, {self.tokens} tokens, {self.learned} of them learned"
        said += f"; {self.truncated} rows truncated" if self.truncated else ""
        return said + (f"; {self.dropped} rows dropped" if self.dropped else "")


class Encoder:
    """Encodes rows with a tokenizer. `end_ids` are the tokens that end a turn when the model generates, `end_id` the
    one put after plain text (None: none). `too_long` says what happens to an example over `max_length` tokens."""

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        end_ids: Iterable[int],
        max_length: int,
        *,
        end_id: int | None = None,
        completion_only: bool = True,
        too_long: Literal["error", "truncate", "drop"] = "error",
    ) -> None:
        self._tokenizer = tokenizer
        self._end_ids = frozenset(end_ids)
        self._end_id = end_id
        self._max_length = max_length
        self._completion_only = completion_only
        self._too_long = too_long
        self._has_marks = bool(MARKS.search(tokenizer.chat_template or ""))

    def encode_all(self, rows: Iterable[Row], counts: Counts) -> Iterator[Example]:
        """The examples of every row, counted. Raises DataError naming the first that does not fit."""
        for row in rows:
            try:
                fitting = self._fit(self.encode(row), counts)
            except ValueError as error:
                raise DataError(f"{row.place}: {error}") from error
            counts.rows += 1
            for example in fitting:
                counts.examples += 1
                counts.tokens += len(example)
                counts.learned += int(example.mask.sum())
                yield example

    def encode(self, row: Row) -> list[Example]:
        """One example for a row; for a dialogue whose template rewrites earlier turns, one for each assistant turn.

        Raises ValueError if the template cannot render it or nothing of it would be learned. Lengths are not checked.
        """
        match row:
            case Dialogue():
                examples = self._dialogue(row)
            case Completion():
                prompt = self._tokenizer.encode(row.prompt, add_special_tokens=True)
                answer = self._closed(self._after(row.prompt, prompt, row.completion, add_special_tokens=True))
                examples = [
                    Example.of(prompt + answer, [not self._completion_only] * len(prompt) + [True] * len(answer))
                ]
            case Text():
                ids = self._closed(self._tokenizer.encode(row.text, add_special_tokens=True))
                examples = [Example.of(ids, [True] * len(ids))]
        for example in examples:
            if not example.mask.any():
                raise ValueError("has no token to learn")
        return examples

    def _fit(self, examples: list[Example], counts: Counts) -> list[Example]:
        longest = max(map(len, examples))
        if longest <= self._max_length:
            return examples
        if self._too_long == "error":
            raise ValueError(
                f"is {longest} tokens long; max-length is {self._max_length} (see --too-long, to truncate or drop)"
            )
        if self._too_long == "drop":
            counts.dropped += 1
            return []
        counts.truncated += 1
        cut = [Example(example.ids[: self._max_length], example.mask[: self._max_length]) for example in examples]
        if not all(example.mask.any() for example in cut):
            raise ValueError(f"has no token to learn within max-length {self._max_length}")
        return cut

    def _closed(self, ids: list[int]) -> list[int]:
        """`ids` with the end token, unless they have it."""
        return ids if self._end_id is None or (ids and ids[-1] == self._end_id) else [*ids, self._end_id]

    def _after(self, before: str, prompt: list[int], text: str, *, add_special_tokens: bool) -> list[int]:
        """The ids of `text` behind `prompt`, those of `before`: as in both as one, unless that changes the prompt's;
        then as behind a line's end. By itself a text may get more: SentencePiece's tokenizers begin it with a blank."""
        line_end = self._tokenizer.encode("\n", add_special_tokens=False)
        for first, start, special in ((before, prompt, add_special_tokens), ("\n", line_end, False)):
            ids = self._tokenizer.encode(first + text, add_special_tokens=special)
            if ids[: len(start)] == start:
                return ids[len(start) :]
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _dialogue(self, row: Dialogue) -> list[Example]:
        if not self._completion_only:
            ids = self._tokenizer.encode(self._render(row.messages, prompt=False), add_special_tokens=False)
            return [Example.of(ids, [True] * len(ids))]
        if self._has_marks and row.start == 0:
            return [self._marked(row.messages)]
        turns = [
            self._turn(row.messages, index)
            for index, message in enumerate(row.messages)
            if message.role == "assistant" and index >= row.start
        ]
        merged: list[Example] = []
        for turn in turns:
            if merged and (joined := _continue(merged[-1], turn)):
                merged[-1] = joined
            else:
                merged.append(turn)
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
        answer = self._after(before, prompt, after[len(before) :], add_special_tokens=False)
        ends = [position for position, token in enumerate(answer) if token in self._end_ids]
        learned = ends[-1] + 1 if ends else len(answer)  # what a template writes after the end is never generated
        return Example.of(prompt + answer, [False] * len(prompt) + [True] * learned + [False] * (len(answer) - learned))

    def _marked(self, messages: Sequence[Message]) -> Example:
        """The dialogue by the template's own marks."""
        encoded = self._apply(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return Example.of(encoded["input_ids"], [bool(mark) for mark in encoded["assistant_masks"]])

    def _render(self, messages: Sequence[Message], *, prompt: bool) -> str:
        text = self._apply(messages, tokenize=False, add_generation_prompt=prompt)
        assert isinstance(text, str), "apply_chat_template(tokenize=False) renders text"
        return text

    def _apply(self, messages: Sequence[Message], **options: Any) -> Any:
        from jinja2 import TemplateError

        if not self._tokenizer.chat_template:
            raise ValueError("the base has no chat template, so messages cannot be rendered for it")
        rows = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self._tokenizer.apply_chat_template(rows, **options)
        except TemplateError as error:
            raise ValueError(f"the base's chat template refuses it ({error})") from error


def _continue(earlier: Example, later: Example) -> Example | None:
    """Both as one example, if `later` begins with exactly what `earlier` is; else None."""
    length = len(earlier)
    if not np.array_equal(later.ids[:length], earlier.ids):
        return None
    return Example(later.ids, np.concatenate((earlier.mask, later.mask[length:])))
