"""What commands print: JSON for programs, tables and fields for people."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# Model output and adapter metadata are other people's text: on a terminal, no escape sequence of theirs may act.
_CONTROLS = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def print_json(value: Mapping[str, Any]) -> None:
    """One JSON object on one line."""
    print(json.dumps(value, ensure_ascii=False), flush=True)


def print_text(text: str, end: str = "\n") -> None:
    """Text of a model, at once; control characters are replaced where a terminal would obey them."""
    print(text.translate(_CONTROLS) if sys.stdout.isatty() else text, end=end, flush=True)


def print_note(text: str) -> None:
    """A line for people beside the output: progress, what comes next, an error. Without control characters."""
    print(text.translate(_CONTROLS), file=sys.stderr, flush=True)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Aligned columns under their names; never cut or wrapped when piped."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for row in rows:
        table.add_row(*(Text(cell.translate(_CONTROLS)) for cell in row))
    console = Console()
    console.print(table) if console.is_terminal else Console(width=10_000).print(table)


def print_fields(fields: Mapping[str, Any]) -> None:
    """`name: value` lines; lists are joined by commas, nested mappings get dotted names, empty values are left out."""
    flat = dict(_flatten(fields))
    width = max((len(name) for name in flat), default=0)
    for name, value in flat.items():
        print_text(f"{name:<{width}}  {value}")


def _flatten(fields: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple):
            if value:
                yield prefix + name, ", ".join(map(str, value))
        elif value not in ("", None):
            yield prefix + name, str(value)


def human_size(num_bytes: int) -> str:
    """Bytes with three digits at most: "512 B", "37.2 MiB"."""
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def short_digest(digest: str) -> str:
    """The first twelve hex digits of `sha256:…`: enough to tell versions apart by eye."""
    return digest.removeprefix("sha256:")[:12]
