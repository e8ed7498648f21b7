"""Training rows: JSON lines, each `{"messages": [{"role": …, "content": …}, …]}`. No torch here.

A fault names file and line; no row is ever dropped or cut in silence.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import DataError

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `role` is one of ROLES."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A row of the file; `line` counts from 1. At least one message is the assistant's."""

    messages: tuple[Message, ...]
    line: int


def load_dialogues(path: Path) -> list[Dialogue]:
    """Every row of `path`; blank lines are skipped. Raises DataError for the first fault, saying how many there are."""
    dialogues: list[Dialogue] = []
    faults: list[str] = []
    for number, text in _lines(path):
        try:
            dialogues.append(Dialogue(_messages(text), number))
        except ValueError as error:
            faults.append(f"{path}:{number}: {error}")
    if faults:
        raise DataError(first_of(faults))
    if not dialogues:
        raise DataError(f"{path}: is empty; it needs one JSON object with messages on each line")
    return dialogues


def first_of(faults: list[str]) -> str:
    """The first fault, and how many more there are."""
    return faults[0] if len(faults) == 1 else f"{faults[0]} (and {len(faults) - 1} more such lines)"


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                try:
                    text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(f"{path}:{number}: is not UTF-8 (byte {error.start + 1} of the line)") from error
                if text.strip():
                    yield number, text
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _messages(text: str) -> tuple[Message, ...]:
    """Parse one line. Raises ValueError with what is wrong with it."""
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(row, dict) or "messages" not in row:
        raise ValueError('needs a field "messages"')
    if unknown := sorted(set(row) - {"messages"}):
        raise ValueError(f"unknown field {unknown[0]!r}; a row has only messages")
    if not isinstance(row["messages"], list):
        raise ValueError("messages must be a list")
    messages = tuple(_message(message, index) for index, message in enumerate(row["messages"]))
    if not any(message.role == "assistant" for message in messages):
        raise ValueError("has no assistant message, so there is nothing to learn from it")
    if messages[0].role == "assistant":
        raise ValueError("messages[0]: the assistant cannot speak first")
    return messages


def _message(value: Any, index: int) -> Message:
    where = f"messages[{index}]"
    if not isinstance(value, dict):
        raise ValueError(f"{where}: must be an object with role and content")
    if wrong := sorted(set(value) ^ {"role", "content"}):
        missing = wrong[0] in ("role", "content")
        raise ValueError(f"{where}: {wrong[0]!r} is {'missing' if missing else 'not a field (role, content)'}")
    role, content = value["role"], value["content"]
    if role not in ROLES:
        raise ValueError(f"{where}: unknown role {role!r}; known are {', '.join(ROLES)}")
    if not isinstance(content, str) or not content.strip():
        raise ValueError(f"{where}: content must be a string that is not empty")
    if role == "system" and index > 0:
        raise ValueError(f"{where}: a system message can only come first")
    return Message(role, content)
