"""`trainer fit` and `trainer resume`."""

import json as json_module
import tempfile
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trainer.commands.display import note, watching
from trainer.commands.options import Given, merge, with_settings
from trainer.commands.process import prepare_process
from trainer.launch import is_launched, launch, own_rank

if TYPE_CHECKING:
    from adapters.versions import Version
    from trainer.fit import Report, Watcher
    from trainer.groups import Group
    from trainer.settings import Settings

Config = Annotated[Path | None, typer.Option(metavar="FILE.yaml", help="Settings by these names; flags go before it.")]
Json = Annotated[bool, typer.Option("--json", help="Print the outcome as one JSON object.")]
Debug = Annotated[bool, typer.Option("--debug", help="On an error, show the traceback.")]
Devices = Annotated[
    int, typer.Option(min=1, help="Train on so many devices, a process for each; a step stays as large.")
]


@with_settings
def fit(
    given: Given,
    config: Config = None,
    run: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The run's directory, new. Without it: in ./runs.")
    ] = None,
    devices: Devices = 1,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Train an adapter; with --name, publish it to the store."""
    from trainer.data import check_rows

    settings = merge(given, config)
    if own_rank() == 0:  # so that a fault is said once
        _check_publishing(settings)
        for path in filter(None, (settings.data, settings.eval_data)):
            if not settings.streaming:
                check_rows(Path(path))  # again when training starts: cheap, and before anything is fetched or loaded
    directory = run or Path("runs") / f"{settings.name or settings.method}-{datetime.now():%Y%m%d-%H%M%S}"
    if devices > 1 and not is_launched():
        with tempfile.TemporaryDirectory(prefix="lorikeet-config-") as scratch:
            file = Path(scratch) / "config.yaml"
            file.write_text(settings.to_yaml(), encoding="utf-8")
            _launch(["fit", "--config", str(file), "--run", str(directory)], devices, as_json=json, debug=debug)
        return
    prepare_process()
    from trainer import fit as training  # brings torch

    _run(lambda watcher, group: training.fit(settings, directory, watcher, group=group), settings, as_json=json)


def resume(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's directory.")],
    devices: Devices = 1,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Go on with a run that was stopped, to the bits that it would have had."""
    from trainer.run_directory import RunDirectory

    settings = RunDirectory.open(run).settings()
    _check_publishing(settings)
    if devices > 1 and not is_launched():
        _launch(["resume", str(run)], devices, as_json=json, debug=debug)
        return
    prepare_process()
    from trainer import fit as training

    _run(lambda watcher, group: training.resume(run, watcher, group), settings, as_json=json)


def _launch(arguments: list[str], devices: int, *, as_json: bool, debug: bool) -> None:
    arguments += ["--json"] * as_json + ["--debug"] * debug
    if code := launch(arguments, devices):
        raise typer.Exit(code)


def _check_publishing(settings: "Settings") -> None:
    """Raises LorikeetError kinds if the result could not be published as asked."""
    from adapters.ids import check_label, check_name
    from adapters.stores import open_store
    from trainer.errors import SettingsError
    from trainer.trackers import find_trackers

    if settings.name is not None:
        if settings.method == "full":
            raise SettingsError("method full makes a model, not an adapter: it cannot be published; leave name out")
        check_name(settings.name)
        check_label(settings.label)
        open_store(settings.store)
    find_trackers(settings.trackers)


def _run(train: "Callable[[Watcher, Group], Report]", settings: "Settings", *, as_json: bool) -> None:
    from trainer.groups import joined
    from trainer.loop import Interrupted
    from trainer.report import write_report

    is_first = own_rank() == 0
    with watching(quietly=not is_first) as watcher, joined(settings.device) as group:
        try:
            report = train(watcher, group)
        except Interrupted as error:
            if is_first:
                note(f"stopped; `trainer resume {error.args[0]}` goes on")
            raise KeyboardInterrupt from error
    if not is_first:
        return
    write_report(report.run)
    _print(report, _publish(report) if report.settings.name else None, as_json=as_json)


def _publish(report: "Report") -> "Version":
    """Into the store, by the run's own settings."""
    from adapters.stores import open_store
    from trainer.publish import Publication, publish_run

    settings = report.settings
    assert settings.name is not None, "publishing needs a name"
    return publish_run(report.run, open_store(settings.store), Publication(settings.name, settings.label), note)


def _print(report: "Report", version: "Version | None", *, as_json: bool) -> None:
    result = report.result
    if as_json:
        outcome = {
            "run": str(report.run.path),
            "loss": result.final_loss,
            "eval_loss": result.eval_loss,
            "steps": result.num_steps,
            "tokens": result.num_tokens,
            "examples": report.num_examples,
            "train_seconds": round(report.seconds, 3),
        }
        if version:
            outcome |= {"name": version.name, "digest": version.digest, "labels": list(version.labels)}
            outcome |= {"path": str(version.path)}
        print(json_module.dumps(outcome), flush=True)
        return
    print(f"published {version.name}@{version.digest}" if version else f"trained {report.run.path}")
    path = [result.first_epoch_loss, result.final_loss] if result.num_epochs > 1 else [result.final_loss]
    losses = " → ".join(f"{loss:.3f}" for loss in path)
    print(f"loss {losses} in {report.seconds:.0f} s; the run is in {report.run.path}", flush=True)
