"""Options that several commands share, and how their values are read."""

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

import typer

from server.cli.exits import ExitCode

DEFAULT_SERVER = "127.0.0.1:50051"

# In seconds, 31 years: much more and gRPC takes the deadline for one that has passed.
MAX_TIMEOUT = 1e9

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", re.ASCII | re.IGNORECASE)
_ADDRESS = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\s:\[\]]+):(\d{1,5})", re.ASCII)

_URL = re.compile(r"https?://[^\s/]+(/\S*)?", re.ASCII)


class FourBits(StrEnum):
    """The 4-bit formats."""

    NF4 = "nf4"
    FP4 = "fp4"


@dataclass(slots=True)
class Invocation:
    """What the options say about the run as a whole."""

    debug: bool = False


def _set_debug(context: typer.Context, value: bool) -> bool:
    if value:
        context.ensure_object(Invocation).debug = True
    return value


def help_if_alone(context: typer.Context) -> None:
    """Where a command group is called without a command: show its help, and end as wrong usage."""
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(ExitCode.USAGE)


def parse_size(text: str) -> int:
    """Bytes of "2GiB", "512M", "1.5 GB" or "4096"; units are those of IEC and SI."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise typer.BadParameter(f"{text!r} is no size; write one as 2GiB, 512MiB or in bytes")
    size = int(float(match[1]) * _UNITS[(match[2] or "").lower()])
    if size <= 0:
        raise typer.BadParameter("must be above zero")
    return size


def parse_size_or_none(text: str) -> int:
    """As `parse_size`, and 0 for none at all."""
    return 0 if text.strip() == "0" else parse_size(text)


def parse_address(text: str) -> str:
    """`host:port`, checked for its form only."""
    match = _ADDRESS.fullmatch(text)
    if match is None or not 0 < int(match[2]) < 2**16:
        raise typer.BadParameter(f"{text!r} is no address; write it as host:port, like {DEFAULT_SERVER}")
    return text


def parse_url(text: str) -> str:
    """`http://…` or `https://…`, checked for its form only."""
    if _URL.fullmatch(text) is None:
        raise typer.BadParameter(f"{text!r} is no URL; write it as http://localhost:4317, or with https")
    return text


Debug = Annotated[
    bool,
    typer.Option("--debug", help="On an error, show the traceback.", callback=_set_debug, is_eager=True),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Server = Annotated[
    str,
    typer.Option(
        "--server", metavar="HOST:PORT", envvar="LORIKEET_SERVER", help="The server's address.", parser=parse_address
    ),
]
Timeout = Annotated[
    float, typer.Option("--timeout", min=0.001, max=MAX_TIMEOUT, metavar="SECONDS", help="Give up after so long.")
]
Base = Annotated[
    str | None,
    typer.Option(
        "--base",
        metavar="DIR|HUB_ID",
        help="The base model: a directory or a Hugging Face id. Without it: SmolLM2-135M-Instruct.",
    ),
]
Store = Annotated[
    str | None,
    typer.Option(
        "--store", metavar="DIR|S3_URL", help="The adapter store, s3://bucket/prefix too. Without it: the user's own."
    ),
]
AdapterId = Annotated[str, typer.Argument(metavar="ADAPTER", help="name, name@label or name@sha256:…")]
QuantizationBlock = Annotated[
    int,
    typer.Option("--quantization-block", metavar="N", help="Weights that share one scale: a power of 2, 32 to 4096."),
]
DoubleQuantization = Annotated[
    bool, typer.Option("--double-quantization/--single-quantization", help="Quantize the scales too, or not.")
]
KeepIn16Bits = Annotated[
    list[str] | None,
    typer.Option(
        "--keep-16bit",
        metavar="MODULE",
        help="Modules not to quantize, by their path or its beginning or end, as down_proj; repeatable [lm_head].",
    ),
]
