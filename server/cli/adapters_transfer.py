"""`lorikeet adapters import` and `export`: into a store from PEFT's format, and back."""

from pathlib import Path
from typing import Annotated

import typer

from server.cli.adapters_fields import version_fields
from server.cli.adapters_store import open_existing
from server.cli.options import AdapterId, Base, Debug, Json, Store
from server.cli.output import print_json, print_note


def import_adapter(
    source: Annotated[
        str,
        typer.Argument(
            metavar="DIR|HUB_ID",
            help="A directory with adapter_config.json and adapter_model.safetensors, as PEFT saves, or owner/name.",
        ),
    ],
    name: Annotated[str, typer.Option(help="The name to publish it under.")],
    label: Annotated[str, typer.Option(help="The label to point to this version.")] = "latest",
    expect: Annotated[
        str | None,
        typer.Option(metavar="DIGEST|absent", help="Refuse unless the label points to this version, or is not there."),
    ] = None,
    note: Annotated[str, typer.Option(help="A remark to keep in the manifest.")] = "",
    base: Base = None,
    store: Store = None,
    allow_zero: Annotated[
        bool, typer.Option("--allow-zero", help="Take one without effect too, as PEFT makes before training.")
    ] = False,
    allow_base_mismatch: Annotated[
        bool,
        typer.Option(
            "--allow-base-mismatch", help="Take one whose manifest says another base; the version's will record that."
        ),
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Check a PEFT adapter against its base and publish it to a store; a running server serves it at once."""
    from adapters.ids import check_label, check_name
    from adapters.stores import open_store
    from adapters.transfer import find_source
    from server.base.resolve import resolve_base

    check_name(name)
    check_label(label)
    target = open_store(store)
    directory = find_source(source, print_note)
    model = resolve_base(base, print_note)
    version = target.publish(
        directory,
        name,
        base_digest=model.digest,
        base_name=model.name,
        linears=model.spec.linears(),
        label=label,
        expected=expect,
        notes=note,
        allow_zero=allow_zero,
        allow_base_mismatch=allow_base_mismatch,
    )
    if json:
        print_json(version_fields(version))
    else:
        print(f"published {version.name}@{label} ({version.digest})")


def export(
    adapter: AdapterId,
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Where to write it: a new directory, or an empty one.")
    ],
    store: Store = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write an adapter as a plain PEFT directory, which PeftModel.from_pretrained loads."""
    from adapters.transfer import export_version

    source = open_existing(store)
    version = source.resolve(adapter)
    export_version(source, version, directory)
    if json:
        print_json(version_fields(version) | {"path": str(directory)})
    else:
        print(f"wrote {version.name} ({version.digest}) to {directory}")
