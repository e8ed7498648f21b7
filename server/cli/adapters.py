"""`lorikeet adapters`: see, publish and move adapters, in a store or on a server."""

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.cli.exits import ExitCode, Failure
from server.cli.options import DEFAULT_SERVER, Base, Debug, Json, Server, Store, Timeout, help_if_alone
from server.cli.output import human_size, print_fields, print_json, print_note, print_table, short_digest

if TYPE_CHECKING:
    from adapters.store import AdapterStore, Version
    from lorikeet.v1.adapter_pb2 import Adapter

AdapterId = Annotated[str, typer.Argument(metavar="ADAPTER", help="name, name@label or name@sha256:…")]
StoreInstead = Annotated[
    Path | None,
    typer.Option("--store", metavar="DIR", help="Look into this store; without it a server is asked."),
]
_PAGE_SIZE = 1000
_COLUMNS = ("name", "digest", "labels", "rank", "method", "size", "created", "in")


def build_app() -> typer.Typer:
    """The `adapters` commands."""
    app = typer.Typer(help="List, show, import, load and unload adapters.", rich_markup_mode=None)
    app.callback(invoke_without_command=True)(help_if_alone)
    app.command("list")(list_adapters)
    app.command("show")(show)
    app.command("import")(import_adapter)
    app.command("load")(load)
    app.command("unload")(unload)
    return app


def list_adapters(
    store: StoreInstead = None,
    server: Server = DEFAULT_SERVER,
    json: Json = False,
    timeout: Timeout = 60.0,
    debug: Debug = False,
) -> None:
    """List the published adapters: of each, the version its label latest points to."""
    entries = _in_store(store) if store is not None else _on_server(server, timeout)
    if json:
        print_json({"adapters": entries})
    elif entries:
        print_table(_COLUMNS, map(_row, entries))
    else:
        print_note("no adapters yet; publish one with `lorikeet adapters import` or `trainer fit`")


def show(
    adapter: AdapterId,
    store: StoreInstead = None,
    server: Server = DEFAULT_SERVER,
    json: Json = False,
    timeout: Timeout = 60.0,
    debug: Debug = False,
) -> None:
    """Show one version of an adapter."""
    if store is not None:
        fields = version_fields(_open(store).resolve(adapter))
    else:
        from lorikeet.v1 import adapter_pb2, adapter_pb2_grpc
        from server.cli.client import connect

        with connect(server) as channel:
            stub = adapter_pb2_grpc.AdapterServiceStub(channel)
            fields = adapter_fields(
                stub.GetAdapter(adapter_pb2.GetAdapterRequest(adapter_id=adapter), timeout=timeout).adapter
            )
    print_json(fields) if json else print_fields(fields)


def import_adapter(
    path: Annotated[
        Path, typer.Argument(help="A directory with adapter_config.json and adapter_model.safetensors, as PEFT saves.")
    ],
    name: Annotated[str, typer.Option(help="The name to publish it under.")],
    label: Annotated[str, typer.Option(help="The label to point to this version.")] = "latest",
    base: Base = None,
    store: Store = None,
    allow_zero: Annotated[
        bool, typer.Option("--allow-zero", help="Take one without effect too, as PEFT makes before training.")
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Check a PEFT adapter against its base and publish it to a store; a running server serves it at once."""
    from adapters.store import AdapterStore, default_store_root
    from server.base.resolve import resolve_base

    model = resolve_base(base, print_note)
    version = AdapterStore(store or default_store_root()).publish(
        path,
        name,
        base_digest=model.digest,
        base_name=model.name,
        linears=model.spec.linears(),
        label=label,
        allow_zero=allow_zero,
    )
    if json:
        print_json(version_fields(version))
    else:
        print(f"published {version.name}@{label} ({version.digest})")


def load(
    adapter: AdapterId,
    server: Server = DEFAULT_SERVER,
    json: Json = False,
    timeout: Timeout = 60.0,
    debug: Debug = False,
) -> None:
    """Load an adapter into a server's memory ahead of its first request."""
    from lorikeet.v1 import adapter_pb2, adapter_pb2_grpc
    from server.cli.client import connect

    with connect(server) as channel:
        stub = adapter_pb2_grpc.AdapterServiceStub(channel)
        fields = adapter_fields(
            stub.LoadAdapter(adapter_pb2.LoadAdapterRequest(adapter_id=adapter), timeout=timeout).adapter
        )
    print_json(fields) if json else print(f"loaded {fields['name']} ({fields['digest']})")


def unload(
    adapter: AdapterId,
    server: Server = DEFAULT_SERVER,
    json: Json = False,
    timeout: Timeout = 60.0,
    debug: Debug = False,
) -> None:
    """Drop an adapter from a server's memory; it stays in the store."""
    from lorikeet.v1 import adapter_pb2, adapter_pb2_grpc
    from server.cli.client import connect

    with connect(server) as channel:
        stub = adapter_pb2_grpc.AdapterServiceStub(channel)
        fields = adapter_fields(
            stub.UnloadAdapter(adapter_pb2.UnloadAdapterRequest(adapter_id=adapter), timeout=timeout).adapter
        )
    print_json(fields) if json else print(f"unloaded {fields['name']} ({fields['digest']})")


def _open(root: Path) -> "AdapterStore":
    """A store to read. Raises Failure where there is none: a mistyped --store is not an empty one."""
    from adapters.store import AdapterStore

    if not root.is_dir():
        raise Failure(f"--store {root}: no such directory", ExitCode.USAGE)
    return AdapterStore(root)


def _in_store(root: Path) -> list[dict[str, Any]]:
    store = _open(root)
    return [version_fields(store.resolve(name)) for name in store.names()]


def _on_server(server: str, timeout: float) -> list[dict[str, Any]]:
    from lorikeet.v1 import adapter_pb2, adapter_pb2_grpc
    from server.cli.client import connect

    entries: list[dict[str, Any]] = []
    with connect(server) as channel:
        stub = adapter_pb2_grpc.AdapterServiceStub(channel)
        token = ""
        while True:
            request = adapter_pb2.ListAdaptersRequest(page_size=_PAGE_SIZE, page_token=token)
            page = stub.ListAdapters(request, timeout=timeout)
            entries += map(adapter_fields, page.adapters)
            if not (token := page.next_page_token):
                return entries


def adapter_fields(adapter: "Adapter") -> dict[str, Any]:
    """A server's adapter as JSON."""
    from lorikeet.v1.adapter_pb2 import Adapter

    created = adapter.create_time.ToDatetime(UTC).isoformat() if adapter.HasField("create_time") else None
    residency = Adapter.Residency.Name(adapter.residency).removeprefix("RESIDENCY_").lower()
    return {
        "name": adapter.name,
        "digest": adapter.digest,
        "labels": list(adapter.labels),
        "base_digest": adapter.base_digest,
        "rank": adapter.rank,
        "alpha": adapter.alpha,
        "target_modules": list(adapter.target_modules),
        "dtype": adapter.dtype,
        "size_bytes": adapter.size_bytes,
        "num_parameters": adapter.num_parameters,
        "method": adapter.method or None,
        "create_time": created,
        "residency": residency,
    }


def version_fields(version: "Version") -> dict[str, Any]:
    """A store's version as JSON, with the keys of `adapter_fields`; where it resides only a server knows."""
    manifest = version.manifest
    return {
        "name": version.name,
        "digest": version.digest,
        "labels": list(version.labels),
        "base_digest": manifest.base_digest,
        "rank": manifest.rank,
        "alpha": manifest.alpha,
        "target_modules": list(manifest.target_modules),
        "dtype": manifest.dtype,
        "size_bytes": manifest.size_bytes,
        "num_parameters": manifest.num_parameters,
        "method": manifest.training.method if manifest.training else None,
        "create_time": datetime.fromisoformat(manifest.created_at).isoformat(),
        "residency": None,
    }


def _row(fields: dict[str, Any]) -> tuple[str, ...]:
    created = datetime.fromisoformat(fields["create_time"]).astimezone() if fields["create_time"] else None
    return (
        fields["name"],
        short_digest(fields["digest"]),
        ", ".join(fields["labels"]),
        str(fields["rank"]),
        fields["method"] or "",
        human_size(fields["size_bytes"]),
        f"{created:%Y-%m-%d %H:%M}" if created else "",
        fields["residency"] or "store",
    )
