"""`trainer compare` and `trainer report`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trainer.commands.display import note
from trainer.commands.options import Given, merge, with_settings
from trainer.commands.process import prepare_process

if TYPE_CHECKING:
    from trainer.settings import Settings

Debug = Annotated[bool, typer.Option("--debug", help="On an error, show the traceback.")]
METHODS = "lora,qlora,full"
TRAIN_ROWS = 1024


@with_settings
def compare(
    given: Given,
    methods: Annotated[str, typer.Option(metavar="NAME,…", help="Methods to compare.")] = METHODS,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each, with seeds from --seed on.")] = 3,
    task: Annotated[
        str | None, typer.Option(help="In place of --data and --test: a task of our own, as bookings.")
    ] = None,
    train_rows: Annotated[int, typer.Option(min=1, help="Rows of the task to train on.")] = TRAIN_ROWS,
    test: Annotated[Path | None, typer.Option(metavar="FILE|DIR", help="Rows to ask, not in the data.")] = None,
    test_rows: Annotated[int, typer.Option(min=1, help="How many of them.")] = 200,
    full_lr: Annotated[float, typer.Option(help="The learning rate of method full.")] = 1e-4,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where runs and results go; goes on with what is there.")] = (
        Path("comparison")
    ),
    config: Annotated[
        Path | None, typer.Option(metavar="FILE.yaml", help="Settings by these names; flags go before it.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON, not as a table.")] = False,
    debug: Debug = False,
) -> None:
    """Train the same data by several methods, and ask each the same questions, served: one table, with plots."""
    chosen = _methods(methods)
    settings, tested = _data(merge(given, config), task, train_rows, test, test_rows, out)
    prepare_process()
    from trainer.compare import Plan, as_json, as_markdown
    from trainer.compare import compare as run
    from trainer.plots import plot_comparison, plot_losses
    from trainer.run_directory import RunDirectory

    plan = Plan(chosen, seeds, settings, tested, test_rows, {"full": full_lr})
    text = table = ""
    for comparison in run(plan, out, note):  # after each run, so that what is done stays if the rest is not
        text, table = as_json(comparison, plan), as_markdown(comparison)
        (out / "comparison.json").write_text(text, encoding="utf-8")
        (out / "comparison.md").write_text(table, encoding="utf-8")
        (out / "comparison.png").write_bytes(plot_comparison(comparison))
        losses = {method: list(RunDirectory.open(out / f"{method}-0").metrics()) for method in comparison.methods}
        (out / "losses.png").write_bytes(plot_losses(losses))
    print(text if json else table, end="", flush=True)


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's directory.")],
    debug: Debug = False,
) -> None:
    """Write the run's loss plot (loss.png) and a page about it (report.html) into its directory."""
    from trainer.report import write_report
    from trainer.run_directory import RunDirectory

    print(write_report(RunDirectory.open(run)), flush=True)


def _methods(text: str) -> tuple[str, ...]:
    from trainer.errors import SettingsError

    methods = tuple(part.strip() for part in text.split(","))
    if unknown := [name for name in methods if name not in METHODS.split(",")]:
        raise SettingsError(f"method {unknown[0]!r} is unknown; known are {METHODS}")
    return tuple(dict.fromkeys(methods))


def _data(
    settings: "Settings", task: str | None, train_rows: int, test: Path | None, test_rows: int, out: Path
) -> "tuple[Settings, Path]":
    """The settings with data, and the test rows' file. Raises SettingsError."""
    from dataclasses import replace

    from trainer.errors import SettingsError
    from trainer.tasks import TASKS, write_rows

    if task is None:
        if not settings.data or test is None:
            raise SettingsError("pass --data and --test, or --task")
        return settings, test
    if settings.data or test is not None:
        raise SettingsError("--task brings its own rows; leave out --data and --test")
    if task not in TASKS:
        raise SettingsError(f"task {task!r} is unknown; known are {', '.join(TASKS)}")
    out.mkdir(parents=True, exist_ok=True)
    data, tested = out / "train.jsonl", out / "test.jsonl"
    write_rows(data, TASKS[task].train(train_rows, 0))
    write_rows(tested, TASKS[task].test(test_rows, 0))
    return replace(settings, data=str(data)), tested
