"""What an adapter, or the bare base, scores on rows: loss, and how many answers are exactly the expected text."""

import tempfile
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from adapters.errors import BaseMismatch
from adapters.ids import check_name
from adapters.stores import Store
from adapters.validation import CONFIG_FILE
from server.base.resolve import BaseModel
from trainer.encoding import Counts, Example
from trainer.errors import DataError, SettingsError
from trainer.prepare import encode_rows, load_tokenizer, make_encoder, read_config, read_end_ids
from trainer.served import Loss, ServedAdapter, ServedBase, Tokens
from trainer.settings import Settings
from trainer.tasks import TASKS, write_rows

BASE = "base"  # in place of an adapter: the base without any
ADAPTER_DIRECTORY = "adapter"  # of a run
MARGIN = 8  # tokens that an answer may be longer than the longest expected one


class Decoder(Protocol):
    """What is used of a tokenizer."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str: ...


@dataclass(frozen=True, slots=True)
class Question:
    """The ids before an answer, and the text that the answer should be."""

    prompt: list[int]
    expected: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What was expected and what was said."""

    expected: str
    given: str

    @property
    def is_exact(self) -> bool:
        """But for white space around it."""
        return self.given.strip() == self.expected.strip()


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Each row's loss, and its answer where answers were asked for."""

    losses: tuple[Loss, ...]
    answers: tuple[Answer, ...]
    seconds: float

    @property
    def loss(self) -> Loss:
        """Of all rows together."""
        return Loss.sum(self.losses)

    @property
    def num_rows(self) -> int:
        return len(self.losses)

    @property
    def exact_match(self) -> float | None:
        """Share of the answers."""
        if not self.answers:
            return None
        return sum(answer.is_exact for answer in self.answers) / len(self.answers)


def evaluate(
    served: ServedBase,
    adapter: ServedAdapter | None,
    rows: Sequence[Tokens],
    decoder: Decoder | None,
    end_ids: Collection[int] = (),
) -> Evaluation:
    """Score `rows`; with a decoder, answer them too, greedily."""
    started = time.perf_counter()
    losses = tuple(served.losses(rows, adapter))
    answers: tuple[Answer, ...] = ()
    if decoder is not None:
        questions = [question(row, decoder, end_ids) for row in rows]
        longest = max(_num_learned(row) for row in rows)
        given = served.generate([q.prompt for q in questions], longest + MARGIN, end_ids, adapter)
        texts = [decoder.decode(ids, skip_special_tokens=True) for ids in given]
        answers = tuple(Answer(q.expected, text) for q, text in zip(questions, texts, strict=True))
    return Evaluation(losses, answers, time.perf_counter() - started)


def question(row: Tokens, decoder: Decoder, end_ids: Collection[int]) -> Question:
    """A row's last answer as a question. Raises DataError for a row that is learned from its start: plain text asks
    nothing."""
    ids = [int(token) for token in row.ids]
    stop = max(place for place, learned in enumerate(row.mask) if learned) + 1
    start = stop
    while start > 0 and row.mask[start - 1]:
        start -= 1
    if start <= 1:
        raise DataError("rows of plain text have no answer to compare with; score their loss alone (--no-answers)")
    answer = [token for token in ids[start:stop] if token not in end_ids]
    return Question(ids[:start], decoder.decode(answer, skip_special_tokens=True))


def _num_learned(row: Tokens) -> int:
    return sum(bool(learned) for learned in row.mask)


def find_adapter(named: str, base: BaseModel, store: Store) -> Path | None:
    """The PEFT directory that `named` means: itself, a run's, or a version of the store; None for the bare base.

    Raises SettingsError for a directory without an adapter, AdapterNotFound, and BaseMismatch as the server would.
    """
    if named == BASE:
        return None
    path = Path(named)
    for directory in (path / ADAPTER_DIRECTORY, path):
        if (directory / CONFIG_FILE).is_file():
            return directory
    if path.is_dir():
        raise SettingsError(f"{named}: holds neither {CONFIG_FILE} nor a run's {ADAPTER_DIRECTORY}/{CONFIG_FILE}")
    check_name(named.partition("@")[0])
    version = store.resolve(named)
    if version.manifest.base_digest != base.digest:
        raise BaseMismatch(
            f"{named} was published for {version.manifest.base_name} ({version.manifest.base_digest}), not for "
            f"{base.name} ({base.digest}); pass its --base"
        )
    return store.fetch(version.digest)


@dataclass(frozen=True, slots=True)
class Questions:
    """Rows to score, and what turns their answers into text."""

    rows: Sequence[Example]
    decoder: Decoder
    end_ids: frozenset[int]


def read_questions(data: Path | None, task: str | None, num_rows: int, base: BaseModel) -> Questions:
    """The first rows of a file, or test rows of a task. Raises SettingsError unless exactly one is given."""
    if (data is None) == (task is None):
        raise SettingsError("pass either --data or --task")
    if data is not None:
        return encode_questions(data, num_rows, base)
    assert task is not None, "one of the two is given"
    if task not in TASKS:
        raise SettingsError(f"task {task!r} is unknown; known are {', '.join(TASKS)}")
    with tempfile.TemporaryDirectory(prefix="lorikeet-task-") as directory:
        path = Path(directory) / f"{task}.jsonl"
        write_rows(path, TASKS[task].test(num_rows, 0))
        return encode_questions(path, num_rows, base)


def encode_questions(path: Path, num_rows: int, base: BaseModel) -> Questions:
    """The first rows of a file, as the trainer encodes them. Raises DataError."""
    tokenizer = load_tokenizer(base.path)
    config = read_config(base.path)
    encoder = make_encoder(Settings(max_length=base.spec.max_position), tokenizer, base.path, config)
    rows = encode_rows(path, encoder, Counts(), num_rows)
    return Questions(rows, tokenizer, frozenset(read_end_ids(base.path, tokenizer.eos_token_id)))
