"""Writes a 4-bit checkpoint: `python -m server.quantization.convert SOURCE TARGET`, the settings as JSON on stdin.

A process of its own, since it needs torch and `lorikeet quantize` does not load it. Exits 2 when a setting is refused
and 3 when the base is; one line on stderr says why. What it writes loads in transformers with bitsandbytes.
"""

import json
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from adapters.errors import LorikeetError
from server.base.checkpoint import INDEX, SINGLE, read_config, read_spec, weight_files
from server.base.quantization import HEAD, Quantization, stored_quantization
from server.base.spec import ModelSpec
from server.errors import BaseModelError, ConfigError
from server.kernels import quantize
from server.quantization.stored import stored_tensors

SHARD_BYTES = 4 << 30
SETTINGS_REFUSED = 2
BASE_REFUSED = 3


def convert(
    source: Path, target: Path, quantization: Quantization, device: torch.device, shard_bytes: int = SHARD_BYTES
) -> None:
    """Read the model directory `source`, write `target` (which is there, and empty): the linear layers in 4 bits,
    everything else as it is. Raises BaseModelError and ConfigError."""
    config = read_config(source)
    if (stored := stored_quantization(config)) is not None:
        raise BaseModelError(f"{source}: is quantized to {stored} already")
    read_spec(source)  # refuses what cannot be served
    _copy_others(source, target)
    write_quantized(target, config, _tensors(source), quantization, device, shard_bytes)


def write_quantized(
    target: Path,
    config: Mapping[str, Any],
    tensors: Iterable[tuple[str, Tensor]],
    quantization: Quantization,
    device: torch.device,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `config` and `tensors` (name, tensor) of a 16-bit base as a 4-bit checkpoint; each is quantized as it
    comes. Raises ConfigError for what `quantization` keeps and the base has not."""
    spec = ModelSpec.from_config(config)
    linears = [*spec.linears(), HEAD]
    quantization.check_keep(linears)
    kept = [path for path in linears if quantization.keeps(path) or (path == HEAD and spec.tied_embeddings)]
    section = _section(quantization, spec, kept)
    (target / "config.json").write_text(json.dumps({**config, "quantization_config": section}, indent=2) + "\n")
    quantized = {f"{path}.weight" for path in linears} - {f"{path}.weight" for path in kept}
    _write(target, _stored(tensors, quantized, quantization, device), shard_bytes)


def _section(quantization: Quantization, spec: ModelSpec, kept: list[str]) -> dict[str, Any]:
    """config.json's quantization_config, as transformers' BitsAndBytesConfig reads it."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": quantization.quant_type,
        "bnb_4bit_use_double_quant": quantization.double,
        "bnb_4bit_compute_dtype": spec.dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": kept,
    }


def _copy_others(source: Path, target: Path) -> None:
    """Tokenizer, chat template, generation settings, licence: every file but weights and config."""
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix in (".json", ".jinja", ".txt", ".model", ".md", "") and file.name != INDEX:
            shutil.copyfile(file, target / file.name)


def _tensors(source: Path) -> Iterator[tuple[str, Tensor]]:
    """Everything in a checkpoint, by name; one tensor is in memory at a time."""
    for path in weight_files(source):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (not a mapping)
                    yield name, file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise BaseModelError(f"{path}: {error}") from error


def _stored(
    tensors: Iterable[tuple[str, Tensor]], quantized: set[str], quantization: Quantization, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Everything to store, by name."""
    for name, tensor in tensors:
        if name not in quantized:
            yield name, tensor.clone()
            continue
        weight = quantize(tensor.to(device), quantization.quant_type, quantization.block_size, quantization.double)
        for key, part in stored_tensors(weight).items():
            yield f"{name.removesuffix('weight')}{key}", part


def _write(target: Path, tensors: Iterator[tuple[str, Tensor]], shard_bytes: int) -> None:
    """As one file or, past `shard_bytes`, as several and their index."""
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        path = target / f"{len(shards)}.part"
        save_file(pending, path, metadata={"format": "pt"})
        path.chmod(0o644)  # as the files beside it
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        num_bytes = tensor.numel() * tensor.element_size()
        if pending and size + num_bytes > shard_bytes:
            flush()
            size = 0
        pending[name] = tensor
        size, total = size + num_bytes, total + num_bytes
    flush()
    if len(shards) == 1:
        (target / "0.part").rename(target / SINGLE)
        return
    weight_map: dict[str, str] = {}
    for index, names in enumerate(shards):
        file = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        (target / f"{index}.part").rename(target / file)
        weight_map |= dict.fromkeys(names, file)
    record = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (target / INDEX).write_text(json.dumps(record, indent=2) + "\n")


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name!r}: {str(error).splitlines()[0]}") from error
    return device


def main() -> int:
    source, target = map(Path, sys.argv[1:])
    settings = json.loads(sys.stdin.readline())
    try:
        device = _device(settings.pop("device"))
        convert(source, target, Quantization(**{**settings, "keep": tuple(settings["keep"])}), device)
    except LorikeetError as error:
        print(error.message, file=sys.stderr)  # noqa: T201  (for `lorikeet quantize`)
        return SETTINGS_REFUSED if isinstance(error, ConfigError) else BASE_REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main())
