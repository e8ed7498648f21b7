"""Answers side by side while they stream: a live table on a terminal, plain lines elsewhere."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

_CONTROLS = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if chr(code) != "\n"}


class Board:
    """The answers so far: a row a prompt, a column a variant (the base or an adapter). Draws itself when asked."""

    def __init__(self, prompts: Sequence[str], variants: Sequence[str]) -> None:
        self.prompts = prompts
        self.variants = variants
        self._texts = {(prompt, variant): "" for prompt in prompts for variant in variants}

    def append(self, prompt: str, variant: str, text: str) -> None:
        """More of an answer."""
        self._texts[prompt, variant] += text.translate(_CONTROLS)

    def text(self, prompt: str, variant: str) -> str:
        """An answer so far."""
        return self._texts[prompt, variant]

    def __rich__(self) -> RenderableType:
        table = Table(expand=True, show_lines=True)
        table.add_column("prompt", ratio=2, style="dim")
        for variant in self.variants:
            table.add_column(variant, ratio=4)
        for prompt in self.prompts:
            table.add_row(Text(prompt), *(Text(self.text(prompt, variant)) for variant in self.variants))
        return table


@contextmanager
def shown(board: Board, console: Console) -> Iterator[None]:
    """Show `board` while the block runs: redrawn as it grows on a terminal, else printed whole at the end."""
    if console.is_terminal:
        with Live(board, console=console, refresh_per_second=8, vertical_overflow="crop"):
            yield
        return
    yield
    width = max(map(len, board.variants))
    for prompt in board.prompts:
        print(f"\n{prompt}")
        for variant in board.variants:
            print(f"  {variant:<{width}}  {' '.join(board.text(prompt, variant).split())}")
