"""Whose CPU time a load takes: the server's processes', the load generator's, everyone else's on the machine."""

import os
import resource
import time
from collections.abc import Mapping
from pathlib import Path

from loadtest.serving import Server

PROCESSES = "lorikeet_process_cpu_seconds_total"
WALL, MACHINE, GENERATOR, OTHERS = "wall", "machine", "generator", "others"

# Of /proc/stat's first line, by proc(5): user, nice, system, irq, softirq. Neither idle, iowait nor guests' (in user).
_BUSY = (1, 2, 3, 6, 7)


def cpu_seconds(server: Server) -> dict[str, float]:
    """So far: of the server's processes by their names, of our own processes that have ended and this one, of the
    machine (where it is a Linux), and the time itself."""
    found = {sample.labels["process"]: sample.value for sample in server.samples() if sample.name == PROCESSES}
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_CHILDREN, resource.RUSAGE_SELF)]
    found[GENERATOR] = sum(usage.ru_utime + usage.ru_stime for usage in usages)
    stat = Path("/proc/stat")
    if stat.exists():
        fields = stat.read_text().split("\n", 1)[0].split()
        found[MACHINE] = sum(int(fields[i]) for i in _BUSY) / os.sysconf("SC_CLK_TCK")
    return found | {WALL: time.monotonic()}


def cores(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """How many cores each has kept busy in between; `others` is what the machine did beside."""
    seconds = after[WALL] - before[WALL]
    used = {name: (after[name] - before[name]) / seconds for name in before if name in after and name != WALL}
    machine = used.pop(MACHINE, None)
    if machine is not None:
        used[OTHERS] = max(0.0, machine - sum(used.values()))
    return {name: round(value, 3) for name, value in used.items()}
