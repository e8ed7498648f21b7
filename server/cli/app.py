"""The commands together, and the process boundary: every way to end becomes an exit code and at most one line."""

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from adapters.errors import LorikeetError
from server.cli import adapters, exits
from server.cli.exits import ExitCode, Failure, one_line
from server.cli.generate import generate
from server.cli.health import health
from server.cli.info import info
from server.cli.options import Debug, Invocation, help_if_alone
from server.cli.output import print_note
from server.cli.plan import plan
from server.cli.quantize import quantize
from server.cli.serve import serve
from server.version import lorikeet_version


def build_app() -> typer.Typer:
    """The whole command tree."""
    app = typer.Typer(
        name="lorikeet",
        help="Serve many LoRA adapters from one resident base model over gRPC.",
        epilog=exits.HELP,
        rich_markup_mode=None,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.callback(invoke_without_command=True)(_root)
    for command in (serve, generate, info, health, plan, quantize):
        app.command()(command)
    app.add_typer(adapters.build_app(), name="adapters")
    return app


def _print_version(value: bool) -> None:
    if value:
        print(f"lorikeet {lorikeet_version()}")
        raise typer.Exit


def _root(
    context: typer.Context,
    debug: Debug = False,
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options before the command; without a command, the help."""
    help_if_alone(context)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `lorikeet` with `arguments` (the process's own if None) and return its exit code."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # gRPC's own log lines would stand between ours
    invocation = Invocation()
    try:
        code = build_app()(
            args=None if arguments is None else list(arguments),
            prog_name="lorikeet",
            standalone_mode=False,
            obj=invocation,
        )
        sys.stdout.flush()
        return int(code or ExitCode.OK)
    except (KeyboardInterrupt, typer.Abort):
        return ExitCode.INTERRUPTED
    except BrokenPipeError:  # the reader of our output left, as `head` does; nobody is there to be told
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.FAILURE
    except Exception as error:  # noqa: BLE001 (the process boundary)
        if invocation.debug:
            traceback.print_exception(error)
        message, exit_code = explain(error)
        print_note(f"error: {one_line(message)}")
        return exit_code


def explain(error: Exception) -> tuple[str, ExitCode]:
    """What to say of an error, and the exit code that goes with it."""
    match error:
        case Failure():
            return error.message, error.exit_code
        case LorikeetError():
            return error.message, exits.of_status(error.code)
        case typer.TyperException():
            return f"{error.format_message()} (see --help)", ExitCode(error.exit_code)
        case OSError():
            return str(error), ExitCode.FAILURE
        case _:
            return f"{type(error).__name__}: {error} (a bug in lorikeet; --debug shows where)", ExitCode.FAILURE
