"""`trainer estimate`."""

import json as json_module
from typing import Annotated

import typer

from trainer.commands.display import GIB, note
from trainer.commands.fit import Config, Debug, Json
from trainer.commands.options import Given, merge, with_settings
from trainer.commands.process import prepare_process


@with_settings
def estimate(
    given: Given,
    config: Config = None,
    length: Annotated[int | None, typer.Option(min=2, help="Tokens of a row [--max-length].")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what memory a step would take at its peak, by part, before anything is loaded; no data is needed."""
    settings = merge(given, config)
    prepare_process()
    from dataclasses import asdict

    from trainer.devices import choose_device, choose_dtype
    from trainer.memory import available_memory
    from trainer.memory import estimate as count
    from trainer.prepare import find_base, read_config

    base = find_base(settings.base, note)
    values = read_config(base.path)
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, str(values.get("dtype") or values.get("torch_dtype") or "float32"), device)
    rows, tokens = settings.micro_batch or settings.batch_size, length or settings.max_length
    found = {
        checkpointing: count(
            base.path,
            settings,
            rows=rows,
            length=tokens,
            learned=rows * (tokens - 1),
            dtype=dtype,
            device=device,
            checkpointing=checkpointing,
        )
        for checkpointing in (False, True)
    }
    available = available_memory(device)
    if json:
        parts = {("on" if on else "off"): asdict(e) | {"total": e.total} for on, e in found.items()}
        print(json_module.dumps({"rows": rows, "length": tokens, "available": available, "checkpointing": parts}))
        return
    print(f"{rows} rows of {tokens} tokens at once, {settings.method}, {device}: GiB without / with checkpointing")
    off, on = asdict(found[False]), asdict(found[True])
    for name in off:
        print(f"  {name:<12} {off[name] / GIB:8.2f} {on[name] / GIB:8.2f}")
    print(f"  {'total':<12} {found[False].total / GIB:8.2f} {found[True].total / GIB:8.2f}")
    print(f"  {'available':<12} {available / GIB:8.2f}")
