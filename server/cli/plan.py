"""`lorikeet plan`: whether a base, its adapters and its requests fit a device, before anything is loaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.cli.options import (
    Debug,
    DoubleQuantization,
    FourBits,
    Json,
    KeepIn16Bits,
    QuantizationBlock,
    parse_size,
)
from server.cli.output import human_size, print_json, print_table

if TYPE_CHECKING:
    from server.base.plan import Load, Plan
    from server.base.spec import ModelSpec
    from server.base.weights import Device, Formats

EMBEDDED_SHAPE = "smollm2-135m"


def plan(
    base: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|FILE|HUB_ID|SHAPE",
            help="A model directory, a config.json, a hub id that is in the cache, or a known shape as llama-3.1-8b. "
            "Without it: SmolLM2-135M-Instruct.",
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="float32|bfloat16|float16", help="Number format [the checkpoint's].")
    ] = None,
    quantization: Annotated[
        FourBits | None, typer.Option(help="Hold the base's linear layers in 4 bits [as the checkpoint is].")
    ] = None,
    quantization_block: QuantizationBlock = 64,
    double_quantization: DoubleQuantization = True,
    keep_16bit: KeepIn16Bits = None,
    adapters: Annotated[
        int | None, typer.Option(min=0, help="Adapters that are on the device at once [as `serve` would choose].")
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="Their rank.")] = 16,
    sequences: Annotated[int | None, typer.Option(min=1, help="Requests that run at once [64].")] = None,
    context: Annotated[
        int | None, typer.Option(min=1, metavar="TOKENS", help="Of each, prompt and answer [as `serve` would choose].")
    ] = None,
    device: Annotated[
        str, typer.Option(metavar="auto|cpu|cuda", help="What it is served on; auto is a GPU if there is one.")
    ] = "auto",
    device_memory: Annotated[
        int | None,
        typer.Option(parser=parse_size, metavar="SIZE", help="Its memory, as 80GiB [what this machine has free]."),
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what serving takes of a device's memory, by kind as the server's metrics have it, and the options that set
    just this aside. Weights, adapters and KV cache are exact; what a GPU needs beside them is estimated."""
    from server.base.plan import Load
    from server.base.plan import plan as make_plan
    from server.base.quantization import HEAD, wanted_quantization
    from server.base.weights import stored_formats, wanted_formats
    from server.errors import DoesNotFit

    found = find(base)
    held = dtype or found.spec.dtype
    check_dtype(held)
    target, memory = find_device(device, device_memory)
    wanted = wanted_quantization(
        found.config,
        None if quantization is None else quantization.value,
        quantization_block,
        double_quantization,
        tuple(keep_16bit or (HEAD,)),
    )
    formats = (
        stored_formats(found.spec, found.config, found.tensors)
        if wanted is None
        else wanted_formats(found.spec, wanted)
    )
    load = Load(adapters=adapters, rank=rank, sequences=sequences, context=context)
    made = make_plan(found.spec, held, formats, target, memory, load)
    command = ["lorikeet", "serve", *(["--base", base] if base is not None else [])]
    command += ["--quantization", quantization.value] if quantization is not None else []
    command += [part for name, value in made.settings.items() for part in (name, str(value))]
    if json:
        print_json(_fields(found.name, held, target, made, load, command))
    else:
        _print(made, load, held, formats, command)
    if made.left < 0:
        raise DoesNotFit(_refusal(found.spec, held, formats, target, made, load))


@dataclass(frozen=True, slots=True)
class Found:
    """A base, as far as its files are here: `config` is {} for a named shape, `tensors` None without weight files."""

    name: str
    spec: "ModelSpec"
    config: dict[str, Any]
    tensors: dict[str, tuple[str, tuple[int, ...]]] | None


def find(base: str | None) -> Found:
    """Raises BaseModelError for what is none of what `--base` takes."""
    from adapters.files import expand_user
    from server.base.checkpoint import INDEX, SINGLE, read_config, read_spec, tensor_headers
    from server.base.resolve import HUB_ID
    from server.base.shapes import CONFIGS, named_spec
    from server.errors import BaseModelError

    name = base or EMBEDDED_SHAPE
    path = expand_user(name)
    if not path.exists():
        if (spec := named_spec(name)) is not None:
            return Found(name.lower(), spec, {}, None)
        cached = _cached_config(name) if HUB_ID.fullmatch(name) else None
        if cached is None:
            raise BaseModelError(
                f"{name}: no such directory, not in the Hugging Face cache, and not one of {', '.join(CONFIGS)}; "
                "pass the model's config.json"
            )
        path = cached
    directory = path if path.is_dir() else path.parent
    if not path.is_dir() and path.name != "config.json":
        raise BaseModelError(f"{name}: is neither a model directory nor a config.json")
    has_weights = (directory / SINGLE).is_file() or (directory / INDEX).is_file()
    return Found(
        name if path.is_dir() and base is None else directory.resolve().name,
        read_spec(directory),
        read_config(directory),
        tensor_headers(directory) if has_weights else None,
    )


def _cached_config(repo_id: str) -> Path | None:
    """A hub model's config.json, where it has been downloaded."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo_id, "config.json")
    return Path(found) if isinstance(found, str) else None


def check_dtype(name: str) -> None:
    """Raises ConfigError for one that is not known."""
    from server.base.memory import ITEM_BYTES
    from server.errors import ConfigError

    if name not in ITEM_BYTES:
        raise ConfigError(f"--dtype {name}: is not known; use one of {', '.join(ITEM_BYTES)}")


def find_device(kind: str, given: int | None) -> tuple["Device", int]:
    """The device, and bytes of it: `given`, or what is free now. Raises ConfigError where that cannot be known."""
    from server.base.hardware import free_host_bytes, this_gpu
    from server.base.weights import Device, this_cpu
    from server.errors import ConfigError

    if kind not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device {kind}: is not known; use auto, cpu or cuda")
    gpu = this_gpu() if kind != "cpu" else None
    if gpu is not None:
        return Device("cuda", is_hopper=gpu.is_hopper), given or gpu.free_bytes
    if kind == "cuda":
        if given is None:
            raise ConfigError("--device-memory: this machine has no GPU to ask; say how much memory it has, as 80GiB")
        return Device("cuda", is_hopper=True), given
    return this_cpu(), given or free_host_bytes()


def _fields(name: str, dtype: str, device: "Device", found: "Plan", load: "Load", command: list[str]) -> dict[str, Any]:
    return {
        "base": name,
        "dtype": dtype,
        "device": device.kind,
        "memory_bytes": found.memory,
        "estimated": list(found.estimated),
        "total_bytes": found.total,
        "device_bytes": found.device_bytes,
        "left_bytes": found.left,
        "fits": found.left >= 0,
        "adapters": found.num_adapters,
        "rank": load.rank,
        "adapter_bytes": found.adapter_bytes,
        "sequences": found.max_num_seqs,
        "context": found.max_model_len,
        "kv_bytes_per_token": found.token_bytes,
        "kv_tokens": found.kv_tokens,
        "command": command,
    }


def _print(found: "Plan", load: "Load", dtype: str, formats: "Formats", command: list[str]) -> None:
    said = {
        "weights": f"{len(formats)} modules in 4 bits, the rest in {dtype}" if formats else f"in {dtype}",
        "adapters": f"{found.num_adapters} of rank {load.rank}, {human_size(found.adapter_bytes)} each",
        "kv": f"{found.kv_tokens} tokens, {human_size(found.token_bytes)} each: "
        f"{found.kv_tokens // found.max_model_len} requests of {found.max_model_len}",
        "workspace": "a step, captured graphs (estimate)",
        "runtime": "CUDA, kernels (estimate)",
    }
    rows = [(kind, human_size(size), said[kind]) for kind, size in found.memory.items()]
    rows.append(("total", human_size(found.total), f"of {human_size(found.device_bytes)}"))
    print_table(("kind", "memory", "for"), rows)
    print(f"\n{' '.join(command)}")


def _refusal(spec: "ModelSpec", dtype: str, formats: "Formats", device: "Device", found: "Plan", load: "Load") -> str:
    from server.base.plan import advice
    from server.base.quantization import Quantization
    from server.base.weights import wanted_formats, weight_bytes

    saved = 0
    if not formats:
        four_bits = weight_bytes(spec, dtype, wanted_formats(spec, Quantization("nf4")), device)
        saved = found.memory["weights"] - four_bits
    total, device_bytes = human_size(found.total), human_size(found.device_bytes)
    return f"it takes {total}, the device has {device_bytes}: {', or '.join(advice(found, load, saved))}"
