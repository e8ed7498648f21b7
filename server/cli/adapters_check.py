"""`lorikeet adapters check`: an adapter's loss on the 16-bit and on the NF4 base."""

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from server.cli.adapters_store import open_existing
from server.cli.options import AdapterId, Base, Debug, Json, Store

TRAINER = (sys.executable, "-m", "trainer.cli", "check")


def check(
    adapter: AdapterId,
    data: Annotated[
        Path,
        typer.Option(metavar="FILE", exists=True, help="Rows to score it on, as `trainer fit` takes them."),
    ],
    rows: Annotated[int, typer.Option(min=1, help="How many rows, at most.")] = 200,
    base: Base = None,
    store: Store = None,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda[:N]", help="Where to compute.")] = "auto",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Score an adapter on the 16-bit base and on the NF4 one, without a server: whether it may be served on the other
    than it was trained on."""
    version = open_existing(store).resolve(adapter)
    arguments = [f"{version.name}@{version.digest}", "--data", str(data), "--rows", str(rows), "--device", device]
    for option, value in (("--base", base), ("--store", store)):
        arguments += [option, value] if value is not None else []
    arguments += ["--json"] * json + ["--debug"] * debug
    # A process of its own: it loads torch, which no other command does.
    raise typer.Exit(subprocess.run([*TRAINER, *arguments], check=False).returncode)
