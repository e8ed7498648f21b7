"""`trainer check`, which is `lorikeet adapters check` too."""

import json as json_module
from pathlib import Path
from typing import Annotated

import typer

from trainer.commands.display import note
from trainer.commands.process import prepare_process


def check(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="A run, a PEFT directory or a name in the store.")],
    data: Annotated[Path, typer.Option(metavar="FILE|DIR", help="Rows to score it on.")],
    rows: Annotated[int, typer.Option(min=1, help="How many rows, at most.")] = 200,
    base: Annotated[
        str | None, typer.Option(metavar="DIR|HUB_ID", help="The base model. Without it: SmolLM2-135M-Instruct.")
    ] = None,
    store: Annotated[
        str | None, typer.Option(metavar="DIR|S3_URL", help="The adapter store. Without it: the user's own.")
    ] = None,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda[:N]", help="Where to compute.")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print the outcome as one JSON object.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="On an error, show the traceback.")] = False,
) -> None:
    """Score an adapter on the 16-bit base and on the NF4 one: whether it may be served on the other than it was
    trained on."""
    from adapters.sources import read_origin
    from adapters.stores import open_store
    from server.base.resolve import resolve_base
    from trainer.errors import SettingsError

    prepare_process()
    from trainer.check import check as score
    from trainer.devices import choose_device
    from trainer.evaluate import find_adapter, read_questions

    model = resolve_base(base, note)
    directory = find_adapter(adapter, model, open_store(store))
    if directory is None:
        raise SettingsError("the base alone is no adapter; name one")
    origin = read_origin(directory)
    trained = origin.training.held_base if origin is not None and origin.training is not None else None
    found = score(directory, read_questions(data, None, rows, model).rows, model, choose_device(device), note)
    if json:
        losses = {name: {"base": each.base, "adapter": each.adapter} for name, each in found.items()}
        print(json_module.dumps({"adapter": adapter, "trained_quantization": trained, "loss": losses}), flush=True)
        return
    print(f"{adapter}: trained on quantization {trained or '(not known)'}")
    for name, each in found.items():
        print(f"  served on {name:<5} loss {each.adapter:.4f} (the base alone {each.base:.4f})", flush=True)
