"""`lorikeet quantize`: a base model in 4 bits, as a checkpoint that transformers with bitsandbytes loads too."""

import json as json_format
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from server.cli.options import (
    Debug,
    DoubleQuantization,
    FourBits,
    Json,
    KeepIn16Bits,
    QuantizationBlock,
)
from server.cli.output import human_size, print_json, print_note

if TYPE_CHECKING:
    from server.base.quantization import Quantization


def quantize(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where to write it: a new directory, or an empty one.")],
    model: Annotated[
        str | None,
        typer.Argument(metavar="DIR|HUB_ID", help="The base model; without it: SmolLM2-135M-Instruct."),
    ] = None,
    quantization: Annotated[FourBits, typer.Option(help="The format.")] = FourBits.NF4,
    quantization_block: QuantizationBlock = 64,
    double_quantization: DoubleQuantization = True,
    keep_16bit: KeepIn16Bits = None,
    device: Annotated[str, typer.Option(metavar="cpu|cuda[:N]", help="What computes it.")] = "cpu",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a base model's linear layers in 4 bits. Adapters of the model fit the copy: it counts as the same base."""
    from server.base.checkpoint import record_origin
    from server.base.quantization import HEAD, Quantization
    from server.base.resolve import resolve_base

    settings = Quantization(quantization.value, quantization_block, double_quantization, tuple(keep_16bit or (HEAD,)))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out}: is there already, and not an empty directory")
    source = resolve_base(model, print_note)
    settings.check_keep([*source.spec.linears(), HEAD])
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        work.chmod(0o755)  # as a directory that one makes oneself
        _convert(source.path, work, settings, device)
        record_origin(work, source.digest, source.name)
        work.replace(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    size = sum(file.stat().st_size for file in out.iterdir())
    if json:
        print_json({"path": str(out), "base_digest": source.digest, "size_bytes": size})
    else:
        print(f"wrote {source.name} in {quantization.value} ({human_size(size)}) to {out}")


def _convert(source: Path, target: Path, settings: "Quantization", device: str) -> None:
    """In a process of its own, as it needs torch."""
    from server.errors import BaseModelError, ConfigError

    print_note(f"quantizing {source.name} to {settings.quant_type}")
    command = [sys.executable, "-m", "server.quantization.convert", str(source), str(target)]
    line = json_format.dumps({**asdict(settings), "device": device})
    done = subprocess.run(command, input=line, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        message = lines[-1] if lines else f"the conversion ended with code {done.returncode}"
        raise (ConfigError if done.returncode == 2 else BaseModelError)(message)
