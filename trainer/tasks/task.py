"""What a task is."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

Row = dict[str, list[dict[str, str]]]  # {"messages": [{"role", "content"}, …]}, the last one the answer


class Task(Protocol):
    """Rows made by a program. Equal arguments give equal rows, anywhere; no test row is among the training rows."""

    @property
    def name(self) -> str: ...

    def train(self, num_rows: int, seed: int) -> list[Row]: ...

    def test(self, num_rows: int, seed: int) -> list[Row]: ...


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """As JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
