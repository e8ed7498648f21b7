"""The command line, `trainer`: reads options, trains, prints. torch loads only after the options and data are checked.

Exit codes: 0 done, 1 failure, 2 wrong usage, settings or data, 4 refused (base or adapter does not fit, or training
failed), 5 no room on the disk, 6 the store cannot be reached, 130 interrupted. Nothing is published unless it is 0.
"""

import json as json_module
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adapters.errors import LorikeetError
from trainer.settings import ALL_LINEAR, Settings

if TYPE_CHECKING:
    from trainer.fit import Report
    from trainer.loop import Step

DEFAULTS = Settings()
EXIT_CODES = {"INVALID_ARGUMENT": 2, "FAILED_PRECONDITION": 4, "RESOURCE_EXHAUSTED": 5, "UNAVAILABLE": 6}
INTERRUPTED = 130
EPILOG = (
    "Exit codes: 0 done, 1 failure, 2 wrong usage, settings or data, 4 refused (base or adapter does not fit, or "
    "training failed), 5 no room on the disk, 6 store not reachable, 130 interrupted."
)


class MethodName(StrEnum):
    """What --method takes."""

    LORA = "lora"
    QLORA = "qlora"


class Dtype(StrEnum):
    """What --dtype takes."""

    AUTO = "auto"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


def fit(
    data: Annotated[Path, typer.Option(metavar="FILE.jsonl", help='Rows of {"messages": [{"role", "content"}, …]}.')],
    name: Annotated[str, typer.Option(help="The adapter's name in the store.")],
    method: Annotated[MethodName, typer.Option(help="lora, or qlora: the base in 4 bits.")] = MethodName.LORA,
    base: Annotated[
        str | None,
        typer.Option(metavar="DIR|HUB_ID", help="The base model. Without it: SmolLM2-135M-Instruct."),
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|S3_URL",
            help="The adapter store, s3://bucket/prefix too. Without it: the user's data directory.",
        ),
    ] = None,
    label: Annotated[str, typer.Option(help="The label that will point at the new version.")] = "latest",
    rank: Annotated[int, typer.Option(help="LoRA's rank.")] = DEFAULTS.rank,
    alpha: Annotated[float | None, typer.Option(help="Scaling is alpha / rank [twice the rank].")] = None,
    dropout: Annotated[float, typer.Option(help="Dropout before LoRA's A.")] = DEFAULTS.dropout,
    target_modules: Annotated[
        str, typer.Option(metavar="NAME,…", help=f"Layers to train, as q_proj,v_proj, or {ALL_LINEAR}.")
    ] = ALL_LINEAR,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = DEFAULTS.learning_rate,
    epochs: Annotated[int, typer.Option(help="Times the data is gone through.")] = DEFAULTS.epochs,
    batch_size: Annotated[int, typer.Option(help="Rows of a step.")] = DEFAULTS.batch_size,
    max_length: Annotated[int, typer.Option(help="Longest row in tokens; a longer one is an error.")] = (
        DEFAULTS.max_length
    ),
    seed: Annotated[int, typer.Option(help="The same seed gives the same adapter (on CPU).")] = DEFAULTS.seed,
    dtype: Annotated[Dtype, typer.Option(help="What the base computes in; auto takes the fastest.")] = Dtype.AUTO,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda[:N]", help="Where to train.")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print the outcome as one JSON object.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="On an error, show the traceback.")] = False,
) -> None:
    """Train an adapter on chat rows, with loss on the assistant's words only, and publish it to the store."""
    from adapters.ids import check_label, check_name
    from adapters.stores import open_store
    from server.base.resolve import resolve_base
    from trainer.data import load_dialogues

    settings = Settings(
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        target_modules=tuple(part.strip() for part in target_modules.split(",")),
        learning_rate=lr,
        epochs=epochs,
        batch_size=batch_size,
        max_length=max_length,
        seed=seed,
    )
    check_name(name)
    check_label(label)
    target = open_store(store)
    load_dialogues(data)  # again when training starts: cheap, and refuses before anything is downloaded or loaded
    model = resolve_base(base, _note)
    settings.check_targets(model.spec.linears())
    _prepare_process()
    from trainer import fit as training  # brings torch

    job = training.Job(data, name, label, method.value, settings, dtype.value, device)
    started = time.perf_counter()
    with _step_display() as on_step:
        report = training.run(job, model, target, _note, on_step)
    _print_report(report, time.perf_counter() - started, as_json=json)


def _note(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _prepare_process() -> None:
    """Before torch loads: threads that sleep while they wait, and no bars or advice of the libraries' own.

    OpenMP's default is to spin between parallel regions. Where anything else runs on the same cores that takes
    several times as long (measured on two busy ones: 9 s of wall time a step against 3).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it advises another package when it finds no GPU
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # of PEFT's calls, not ours
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]


@contextmanager
def _step_display() -> "Iterator[Callable[[Step], None]]":
    """A progress bar with the loss and the speed on a terminal; elsewhere a line for every tenth of the way."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    started, num_tokens = time.perf_counter(), 0
    columns = (
        TextColumn("training"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TextColumn("{task.fields[speed]:.0f} tokens/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("training", total=None, loss=float("nan"), speed=0.0, start=False)

        def on_step(step: "Step") -> None:
            nonlocal started, num_tokens
            if step.index == 0:
                bar.start_task(task)
            num_tokens += step.num_tokens
            done, speed = step.index + 1, num_tokens / (time.perf_counter() - started)
            bar.update(task, completed=done, total=step.num_steps, loss=step.loss, speed=speed)
            if not console.is_terminal and done * 10 // step.num_steps > step.index * 10 // step.num_steps:
                _note(f"step {done}/{step.num_steps}  loss {step.loss:.3f}  {speed:.0f} tokens/s")

        yield on_step


def _print_report(report: "Report", seconds: float, *, as_json: bool) -> None:
    version, result = report.version, report.result
    if as_json:
        outcome = {
            "name": version.name,
            "digest": version.digest,
            "labels": list(version.labels),
            "path": str(version.path),
            "loss": result.final_loss,
            "steps": result.num_steps,
            "tokens": result.num_tokens,
            "examples": report.num_examples,
            "train_seconds": round(report.seconds, 3),
            "seconds": round(seconds, 3),
        }
        print(json_module.dumps(outcome), flush=True)
    else:
        print(f"published {version.name}@{version.digest}")
        path = [result.first_epoch_loss, result.final_loss] if result.num_epochs > 1 else [result.final_loss]
        losses = " → ".join(f"{loss:.3f}" for loss in path)
        print(f"loss {losses} in {report.seconds:.0f} s", flush=True)


def _root() -> None:
    """Train adapters and publish them to the store."""


def build_app() -> typer.Typer:
    """The command tree."""
    app = typer.Typer(
        name="trainer",
        epilog=EPILOG,
        no_args_is_help=True,
        rich_markup_mode=None,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.callback()(_root)
    app.command(epilog=EPILOG)(fit)
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `trainer` with `arguments` (the process's own if None) and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = int(build_app()(args=given, prog_name="trainer", standalone_mode=False) or 0)
        if code == INTERRUPTED:  # what typer makes of Ctrl-C
            _note("interrupted")
        return code
    except Exception as error:  # noqa: BLE001 (the process boundary)
        if "--debug" in given:
            traceback.print_exception(error)
        message, code = _explain(error)
        _note(f"error: {' '.join(message.split())}")
        return code


def _explain(error: Exception) -> tuple[str, int]:
    match error:
        case LorikeetError():
            return error.message, EXIT_CODES.get(error.code, 1)
        case typer.TyperException():
            return f"{error.format_message()} (see --help)", error.exit_code
        case OSError() | MemoryError():
            return str(error) or type(error).__name__, 1
        case _:
            return f"{type(error).__name__}: {error} (a bug in trainer; --debug shows where)", 1


if __name__ == "__main__":
    sys.exit(main())
