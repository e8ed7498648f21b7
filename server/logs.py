"""Log lines on stderr, for people or as JSON: one object a line. Both processes write theirs by it."""

import json
import logging
import os
import re
import select
import sys
import threading
from collections import deque
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import ClassVar

JSON = "json"

# What needs no quotes in `key=value`.
_BARE = re.compile(r"[!#-<>-~]+", re.ASCII)

# Beside those that JSON escapes anyway, characters that a terminal may obey.
_CONTROLS = dict.fromkeys(range(127, 160), "�")

_JSON_START = '{"time": '

# Of lines that wait for whoever reads them, in bytes; and how long the end of a process waits for that, in seconds.
MAX_WAITING = 8 * 1024 * 1024
FLUSH_SECONDS = 1.0


class Event:
    """What happened, in parts: a message for `logger.info(event)` that is made into text only if it is written."""

    __slots__ = ()

    name: ClassVar[str]

    def fields(self) -> Mapping[str, object]:
        """What is known of it, of types that JSON knows."""
        raise NotImplementedError

    def __str__(self) -> str:
        return " ".join((self.name, *(f"{key}={_plain(value)}" for key, value in self.fields().items())))


class PassedOn:
    """A line that another process has written: its own log lines stay as they are."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text

    def __str__(self) -> str:
        return self.text


class HumanFormatter(logging.Formatter):
    """Time, level, logger and message."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        return str(record.msg) if isinstance(record.msg, PassedOn) else super().format(record)


class JsonFormatter(logging.Formatter):
    """`time` (RFC 3339, UTC), `level`, `logger`; then `event` and its fields, or `message`; `exception`. What another
    process has written past its logging is a `message`, too."""

    def format(self, record: logging.LogRecord) -> str:
        if isinstance(record.msg, PassedOn) and record.msg.text.startswith(_JSON_START):
            return record.msg.text
        entry = _entry(record.created, record.levelname, record.name)
        if isinstance(record.msg, Event):
            entry |= {"event": record.msg.name, **record.msg.fields()}
        else:
            entry["message"] = record.getMessage()
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


class BackgroundHandler(logging.Handler):
    """Writes to a file descriptor from a thread of its own: who logs never waits for who reads.

    Lines past `max_waiting` bytes that wait are dropped and counted; a line says how many once there is room again.
    """

    def __init__(self, descriptor: int, max_waiting: int = MAX_WAITING) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._max_waiting = max_waiting
        self._changed = threading.Condition()
        self._lines: deque[bytes] = deque()  # the first is being written
        self._size = 0
        self._num_told = 0
        self.num_dropped = 0
        threading.Thread(target=self._write_all, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self._line(record)
        except Exception:  # noqa: BLE001 (what the logging promises to who logs)
            self.handleError(record)
            return
        with self._changed:
            if self._size <= self._max_waiting // 2:
                self._tell()
            if self._size + len(line) > self._max_waiting:
                self.num_dropped += 1
            else:
                self._add(line)

    def flush(self) -> None:
        """Returns when all is written, after FLUSH_SECONDS at most."""
        with self._changed:
            self._changed.wait_for(lambda: not self._lines, FLUSH_SECONDS)

    def _line(self, record: logging.LogRecord) -> bytes:
        return (self.format(record) + "\n").encode(errors="backslashreplace")

    def _add(self, line: bytes) -> None:
        self._lines.append(line)
        self._size += len(line)
        self._changed.notify_all()

    def _tell(self) -> None:
        """Say what has been dropped since that was last said."""
        count = self.num_dropped - self._num_told
        if count:
            self._num_told = self.num_dropped
            text = f"{count} log lines were dropped: stderr was not read in time"
            self._add(self._line(logging.LogRecord(__name__, logging.WARNING, __file__, 0, text, None, None)))

    def _write_all(self) -> None:
        while True:
            with self._changed:
                if not self._lines:
                    self._tell()
                self._changed.wait_for(lambda: self._lines)
                line = self._lines[0]
            _write(self._descriptor, line)
            with self._changed:
                self._lines.popleft()
                self._size -= len(line)
                self._changed.notify_all()


def set_up(log_format: str, level: str, handler: logging.Handler | None = None) -> None:
    """Log from now on: "human" or "json", what is at least of `level` ("info", …), by `handler` [on stderr]. A process
    does it once."""
    handler = handler or logging.StreamHandler(sys.stderr)
    if log_format == JSON:
        handler.setFormatter(JsonFormatter())
        logging.captureWarnings(True)
    else:
        handler.setFormatter(HumanFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler])


def pass_on(text: str, logger: logging.Logger) -> None:
    """Log a line of another process, whatever its level, which that one has looked at."""
    line = PassedOn(text.rstrip("\r\n"))
    logger.handle(logging.LogRecord(logger.name, logging.WARNING, __file__, 0, line, None, None))


def _write(descriptor: int, line: bytes) -> None:
    """All of it, however long that takes; nothing where nobody can read it any more."""
    rest = memoryview(line)
    while rest:
        try:
            rest = rest[os.write(descriptor, rest) :]
        except BlockingIOError:  # someone else has made the descriptor so
            select.select([], [descriptor], [])
        except OSError:
            return


def _entry(time: float, level: str, logger: str) -> dict[str, object]:
    when = datetime.fromtimestamp(time, UTC).isoformat(timespec="microseconds")
    return {"time": when, "level": level.lower(), "logger": logger}


def _plain(value: object) -> str:
    if isinstance(value, str) and _BARE.fullmatch(value) is not None:
        return value
    return json.dumps(value, ensure_ascii=False, default=str).translate(_CONTROLS)
