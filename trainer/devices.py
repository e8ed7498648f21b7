"""Where a run computes, in what, and with which attention."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from trainer.errors import SettingsError

EAGER_LENGTH = 512  # up to this many tokens a row, plain attention is faster on CPU than the fused kernel's backward


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
    """What is computed in. `auto`: 16 bits where the device multiplies them fast, else fp32.

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


def choose_attention(longest: int, device: torch.device) -> str:
    """Transformers' name of the attention kernel, for rows of up to `longest` tokens."""
    return "eager" if device.type == "cpu" and longest <= EAGER_LENGTH else "sdpa"


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Products in `dtype`, whatever the weights have."""
    return nullcontext() if dtype is torch.float32 else torch.autocast(device.type, dtype=dtype)


def dtype_name(dtype: torch.dtype) -> str:
    """As settings have it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")
