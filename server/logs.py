"""Log lines on stderr, for people or as JSON: one object a line. Both processes write theirs by it."""

import json
import logging
import re
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import ClassVar

JSON = "json"

# What needs no quotes in `key=value`.
_BARE = re.compile(r"[!#-<>-~]+", re.ASCII)

# Beside those that JSON escapes anyway, characters that a terminal may obey.
_CONTROLS = dict.fromkeys(range(127, 160), "�")

_JSON_START = '{"time": '


class Event:
    """What happened, in parts: a message for `logger.info(event)` that is made into text only if it is written."""

    __slots__ = ()

    name: ClassVar[str]

    def fields(self) -> Mapping[str, object]:
        """What is known of it, of types that JSON knows."""
        raise NotImplementedError

    def __str__(self) -> str:
        return " ".join((self.name, *(f"{key}={_plain(value)}" for key, value in self.fields().items())))


class JsonFormatter(logging.Formatter):
    """`time` (RFC 3339, UTC), `level`, `logger`; then `event` and its fields, or `message`; `exception`."""

    def format(self, record: logging.LogRecord) -> str:
        entry = _entry(record.created, record.levelname, record.name)
        if isinstance(record.msg, Event):
            entry |= {"event": record.msg.name, **record.msg.fields()}
        else:
            entry["message"] = record.getMessage()
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def set_up(log_format: str, level: str) -> None:
    """Log to stderr from now on: "human" or "json", what is at least of `level` ("info", …). A process does it once."""
    handler = logging.StreamHandler(sys.stderr)
    if log_format == JSON:
        handler.setFormatter(JsonFormatter())
        logging.captureWarnings(True)
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler])


def as_json_line(text: str, logger: str, time: float) -> str:
    """A line that a library wrote past the logging, as the JSON formatter would have it; one of its own as it is.
    `time` is in seconds since 1970."""
    if text.startswith(_JSON_START):
        return text
    return json.dumps(_entry(time, "WARNING", logger) | {"message": text.rstrip("\r\n")}) + "\n"


def _entry(time: float, level: str, logger: str) -> dict[str, object]:
    when = datetime.fromtimestamp(time, UTC).isoformat(timespec="microseconds")
    return {"time": when, "level": level.lower(), "logger": logger}


def _plain(value: object) -> str:
    if isinstance(value, str) and _BARE.fullmatch(value) is not None:
        return value
    return json.dumps(value, ensure_ascii=False, default=str).translate(_CONTROLS)
