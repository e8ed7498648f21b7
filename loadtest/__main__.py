"""The load tests' command line; exit codes: 0 done, 1 requests failed, 2 something is wrong with what was asked."""

import signal
import sys
from argparse import ArgumentParser
from collections.abc import Sequence

from adapters.errors import LorikeetError
from loadtest.compare import compare, join
from loadtest.modes import MODES
from loadtest.overload import OWN_SERVER, overload
from loadtest.run import echo, run


def main(arguments: Sequence[str] | None = None) -> int:
    known = parser()
    options = known.parse_args(arguments)
    if getattr(options, "server", None) and (options.base or options.options):
        known.error("argument --server: --base and what follows -- are for a server of its own")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that no server of its own is left behind
    try:
        code: int = options.function(options)
    except LorikeetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return code


def parser() -> ArgumentParser:
    found = ArgumentParser(prog="python -m loadtest", description="Load on a Lorikeet server, by Locust.")
    commands = found.add_subparsers(required=True, metavar="COMMAND")
    play = commands.add_parser("run", help="play one scenario")
    play.add_argument("--server", metavar="HOST:PORT", help="a running server [one of its own, with random adapters]")
    play.add_argument("--base", metavar="DIR|HUB_ID", help="the base of its own server [SmolLM2-135M-Instruct]")
    play.add_argument("--csv", metavar="PREFIX", help="Locust's CSV files")
    play.add_argument("options", nargs="*", help="options of its own server, after --")
    play.set_defaults(function=run)
    bare = commands.add_parser("echo", help="the same against a server that computes nothing")
    bare.add_argument("--interval", type=float, default=0.0, metavar="SECONDS", help="between two tokens [0]")
    bare.set_defaults(function=echo)
    against = commands.add_parser("compare", help="the same scenario on every way to serve, as a report")
    against.add_argument("--base", metavar="DIR|HUB_ID", help="the base [SmolLM2-135M-Instruct]")
    against.add_argument("--scenario", default="compare", help="a TOML file, or a name of loadtest/scenarios [compare]")
    against.add_argument("--modes", default=",".join(mode.name for mode in MODES), help="[%(default)s]")
    against.add_argument("--users", type=counts, default="1,4,16", help="closed loads, with commas between [1,4,16]")
    against.add_argument("--seconds", type=int, help="of each load [the scenario's]")
    against.add_argument("--output", default="comparison", metavar="PREFIX", help="of .json, .html, .md [%(default)s]")
    against.add_argument("--keep", action="store_true", help="keep what PREFIX.json has of other modes, and the echo")
    against.add_argument("--no-echo", dest="echo", action="store_false", help="leave the load generator's own part out")
    against.add_argument("options", nargs="*", help="options of every server, after --")
    against.set_defaults(function=compare)
    several = commands.add_parser("join", help="one report of several comparisons, each of modes of its own")
    several.add_argument("parts", nargs="+", metavar="REPORT.json")
    several.add_argument("--output", default="comparison", metavar="PREFIX", help="of .json, .html, .md [%(default)s]")
    several.set_defaults(function=join)
    beyond = commands.add_parser("overload", help="the load that a server accepts, then several times that")
    beyond.add_argument("--server", metavar="HOST:PORT", help="a running server [one of its own, with random adapters]")
    beyond.add_argument("--base", metavar="DIR|HUB_ID", help="the base of its own server [SmolLM2-135M-Instruct]")
    beyond.add_argument(
        "--scenario", default="overload", help="a TOML file, or a name of loadtest/scenarios [overload]"
    )
    beyond.add_argument("--seconds", type=int, help="of each load [the scenario's]")
    beyond.add_argument("--factor", type=factor, default=4.0, help="how many times the load [%(default)s]")
    beyond.add_argument(
        "--rounds", type=count, default=1, help="of both loads in turn; ratios are medians [%(default)s]"
    )
    beyond.add_argument("--json", metavar="FILE", help="add the line to this file, too")
    beyond.add_argument("options", nargs="*", help=f"of its own server, after -- [{' '.join(OWN_SERVER)}]")
    beyond.set_defaults(function=overload)
    for command in (play, bare, against, beyond):
        command.add_argument("--processes", type=count, default=1, help="of Locust, that share the load [%(default)s]")
    for command in (play, bare):
        command.add_argument("--scenario", default="quick", help="a TOML file, or a name of loadtest/scenarios [quick]")
        command.add_argument("--users", type=int, help="closed load [the scenario's]")
        command.add_argument("--rate", type=float, help="open load, requests a second [the scenario's]")
        command.add_argument("--seconds", type=int, help="how long [the scenario's]")
        command.add_argument("--json", metavar="FILE", help="the numbers")
    return found


def count(text: str) -> int:
    """One or more. Raises ValueError, which argparse tells with the option's name."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


def counts(text: str) -> list[int]:
    return [count(part) for part in text.split(",")]


def factor(text: str) -> float:
    """Above nothing."""
    if not (number := float(text)) > 0:
        raise ValueError
    return number


if __name__ == "__main__":
    sys.exit(main())
