"""Log lines: JSON that parses whatever is in it, and lines for people that stay one line."""

import fcntl
import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.logs import BackgroundHandler, Event, HumanFormatter, JsonFormatter, PassedOn
from tests.support.server_process import REPOSITORY


class Happened(Event):
    """An event with the fields that it is given."""

    name = "happened"

    def __init__(self, **fields: object) -> None:
        self._fields = fields

    def fields(self) -> Mapping[str, object]:
        return self._fields


def written(message: object, *args: object, formatter: logging.Formatter, error: Exception | None = None) -> str:
    """What a logger of its own writes for one message at level warning, as bytes in ASCII would have it."""
    raw = io.BytesIO()
    handler = logging.StreamHandler(io.TextIOWrapper(raw, encoding="ascii", errors="backslashreplace"))
    handler.setFormatter(formatter)
    logger = logging.Logger("a.logger")
    logger.addHandler(handler)
    logger.warning(message, *args, exc_info=error)
    return raw.getvalue().decode()


def test_an_event_is_its_fields() -> None:
    before = datetime.now(UTC)
    (line,) = written(Happened(count=3, seconds=0.5, name="pirate"), formatter=JsonFormatter()).splitlines()
    entry = json.loads(line)
    assert before <= datetime.fromisoformat(entry.pop("time")) <= datetime.now(UTC)
    assert entry == {
        "level": "warning",
        "logger": "a.logger",
        "event": "happened",
        "count": 3,
        "seconds": 0.5,
        "name": "pirate",
    }


def test_a_message_keeps_its_arguments_and_its_exception() -> None:
    try:
        raise KeyError("gone")
    except KeyError as error:
        (line,) = written("lost %s", "it", formatter=JsonFormatter(), error=error).splitlines()
    entry = json.loads(line)
    assert entry["message"] == "lost it"
    assert entry["exception"].startswith("Traceback")
    assert entry["exception"].endswith("KeyError: 'gone'")


@given(st.text(st.characters(exclude_categories=()), max_size=30))
def test_any_text_is_one_line_of_json_and_one_for_people(text: str) -> None:
    for message in (text, Happened(text=text)):
        lines = written("%s", message, formatter=JsonFormatter()) if isinstance(message, str) else None
        lines = lines or written(message, formatter=JsonFormatter())
        assert lines.count("\n") == 1
        entry = json.loads(lines)
        assert entry.get("text", entry.get("message")) == text
    human = written(Happened(text=text), formatter=logging.Formatter())
    assert human.count("\n") == 1
    assert "\r" not in human
    assert "\x1b" not in human


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("plain-1.5@x", "plain-1.5@x"),
        ("", '""'),
        ("two words", '"two words"'),
        ("a=b", '"a=b"'),
        ('a"b', '"a\\"b"'),
        ("new\nline", '"new\\nline"'),
        (7, "7"),
        (0.25, "0.25"),
        ([1, 2], "[1, 2]"),
    ],
)
def test_for_people_fields_are_quoted_where_they_need_it(value: object, shown: str) -> None:
    assert str(Happened(a=1, b=value)) == f"happened a=1 b={shown}"


def test_lines_of_another_process_stay_and_what_is_none_of_its_log_becomes_json() -> None:
    own = written("hello", formatter=JsonFormatter()).rstrip("\n")
    for text in ("CUDA error: {oops}", own):
        assert written(PassedOn(text), formatter=HumanFormatter()) == f"{text}\n"
    assert written(PassedOn(own), formatter=JsonFormatter()) == f"{own}\n"
    (line,) = written(PassedOn("CUDA error: {oops}"), formatter=JsonFormatter()).splitlines()
    entry = json.loads(line)
    assert datetime.fromisoformat(entry.pop("time"))
    assert entry == {"level": "warning", "logger": "a.logger", "message": "CUDA error: {oops}"}


@pytest.fixture
def stalled(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[logging.Logger, BackgroundHandler, int]]:
    """A logger whose handler may keep 4,096 bytes, and what to read them from: a pipe that is full already, of one
    line."""
    reader, writer = os.pipe()
    monkeypatch.setattr("server.logs.FLUSH_SECONDS", 60)
    size = fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    os.write(writer, b"x" * (size - 1) + b"\n")
    handler = BackgroundHandler(writer, max_waiting=4096)
    logger = logging.Logger("a.logger")
    logger.addHandler(handler)
    yield logger, handler, reader
    os.close(reader)  # ends the write that is under way
    handler.flush()
    os.close(writer)


def lines_until(reader: int, is_last: Callable[[str], bool]) -> list[str]:
    """Read up to a line; what the pipe was filled with is left out."""
    text = ""
    while not (text.endswith("\n") and is_last(text.splitlines()[-1])):
        text += os.read(reader, 65536).decode()
    return [line for line in text.splitlines() if not line.startswith("xxx")]


def test_who_logs_does_not_wait_for_who_reads(stalled: tuple[logging.Logger, BackgroundHandler, int]) -> None:
    logger, handler, reader = stalled
    for i in range(500):
        logger.warning("%0100d", i)
    kept = 4096 // 101
    assert handler.num_dropped == 500 - kept, "what nobody reads is neither waited for nor kept"
    (*lines, said) = lines_until(reader, lambda line: "dropped" in line)
    assert [int(line) for line in lines] == list(range(kept)), "the first are there, in their order"
    assert said == f"{500 - kept} log lines were dropped: stderr was not read in time"
    logger.warning("again")
    assert lines_until(reader, lambda line: True) == ["again"]


def test_what_was_dropped_is_told_before_what_comes_next(
    stalled: tuple[logging.Logger, BackgroundHandler, int],
) -> None:
    """The line that does not fit is dropped, and smaller ones go on."""
    logger, handler, reader = stalled
    logger.warning("x" * 5000)
    logger.warning("next")
    assert lines_until(reader, lambda line: line == "next") == [
        "1 log lines were dropped: stderr was not read in time",
        "next",
    ]
    assert handler.num_dropped == 1


def test_a_log_that_nobody_can_read_any_more_is_no_error(
    stalled: tuple[logging.Logger, BackgroundHandler, int], capsys: pytest.CaptureFixture[str]
) -> None:
    logger, handler, reader = stalled
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, reader)  # closes the pipe's end
    os.close(nothing)
    for _ in range(100):
        logger.warning("%0100d", 1)
    handler.flush()
    logger.warning("still")
    handler.flush()
    assert capsys.readouterr().err == ""


def test_a_message_that_makes_no_text_is_reported_and_not_raised(
    stalled: tuple[logging.Logger, BackgroundHandler, int], capsys: pytest.CaptureFixture[str]
) -> None:
    logger, _, reader = stalled
    logger.warning("%d", "no number")
    assert "--- Logging error ---" in capsys.readouterr().err
    logger.warning("next")
    assert lines_until(reader, lambda line: line == "next") == ["next"]


def test_the_end_of_a_process_writes_what_waits_and_waits_for_no_one() -> None:
    """The last lines come out; where nobody reads, it ends all the same."""
    program = "import logging; from server import logs; logs.set_up('human', 'info', logs.BackgroundHandler(2))\n"
    program += "for i in range(300): logging.getLogger('it').info('%0100d', i)"
    patient = f"{program}\nlogs.FLUSH_SECONDS = 60"  # the process itself may stand still for a second
    done = subprocess.run([sys.executable, "-c", patient], capture_output=True, check=True, cwd=REPOSITORY)
    assert [int(line.split()[-1]) for line in done.stderr.splitlines()] == list(range(300))
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    subprocess.run([sys.executable, "-c", program], stderr=writer, check=True, cwd=REPOSITORY, timeout=60)
    os.close(writer)
    os.close(reader)
