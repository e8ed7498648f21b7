"""`trainer publish` and `trainer evaluate`."""

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trainer.commands.display import note
from trainer.commands.process import prepare_process

if TYPE_CHECKING:
    from adapters.versions import Version
    from trainer.evaluate import Evaluation

Json = Annotated[bool, typer.Option("--json", help="Print the outcome as one JSON object.")]
Debug = Annotated[bool, typer.Option("--debug", help="On an error, show the traceback.")]
Store = Annotated[
    str | None,
    typer.Option(metavar="DIR|S3_URL", help="The adapter store. Without it: the run's, or the user's data directory."),
]


def publish(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's directory.")],
    name: Annotated[str | None, typer.Option(help="The adapter's name in the store [the run's].")] = None,
    label: Annotated[str | None, typer.Option(help="The label that will point at it [the run's].")] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="FILE|DIR", help="Rows to score it on [the run's eval-data, or its data].")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="How many of them.")] = 64,
    answers: Annotated[bool, typer.Option("--answers", help="Answer them too, for the share of exact ones.")] = False,
    tolerance: Annotated[float, typer.Option(help="How far the served loss may be from the trainer's.")] = 1e-3,
    expect: Annotated[
        str | None, typer.Option(metavar="DIGEST", help="Only if the label points there now; '' if it is new.")
    ] = None,
    store: Store = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Publish a run's adapter, once the server's own forward pass has scored it as the trainer does."""
    from adapters.stores import open_store
    from trainer.errors import SettingsError
    from trainer.run_directory import RunDirectory

    opened = RunDirectory.open(run)
    settings = opened.settings()
    if (chosen := name or settings.name) is None:
        raise SettingsError("the run has no name; pass --name")
    prepare_process()
    from trainer.publish import Publication, Tolerance, publish_run

    publication = Publication(chosen, label or settings.label, data, rows, answers, expect, Tolerance(parity=tolerance))
    version = publish_run(opened, open_store(store or settings.store), publication, note)
    _print_version(version, as_json=json)


def evaluate(
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER", help="A run, a PEFT directory, a name in the store, or `base`.")
    ],
    data: Annotated[Path | None, typer.Option(metavar="FILE|DIR", help="Rows to score it on.")] = None,
    task: Annotated[str | None, typer.Option(help="In place of data: a task of our own, as bookings.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="How many rows, at most.")] = 200,
    answers: Annotated[bool, typer.Option(help="Answer them, for the share of exact ones.")] = True,
    show: Annotated[int, typer.Option(help="Print so many wrong answers.")] = 0,
    base: Annotated[
        str | None, typer.Option(metavar="DIR|HUB_ID", help="The base model. Without it: SmolLM2-135M-Instruct.")
    ] = None,
    store: Store = None,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda[:N]", help="Where to compute.")] = "auto",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Score an adapter by the server's own forward pass: its loss, and how many answers are exactly right."""
    from adapters.stores import open_store
    from server.base.resolve import resolve_base

    prepare_process()
    from trainer.devices import choose_device
    from trainer.evaluate import evaluate as score
    from trainer.evaluate import find_adapter, read_questions
    from trainer.served import ServedBase

    model = resolve_base(base, note)
    directory = find_adapter(adapter, model, open_store(store))
    questions = read_questions(data, task, rows, model)
    served = ServedBase(model.path, model.spec, choose_device(device))
    loaded = None if directory is None else served.load_adapter(directory)
    found = score(served, loaded, questions.rows, questions.decoder if answers else None, questions.end_ids)
    _print_evaluation(adapter, found, show, as_json=json)


def _print_version(version: "Version", *, as_json: bool) -> None:
    if not as_json:
        print(f"published {version.name}@{version.digest}", flush=True)
        return
    training = version.manifest.training
    assert training is not None, "the gate says how it was trained"
    assert training.scores is not None, "the gate scores"
    fields = type(training.scores).__dataclass_fields__
    outcome: dict[str, Any] = {"name": version.name, "digest": version.digest, "labels": list(version.labels)}
    outcome |= {"path": str(version.path), "scores": {name: getattr(training.scores, name) for name in fields}}
    print(json_module.dumps(outcome), flush=True)


def _print_evaluation(adapter: str, found: "Evaluation", show: int, *, as_json: bool) -> None:
    wrong = [answer for answer in found.answers if not answer.is_exact][:show]
    if as_json:
        outcome = {
            "adapter": adapter,
            "rows": found.num_rows,
            "loss": found.loss.mean,
            "tokens": found.loss.num_tokens,
            "exact_match": found.exact_match,
            "seconds": round(found.seconds, 3),
            "wrong": [{"expected": answer.expected, "given": answer.given} for answer in wrong],
        }
        print(json_module.dumps(outcome), flush=True)
        return
    share = "" if found.exact_match is None else f", {found.exact_match:.1%} of the answers exact"
    print(f"{adapter}: loss {found.loss.mean:.4f} over {found.num_rows} rows{share} ({found.seconds:.0f} s)")
    for answer in wrong:
        print(f"  wanted {answer.expected!r}, got {answer.given!r}", flush=True)
