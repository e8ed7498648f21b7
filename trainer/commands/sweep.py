"""`trainer sweep`."""

import json as json_module
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trainer.commands.display import note
from trainer.commands.process import prepare_process

if TYPE_CHECKING:
    from trainer.sweep import Outcome

FAILED = 4


def sweep(
    jobs: Annotated[
        Path, typer.Argument(metavar="JOBS.yaml", help="Settings of all jobs, and a list `jobs` of those of each.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the runs go, by name.")] = Path("runs"),
    at_once: Annotated[int, typer.Option(min=1, help="Jobs in one forward pass.")] = 16,
    publish: Annotated[bool, typer.Option("--publish", help="Publish each, as `trainer publish` does.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the outcome as one JSON object.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="On an error, show the traceback.")] = False,
) -> None:
    """Train several adapters side by side over one loaded base: different data, ranks, rates, seeds."""
    prepare_process()
    from trainer.report import write_report
    from trainer.sweep import read_jobs
    from trainer.sweep import sweep as run

    outcomes = run(read_jobs(jobs), out, at_once, note)
    for outcome in outcomes:
        if outcome.result:
            write_report(outcome.run)
    digests = [_publish(outcome) if publish and outcome.result else None for outcome in outcomes]
    _print(outcomes, digests, as_json=json)
    if any(outcome.error for outcome in outcomes):
        raise typer.Exit(FAILED)


def _publish(outcome: "Outcome") -> str:
    from adapters.stores import open_store
    from trainer.publish import Publication, publish_run

    settings = outcome.run.settings()
    assert settings.name is not None, "jobs have names"
    publication = Publication(settings.name, settings.label)
    return publish_run(outcome.run, open_store(settings.store), publication, note).digest


def _print(outcomes: "list[Outcome]", digests: list[str | None], *, as_json: bool) -> None:
    if as_json:
        rows: list[dict[str, Any]] = [
            {
                "run": str(outcome.run.path),
                "result": asdict(outcome.result) if outcome.result else None,
                "error": outcome.error,
                "digest": digest,
            }
            for outcome, digest in zip(outcomes, digests, strict=True)
        ]
        print(json_module.dumps({"jobs": rows}), flush=True)
        return
    for outcome, digest in zip(outcomes, digests, strict=True):
        said = f"loss {outcome.result.final_loss:.4f}" if outcome.result else outcome.error
        print(f"{outcome.run.path}: {said}{f', published {digest}' if digest else ''}", flush=True)
