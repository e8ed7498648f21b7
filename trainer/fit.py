"""One run: check everything that can be checked cheaply, train, publish."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adapters.ids import check_label, check_name
from adapters.manifest import TrainingInfo
from adapters.stores import Store
from adapters.versions import Version
from server.base.resolve import BaseModel
from trainer.data import load_dialogues
from trainer.encoding import Encoder, Example
from trainer.errors import SettingsError
from trainer.loop import Loop, Result, Step
from trainer.methods import METHODS
from trainer.methods.base import add_adapter
from trainer.publish import publish_adapter
from trainer.settings import Settings

EAGER_LENGTH = 512  # up to this many tokens a row, plain attention is faster on CPU than the fused kernel's backward


@dataclass(frozen=True, slots=True)
class Job:
    """What to train and where it goes. `method` is a key of METHODS; `dtype` and `device` may be "auto"."""

    data: Path
    name: str
    label: str
    method: str
    settings: Settings
    dtype: str = "auto"
    device: str = "auto"


@dataclass(frozen=True, slots=True)
class Report:
    """What came of a job. `seconds` is the wall time of the training loop alone."""

    version: Version
    result: Result
    num_examples: int
    seconds: float


def run(
    job: Job,
    base: BaseModel,
    store: Store,
    progress: Callable[[str], None],
    on_step: Callable[[Step], None],
) -> Report:
    """Train `job` on `base` and publish to `store`. Raises LorikeetError kinds; until the end nothing is published."""
    check_name(job.name)
    check_label(job.label)
    settings, method = job.settings, METHODS[job.method]
    targets = settings.check_targets(base.spec.linears())
    dialogues = load_dialogues(job.data)
    device = choose_device(job.device)
    dtype = choose_dtype(job.dtype, base.spec.dtype, device)
    tokenizer = load_tokenizer(base.path)
    end_ids = read_end_ids(base.path, tokenizer.eos_token_id)
    max_length = min(settings.max_length, base.spec.max_position)
    examples = Encoder(tokenizer, end_ids, max_length).encode_all(dialogues, job.data)
    progress(f"loading {base.name} ({method.quantization or str(dtype).removeprefix('torch.')}, {device})")
    torch.manual_seed(settings.seed)
    attention = choose_attention(examples, device)
    model = add_adapter(method.load_base(base.path, dtype, device, attention), targets, settings)
    loop = Loop(model, settings, pad_id=tokenizer.pad_token_id or 0, device=device)
    started = time.perf_counter()
    result = loop.run(examples, on_step)
    seconds = time.perf_counter() - started
    training = TrainingInfo(
        method=method.name,
        base_quantization=method.quantization,
        hyperparameters=settings.as_metadata() | {"dtype": str(dtype).removeprefix("torch.")},
        metrics={"loss": result.final_loss, "seconds": round(seconds, 3), "tokens": float(result.num_tokens)},
    )
    version = publish_adapter(model, base, store, job.name, job.label, training)
    return Report(version, result, len(examples), seconds)


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA if there is one, else the CPU. Raises SettingsError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SettingsError(f"device {name!r} is unknown; use auto, cpu or cuda") from error
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        raise SettingsError(f"device {name!r} is not available here; use auto or cpu")
    return device


def choose_dtype(name: str, checkpoint: str, device: torch.device) -> torch.dtype:
    """What the base computes in. `auto`: 16 bits where the device multiplies them fast, else fp32.

    On a CPU with AVX512-BF16 a bf16 step takes under half of fp32's time; without such instructions, more.
    """
    if name != "auto":
        return torch.bfloat16 if name == "bfloat16" else torch.float32
    if checkpoint == "float32":
        return torch.float32
    if device.type == "cuda":
        return torch.bfloat16  # for float16 too: its range would need loss scaling
    return torch.bfloat16 if cpu_multiplies_bf16(Path("/proc/cpuinfo")) else torch.float32


def cpu_multiplies_bf16(cpuinfo: Path) -> bool:
    """Whether the processor has instructions for bf16 products, as Linux tells; False where it does not tell.

    From the kernel, since torch's own answer (`torch.cpu.get_capabilities`) is newer than the oldest torch we support.
    """
    words = cpuinfo.read_text(encoding="utf-8").split() if cpuinfo.is_file() else []
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(words)


def choose_attention(examples: list[Example], device: torch.device) -> str:
    """Transformers' name of the attention kernel."""
    short = max(len(example.ids) for example in examples) <= EAGER_LENGTH
    return "eager" if device.type == "cpu" and short else "sdpa"


def load_tokenizer(path: Path) -> Any:
    """The base's tokenizer. Raises SettingsError if it has no chat template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    if not tokenizer.chat_template:
        raise SettingsError(f"{path}: the base has no chat template, so chat messages cannot be rendered for it")
    return tokenizer


def read_end_ids(path: Path, eos_token_id: int | None) -> set[int]:
    """Tokens that end generation: the tokenizer's, and those of config.json and generation_config.json."""
    ends = set() if eos_token_id is None else {eos_token_id}
    for file in (path / "config.json", path / "generation_config.json"):
        if file.is_file():
            value = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
            ends.update(value if isinstance(value, list) else [] if value is None else [value])
    return ends
