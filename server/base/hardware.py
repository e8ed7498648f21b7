"""What this machine has, asked without torch: free memory, and the first GPU."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

from server.errors import ConfigError

HOPPER = 9  # major compute capability


@dataclass(frozen=True, slots=True)
class Gpu:
    """The first GPU, as NVIDIA's driver has it."""

    free_bytes: int
    is_hopper: bool


def this_gpu() -> Gpu | None:
    """None without a GPU, or a driver that answers."""
    import pynvml

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        free = int(pynvml.nvmlDeviceGetMemoryInfo(handle).free)
        major, _ = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    except pynvml.NVMLError:
        return None
    return Gpu(free, is_hopper=major == HOPPER)


def free_host_bytes(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Memory that is free now. Raises ConfigError where the system does not say."""
    lines: list[str] = []
    with contextlib.suppress(OSError):  # not Linux
        lines = meminfo.read_text().splitlines()
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise ConfigError("cannot tell the free memory of this machine; set --kv-cache-memory and --adapter-memory")
