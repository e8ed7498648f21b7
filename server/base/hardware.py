"""What this machine has, asked without torch: free memory, and the first GPU."""

import contextlib
from collections.abc import Iterator
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


def free_host_bytes(
    meminfo: Path = Path("/proc/meminfo"),
    own_group: Path = Path("/proc/self/cgroup"),
    groups: Path = Path("/sys/fs/cgroup"),
) -> int:
    """Memory that is free now, of the machine and within a container's limit (or systemd's). Raises ConfigError where
    the system does not say."""
    lines: list[str] = []
    with contextlib.suppress(OSError):  # not Linux
        lines = meminfo.read_text().splitlines()
    for line in lines:
        if line.startswith("MemAvailable:"):
            return min([int(line.split()[1]) * 1024, *_left_by_limits(own_group, groups)])
    raise ConfigError("cannot tell the free memory of this machine; set --kv-cache-memory and --adapter-memory")


def _left_by_limits(own_group: Path, groups: Path) -> Iterator[int]:
    """What the limits of this process's control group and of those that it is in leave (cgroup v2). Pages of files that
    were read count as free, as for the machine."""
    with contextlib.suppress(OSError):
        own = own_group.read_text().rpartition("0::/")[2].strip()
        for group in (groups / own, *(groups / own).parents):
            with contextlib.suppress(OSError, ValueError):  # no limit: "max", or none can be
                limit = int((group / "memory.max").read_text())
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                cached = int(stat["inactive_file"]) + int(stat["active_file"])
                yield max(0, limit - int((group / "memory.current").read_text()) + cached)
