"""Training rows, from JSON lines or a Hugging Face dataset on disk. No torch here.

A row has one of three forms: `messages` (a dialogue), `prompt` and `completion` (both strings, or both lists of
messages), or `text`. A fault names file and line; no row is ever dropped or cut in silence.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from trainer.errors import DataError, SettingsError

ROLES = ("system", "user", "assistant")
FORMS = "messages, or prompt and completion, or text"
FIELDS = ("messages", "prompt", "completion", "text")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `role` is one of ROLES."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Chat messages, at least one the assistant's. Those from `start` on may be learned. `place` says where it is."""

    messages: tuple[Message, ...]
    place: str
    start: int = 0


@dataclass(frozen=True, slots=True)
class Completion:
    """A plain prompt (may be empty) and what is to follow it."""

    prompt: str
    completion: str
    place: str


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text, all of it learned."""

    text: str
    place: str


Row = Dialogue | Completion | Text


class Source(Protocol):
    """Where rows come from, always in the same order."""

    def rows(self, start: int = 0) -> Iterator[Row]:
        """From row `start` (counted from 0) on. Raises DataError at the first that cannot be read."""
        ...


class JsonLines:
    """A file with a JSON object on each line; blank lines do not count."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def rows(self, start: int = 0) -> Iterator[Row]:
        """See `Source.rows`."""
        for place, text in islice(self._lines(), start, None):
            try:
                yield parse_row(_json(text), place)
            except ValueError as error:
                raise DataError(f"{place}: {error}") from error

    def _lines(self) -> Iterator[tuple[str, str]]:
        path = self._path
        try:
            with path.open("rb") as file:
                for number, raw in enumerate(file, start=1):
                    try:
                        text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                    except UnicodeDecodeError as error:
                        raise DataError(
                            f"{path}:{number}: is not UTF-8 (byte {error.start + 1} of the line)"
                        ) from error
                    if text.strip():
                        yield f"{path}:{number}", text
        except FileNotFoundError as error:
            raise DataError(f"{path}: no such file") from error
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from error


class SavedDataset:
    """A Hugging Face dataset on disk: what `save_to_disk` wrote, or a directory of data files. Needs `datasets`.

    Columns that are not of a row's form are not used.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def rows(self, start: int = 0) -> Iterator[Row]:
        """See `Source.rows`."""
        dataset = self._open()
        for index, values in enumerate(dataset.skip(start) if start else dataset, start):
            place = f"{self._path}[{index}]"
            try:
                yield parse_row({name: values[name] for name in FIELDS if values.get(name) is not None}, place)
            except ValueError as error:
                raise DataError(f"{place}: {error}") from error

    def _open(self) -> Any:
        try:
            import datasets
        except ImportError as error:
            raise DataError(f"{self._path}: a directory needs `pip install 'lorikeet[datasets]'`") from error
        datasets.disable_progress_bars()
        try:
            if (self._path / "dataset_dict.json").is_file() or (self._path / "state.json").is_file():
                loaded: Any = datasets.load_from_disk(str(self._path))
            else:
                loaded = datasets.load_dataset(str(self._path))
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{self._path}: is no dataset that `datasets` can load ({reason})") from error
        if isinstance(loaded, dict):
            if "train" not in loaded:
                raise DataError(f"{self._path}: has no split train; its splits are {', '.join(loaded)}")
            loaded = loaded["train"]
        return loaded


def open_source(path: Path) -> Source:
    """The rows at `path`: a directory is a dataset, anything else JSON lines."""
    return SavedDataset(path) if path.is_dir() else JsonLines(path)


def require_data(data: str) -> Path:
    """The path that a setting `data` names. Raises SettingsError or DataError if there is none."""
    if not data:
        raise SettingsError("data is missing: pass --data FILE")
    if not Path(data).exists():
        raise DataError(f"{data}: no such file")
    return Path(data)


def check_rows(path: Path) -> None:
    """Read `path` once. Raises DataError for the first fault, or if there is no row."""
    if not any(True for _ in open_source(path).rows()):
        raise DataError(f"{path}: is empty; it needs rows with {FORMS}")


def parse_row(values: Any, place: str) -> Row:
    """One row from its JSON object. Raises ValueError with what is wrong with it."""
    if not isinstance(values, dict):
        raise ValueError(f"must be an object with {FORMS}")
    if unknown := sorted(set(values) - set(FIELDS)):
        raise ValueError(f"unknown field {unknown[0]!r}; a row has {FORMS}")
    match sorted(values):
        case ["messages"]:
            return Dialogue(_dialogue(values["messages"], "messages"), place)
        case ["completion", "prompt"]:
            return _completion(values["prompt"], values["completion"], place)
        case ["text"]:
            return Text(_string(values, "text"), place)
        case _:
            raise ValueError(f"needs {FORMS}, and has {', '.join(sorted(values)) or 'none'}")


def _completion(prompt: Any, completion: Any, place: str) -> Row:
    if isinstance(prompt, list) and isinstance(completion, list):
        start = len(prompt)
        return Dialogue(_dialogue([*prompt, *completion], "prompt + completion", start), place, start)
    if not isinstance(prompt, str) or not isinstance(completion, str) or not completion:
        raise ValueError("prompt and completion must be strings (completion not empty) or both lists of messages")
    return Completion(_text(prompt, "prompt"), _text(completion, "completion"), place)


def _string(values: Mapping[str, Any], name: str) -> str:
    value = values[name]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} must be a string that is not empty")
    return _text(value, name)


def _text(value: str, name: str) -> str:
    """JSON can escape what is no character: half of a pair, as is left where a text was cut in an emoji."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} has half of a surrogate pair (character {error.start + 1})") from error
    return value


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON ({error.msg} at column {error.colno})") from error
    except RecursionError as error:
        raise ValueError("is not JSON (nested too deep)") from error


def _dialogue(value: Any, name: str, start: int = 0) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{name} must be a list")
    messages = tuple(_message(message, f"{name}[{index}]", index) for index, message in enumerate(value))
    if not any(message.role == "assistant" for message in messages[start:]):
        raise ValueError("has no assistant message, so there is nothing to learn from it")
    if messages[0].role == "assistant":
        raise ValueError(f"{name}[0]: the assistant cannot speak first")
    return messages


def _message(value: Any, where: str, index: int) -> Message:
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
    return Message(role, _text(content, f"{where}: content"))
