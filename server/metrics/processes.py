"""Memory and CPU time of the processes, read from /proc."""

import os
from collections.abc import Iterable
from pathlib import Path

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector


class Processes(Collector):
    """Those of the two processes, when the page is asked for."""

    def __init__(self) -> None:
        self.pids = {"frontend": os.getpid()}

    def collect(self) -> Iterable[Metric]:
        memory = GaugeMetricFamily(
            "lorikeet_process_resident_memory_bytes", "Resident memory of a process, in bytes.", labels=["process"]
        )
        cpu = CounterMetricFamily(
            "lorikeet_process_cpu_seconds", "CPU time of a process, in seconds.", labels=["process"]
        )
        for process, pid in tuple(self.pids.items()):  # an engine may start meanwhile
            try:
                resident, seconds = _read_process(pid)
            except (OSError, IndexError, ValueError):  # it ended, or this is no Linux
                continue
            memory.add_metric([process], resident)
            cpu.add_metric([process], seconds)
        return [memory, cpu]


def _read_process(pid: int) -> tuple[float, float]:
    """Resident bytes and CPU seconds of a process (proc(5): statm field 2, stat fields 14 and 15)."""
    proc = Path(f"/proc/{pid}")
    pages = int((proc / "statm").read_text().split()[1])
    fields = (proc / "stat").read_text().rpartition(")")[2].split()  # after the name: from field 3 on
    ticks = int(fields[11]) + int(fields[12])
    return pages * float(os.sysconf("SC_PAGE_SIZE")), ticks / os.sysconf("SC_CLK_TCK")
