"""The command line, `trainer`: its commands and its exit codes. torch loads only after options and data are checked.

Exit codes: 0 done, 1 failure, 2 wrong usage, settings or data, 4 refused (base or adapter does not fit, or training
failed), 5 no room on the disk, 6 the store cannot be reached, 130 interrupted. Nothing is published unless it is 0.
"""

import sys
import time
import traceback
from collections.abc import Sequence

import typer

from adapters.errors import LorikeetError
from trainer.commands.check import check
from trainer.commands.compare import compare, report
from trainer.commands.display import note
from trainer.commands.estimate import estimate
from trainer.commands.fit import fit, resume
from trainer.commands.preview import preview
from trainer.commands.publish import evaluate, publish
from trainer.commands.sweep import sweep
from trainer.errors import PeerFailed
from trainer.launch import is_launched, own_rank

EXIT_CODES = {"INVALID_ARGUMENT": 2, "FAILED_PRECONDITION": 4, "RESOURCE_EXHAUSTED": 5, "UNAVAILABLE": 6}
INTERRUPTED = 130
# Seconds that a process whose peer is ending waits: torchrun takes who ends first for the one at fault, then ends the
# others. From closing its connections to its end Python may take some.
COURTESY = 30.0
EPILOG = (
    "Exit codes: 0 done, 1 failure, 2 wrong usage, settings or data, 4 refused (base or adapter does not fit, or "
    "training failed), 5 no room on the disk, 6 store not reachable, 130 interrupted."
)
COMMANDS = (fit, resume, estimate, preview, publish, evaluate, check, compare, sweep, report)


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
    for command in COMMANDS:
        app.command(epilog=EPILOG)(command)
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `trainer` with `arguments` (the process's own if None) and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = int(build_app()(args=given, prog_name="trainer", standalone_mode=False) or 0)
        if code == INTERRUPTED and not is_launched():  # what typer makes of Ctrl-C; who launched this one says it
            note("interrupted")
        return code
    except Exception as error:  # noqa: BLE001 (the process boundary)
        if "--debug" in given:
            traceback.print_exception(error)
        message, code = _explain(error)
        where = f" (process {own_rank()})" if own_rank() else ""
        if not (where and isinstance(error, PeerFailed)):  # that one is said once
            note(f"error{where}: {' '.join(message.split())}")
        if isinstance(error, PeerFailed):
            time.sleep(COURTESY)
        return code


def _explain(error: Exception) -> tuple[str, int]:
    match error:
        case LorikeetError():
            return error.message, EXIT_CODES.get(error.code, 1)
        case typer.TyperException():
            return f"{error.format_message()} (see --help)", error.exit_code
        case RuntimeError() if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
            return "out of memory outside of a training step; use qlora, a shorter max-length or a smaller base", 4
        case OSError() | MemoryError():
            return str(error) or type(error).__name__, 1
        case _:
            return f"{type(error).__name__}: {error} (a bug in trainer; --debug shows where)", 1


if __name__ == "__main__":
    sys.exit(main())
