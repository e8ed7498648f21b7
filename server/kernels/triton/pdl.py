"""Programmatic dependent launch: a kernel starts before the one ahead of it has ended, and waits when it must.

A kernel launched so runs what needs nothing of its predecessors (weights, tables) and then waits until all of them
are over. One program of it at least has to wait, also where none does anything: what follows counts on what precedes.
CUDA programming guide, "Programmatic Dependent Launch and Synchronization".
"""

from functools import cache

import torch
import triton

_MEASURED = (9, 0)  # there a decode step of one sequence is 100 µs shorter for it, and one of 64 no longer
_MAX_ROWS = 256  # beyond, programs that wait take the places of those that they wait for


def launches_early(device: torch.device, num_rows: int) -> bool:
    """Whether kernels over so many rows are launched so on this device."""
    if device.type != "cuda" or num_rows > _MAX_ROWS or triton.knobs.runtime.interpret:
        return False
    return _has_pdl(device)


@cache
def _has_pdl(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) == _MEASURED
