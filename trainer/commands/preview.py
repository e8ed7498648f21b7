"""`trainer preview`."""

from typing import Annotated

import typer

from trainer.commands.display import note
from trainer.commands.fit import Config, Debug, Json
from trainer.commands.options import Given, merge, with_settings
from trainer.commands.process import prepare_process


@with_settings
def preview(
    given: Given,
    config: Config = None,
    rows: Annotated[int, typer.Option(min=1, help="How many rows.")] = 3,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what is learned: rows as the model sees them, the learned tokens in colour (without colours: in «»)."""
    import json as json_module
    from itertools import groupby

    from rich.console import Console
    from rich.text import Text

    from trainer.data import require_data

    settings = merge(given, config)
    require_data(settings.data)
    prepare_process()
    from trainer.preview import preview as show

    console = Console(highlight=False)
    for shown in show(settings, rows, note):
        if json:
            print(json_module.dumps({"place": shown.place, "tokens": shown.pieces}, ensure_ascii=False))
            continue
        console.rule(f"{shown.place}: {shown.num_learned} of {len(shown.pieces)} tokens learned", style="dim")
        text = Text()
        for index, (learned, run) in enumerate(groupby(shown.pieces, key=lambda piece: piece[1])):
            if not console.is_terminal:
                text.append("»" if index and not learned else "«" if learned else "")
            for number, (piece, _) in enumerate(run):
                text.append(piece, style=("green", "bold bright_green")[number % 2] if learned else "dim")
        if not console.is_terminal and shown.pieces[-1][1]:
            text.append("»")
        console.print(text, soft_wrap=True)
