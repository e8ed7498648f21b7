"""`lorikeet adapters merge` and `unmerge`: the base of a running server with an adapter in its weights."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.cli.adapters_fields import adapter_fields
from server.cli.options import DEFAULT_SERVER, AdapterId, Debug, Json, Server, Timeout
from server.cli.output import human_size, print_json, print_note

if TYPE_CHECKING:
    from lorikeet.v1.adapter_pb2 import MergeReport, Progress

DrainSeconds = Annotated[
    float,
    typer.Option(min=0.001, metavar="SECONDS", help="Give up if running requests have not ended after so long."),
]


def merge(
    adapter: AdapterId,
    force: Annotated[bool, typer.Option("--force", help="Merge it however far that is from unmerged serving.")] = False,
    probe: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="A text to compare merged serving on [some English prose]."),
    ] = None,
    drain_seconds: DrainSeconds = 60.0,
    server: Server = DEFAULT_SERVER,
    json: Json = False,
    timeout: Timeout = 600.0,
    debug: Debug = False,
) -> None:
    """Add an adapter to the base's weights: its requests then cost what the base's do, others are refused or
    compensated (`serve --merged-others`). Requests that run end first, those that come wait."""
    from lorikeet.v1 import adapter_pb2, adapter_pb2_grpc
    from server.cli.client import connect

    text = probe.read_text(encoding="utf-8", errors="replace") if probe is not None else ""
    request = adapter_pb2.StreamMergeAdapterRequest(
        adapter_id=adapter, drain_seconds=drain_seconds, force=force, probe_text=text
    )
    with connect(server) as channel:
        stages = _Stages(is_silent=json)
        for message in adapter_pb2_grpc.AdapterServiceStub(channel).StreamMergeAdapter(request, timeout=timeout):
            stages.tell(message.progress)
    fields = adapter_fields(message.adapter)
    if not message.HasField("report"):
        print_json(fields | {"report": None}) if json else print(f"{fields['name']} is merged already")
    elif json:
        print_json(fields | {"report": report_fields(message.report)})
    else:
        print(f"merged {fields['name']} ({fields['digest']})")
        report = message.report
        worst = max(report.layers, key=lambda layer: layer.delta_error)
        print(f"next-token KL to unmerged serving: {report.kl:.3g} nats, at most {report.largest_kl:.3g}")
        print(
            f"rounding took {worst.delta_error:.1%} of the adapter in layer {worst.index}, the worst; "
            f"{human_size(report.held_bytes)} of the base's own weights are kept in host memory"
        )


def unmerge(
    adapter: AdapterId,
    drain_seconds: DrainSeconds = 60.0,
    server: Server = DEFAULT_SERVER,
    json: Json = False,
    timeout: Timeout = 600.0,
    debug: Debug = False,
) -> None:
    """Give the base its own weights back, bit for bit. Requests that run end first, those that come wait."""
    from lorikeet.v1 import adapter_pb2, adapter_pb2_grpc
    from server.cli.client import connect

    request = adapter_pb2.StreamUnmergeAdapterRequest(adapter_id=adapter, drain_seconds=drain_seconds)
    with connect(server) as channel:
        stages = _Stages(is_silent=json)
        for message in adapter_pb2_grpc.AdapterServiceStub(channel).StreamUnmergeAdapter(request, timeout=timeout):
            stages.tell(message.progress)
    fields = adapter_fields(message.adapter)
    print_json(fields) if json else print(f"unmerged {fields['name']} ({fields['digest']})")


def report_fields(report: "MergeReport") -> dict[str, Any]:
    """A merge's report as JSON."""
    return {
        "kl": report.kl,
        "largest_kl": report.largest_kl,
        "held_bytes": report.held_bytes,
        "layers": [
            {"index": layer.index, "weight_error": layer.weight_error, "delta_error": layer.delta_error}
            for layer in report.layers
        ],
    }


class _Stages:
    """Says each stage once, on stderr."""

    def __init__(self, *, is_silent: bool) -> None:
        self._is_silent = is_silent
        self._last = 0

    def tell(self, progress: "Progress") -> None:
        from lorikeet.v1.adapter_pb2 import Progress

        if progress.stage != self._last and not self._is_silent:
            self._last = progress.stage
            if progress.stage:
                print_note(f"{Progress.Stage.Name(progress.stage).removeprefix('STAGE_').lower()} …")
