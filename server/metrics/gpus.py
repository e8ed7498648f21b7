"""Memory of the GPUs, as the driver tells it through NVML (package nvidia-ml-py). No driver, no series."""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import pynvml
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """Of one GPU, in bytes; `gpu` is its number as the engine counts, which is CUDA's: cuda:0 is "0"."""

    gpu: str
    used: int
    total: int


Driver = Callable[[], list[GpuMemory]]


class NvidiaDriver:
    """Asks NVML, which is begun with the first question; used from one thread at a time."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._visible = environment.get("CUDA_VISIBLE_DEVICES")
        self._handles: list[object] | None = None

    def __call__(self) -> list[GpuMemory]:
        """Every GPU that this process may see; none where there is no driver, or it does not answer."""
        try:
            if self._handles is None:
                self._handles = self._find()
            found = [pynvml.nvmlDeviceGetMemoryInfo(handle) for handle in self._handles]
        except pynvml.NVMLError:
            self._handles = self._handles or []
            return []
        return [GpuMemory(str(i), int(memory.used), int(memory.total)) for i, memory in enumerate(found)]

    def _find(self) -> list[object]:
        """In CUDA's order: CUDA_VISIBLE_DEVICES' of numbers and UUIDs, up to the first that is neither."""
        pynvml.nvmlInit()
        if self._visible is None:
            return [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        handles: list[object] = []
        for name in self._visible.split(","):
            try:
                if name.strip().isdigit():
                    handles.append(pynvml.nvmlDeviceGetHandleByIndex(int(name)))
                else:
                    handles.append(pynvml.nvmlDeviceGetHandleByUUID(name.strip()))
            except pynvml.NVMLError:
                break
        return handles


class Gpus(Collector):
    """What the driver says, and what the engine holds of it by kind, when the page is asked for."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self.engine_gpu: str | None = None  # None: the engine is not on a GPU, or there is none
        self.engine_memory: Mapping[str, int] = {}

    def collect(self) -> Iterable[Metric]:
        gpus = self._driver()
        if not gpus:
            return
        used = _gauge("gpu_memory_used_bytes", "Memory of a GPU in use by anyone, in bytes, by the driver.", "gpu")
        total = _gauge("gpu_memory_total_bytes", "Memory of a GPU, in bytes, by the driver.", "gpu")
        kinds = _gauge(
            "gpu_memory_bytes",
            "Memory of the engine's GPU by use, in bytes; `other` is all else that the driver says is in use there.",
            *("gpu", "kind"),
        )
        for gpu in gpus:
            used.add_metric([gpu.gpu], gpu.used)
            total.add_metric([gpu.gpu], gpu.total)
            if gpu.gpu == self.engine_gpu and self.engine_memory:
                for kind, size in self.engine_memory.items():
                    kinds.add_metric([gpu.gpu, kind], size)
                kinds.add_metric([gpu.gpu, "other"], max(0, gpu.used - sum(self.engine_memory.values())))
        yield from (used, total, kinds)


def gpu_of(device: str) -> str | None:
    """The number in the engine's "cuda:1"; None where it is on no GPU."""
    kind, _, number = device.partition(":")
    return (number or "0") if kind == "cuda" else None


def _gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"lorikeet_{name}", text, labels=labels)
