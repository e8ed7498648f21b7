"""`trainer estimate`."""

import json as json_module
from typing import Annotated

import typer

from trainer.commands.display import GIB, note
from trainer.commands.fit import Config, Debug, Devices, Json
from trainer.commands.options import Given, merge, with_settings
from trainer.commands.process import prepare_process


@with_settings
def estimate(
    given: Given,
    config: Config = None,
    length: Annotated[int | None, typer.Option(min=2, help="Tokens of a row [--max-length].")] = None,
    devices: Devices = 1,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what memory a step would take at its peak, on each device, by part, before anything is loaded; no data is
    needed."""
    settings = merge(given, config)
    prepare_process()
    from dataclasses import asdict

    from trainer.devices import choose_device, choose_dtype
    from trainer.memory import available_memory
    from trainer.memory import estimate as count
    from trainer.prepare import check_split, find_base, read_config
    from trainer.sharding import needs_sharding

    check_split(settings, devices)
    base = find_base(settings.base, note)
    values = read_config(base.path)
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, str(values.get("dtype") or values.get("torch_dtype") or "float32"), device)
    rows, tokens = settings.micro_batch or settings.batch_size // devices, length or settings.max_length
    available = available_memory(device)
    sharded = needs_sharding(base.path, settings, devices, available)
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
            num_shards=devices if sharded else 1,
        )
        for checkpointing in (False, True)
    }
    if json:
        parts = {("on" if on else "off"): asdict(e) | {"total": e.total} for on, e in found.items()}
        print(json_module.dumps({"rows": rows, "length": tokens, "available": available, "checkpointing": parts}))
        return
    where = str(device) if devices == 1 else f"each of {devices} × {device}{', sharded' if sharded else ''}"
    print(f"{rows} rows of {tokens} tokens at once, {settings.method}, {where}: GiB without / with checkpointing")
    off, on = asdict(found[False]), asdict(found[True])
    for name in [name for name in off if sharded or name != "gathered"]:
        print(f"  {name:<12} {off[name] / GIB:8.2f} {on[name] / GIB:8.2f}")
    print(f"  {'total':<12} {found[False].total / GIB:8.2f} {found[True].total / GIB:8.2f}")
    print(f"  {'available':<12} {available / GIB:8.2f}")
