"""`lorikeet adapters`: the commands together, and those that look, in a store or on a server, or ask a server."""

import contextlib
from typing import Annotated, Any

import typer

from server.cli import adapters_check, adapters_merge, adapters_store, adapters_transfer
from server.cli.adapters_fields import COLUMNS, adapter_fields, row, version_details, version_fields
from server.cli.adapters_store import open_existing
from server.cli.options import DEFAULT_SERVER, AdapterId, Debug, Json, Server, Timeout, help_if_alone
from server.cli.output import print_fields, print_json, print_note, print_table

StoreInstead = Annotated[
    str | None,
    typer.Option("--store", metavar="DIR|S3_URL", help="Look into this store; without it a server is asked."),
]
_PAGE_SIZE = 1000


def build_app() -> typer.Typer:
    """The `adapters` commands."""
    app = typer.Typer(
        help="See and manage adapters: in a store (import to gc), and in a server's memory (load to unmerge).",
        rich_markup_mode=None,
    )
    app.callback(invoke_without_command=True)(help_if_alone)
    app.command("list")(list_adapters)
    app.command("show")(show)
    app.command("import")(adapters_transfer.import_adapter)
    app.command("export")(adapters_transfer.export)
    app.command("label")(adapters_store.label)
    app.command("rollback")(adapters_store.rollback)
    app.command("remove")(adapters_store.remove)
    app.command("check")(adapters_check.check)
    app.command("verify")(adapters_store.verify)
    app.command("gc")(adapters_store.gc)
    app.command("load")(load)
    app.command("unload")(unload)
    app.command("pin")(pin)
    app.command("unpin")(unpin)
    app.command("merge")(adapters_merge.merge)
    app.command("unmerge")(adapters_merge.unmerge)
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
        print_table(COLUMNS, map(row, entries))
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
        fields = version_details(open_existing(store).resolve(adapter))
    else:
        from lorikeet.v1 import adapter_pb2, adapter_pb2_grpc
        from server.cli.client import connect

        with connect(server) as channel:
            stub = adapter_pb2_grpc.AdapterServiceStub(channel)
            fields = adapter_fields(
                stub.GetAdapter(adapter_pb2.GetAdapterRequest(adapter_id=adapter), timeout=timeout).adapter
            )
    print_json(fields) if json else print_fields(fields)


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
    drain: Annotated[
        bool, typer.Option("--drain", help="If requests use it, wait for their end instead of being refused.")
    ] = False,
    server: Server = DEFAULT_SERVER,
    json: Json = False,
    timeout: Timeout = 60.0,
    debug: Debug = False,
) -> None:
    """Drop an adapter from a server's memory; it stays in the store."""
    from lorikeet.v1 import adapter_pb2, adapter_pb2_grpc
    from server.cli.client import connect

    mode = adapter_pb2.UNLOAD_MODE_DRAIN if drain else adapter_pb2.UNLOAD_MODE_REFUSE
    with connect(server) as channel:
        stub = adapter_pb2_grpc.AdapterServiceStub(channel)
        request = adapter_pb2.UnloadAdapterRequest(adapter_id=adapter, mode=mode)
        fields = adapter_fields(stub.UnloadAdapter(request, timeout=timeout).adapter)
    print_json(fields) if json else print(f"unloaded {fields['name']} ({fields['digest']})")


def pin(
    adapter: AdapterId,
    server: Server = DEFAULT_SERVER,
    json: Json = False,
    timeout: Timeout = 60.0,
    debug: Debug = False,
) -> None:
    """Load an adapter and keep it in a server's memory, whatever else needs room."""
    from lorikeet.v1 import adapter_pb2, adapter_pb2_grpc
    from server.cli.client import connect

    with connect(server) as channel:
        stub = adapter_pb2_grpc.AdapterServiceStub(channel)
        fields = adapter_fields(
            stub.PinAdapter(adapter_pb2.PinAdapterRequest(adapter_id=adapter), timeout=timeout).adapter
        )
    print_json(fields) if json else print(f"pinned {fields['name']} ({fields['digest']})")


def unpin(
    adapter: AdapterId,
    server: Server = DEFAULT_SERVER,
    json: Json = False,
    timeout: Timeout = 60.0,
    debug: Debug = False,
) -> None:
    """Let a server drop a pinned adapter again when others need the room."""
    from lorikeet.v1 import adapter_pb2, adapter_pb2_grpc
    from server.cli.client import connect

    with connect(server) as channel:
        stub = adapter_pb2_grpc.AdapterServiceStub(channel)
        fields = adapter_fields(
            stub.UnpinAdapter(adapter_pb2.UnpinAdapterRequest(adapter_id=adapter), timeout=timeout).adapter
        )
    print_json(fields) if json else print(f"unpinned {fields['name']} ({fields['digest']})")


def _in_store(location: str) -> list[dict[str, Any]]:
    from adapters.errors import AdapterNotFound

    store, entries = open_existing(location), list[dict[str, Any]]()
    for name in store.names():
        with contextlib.suppress(AdapterNotFound):  # removed since the names were read
            entries.append(version_fields(store.resolve(name)))
    return entries


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
