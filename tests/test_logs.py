"""Log lines: JSON that parses whatever is in it, and lines for people that stay one line."""

import io
import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.logs import Event, JsonFormatter, as_json_line


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


def test_lines_of_libraries_become_json_and_our_own_stay() -> None:
    own = written("hello", formatter=JsonFormatter())
    assert as_json_line(own, "engine", 0.0) == own
    line = as_json_line("CUDA error: {oops}\r\n", "engine", 1.5)
    assert line.endswith("}\n")
    assert json.loads(line) == {
        "time": "1970-01-01T00:00:01.500000+00:00",
        "level": "warning",
        "logger": "engine",
        "message": "CUDA error: {oops}",
    }
