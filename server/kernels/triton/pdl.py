"""Programmatic dependent launch: a kernel starts before the one ahead of it has ended, and waits when it must.

A kernel launched so runs what needs nothing of its predecessors (weights, tables) and then waits until all of them
are over. Every program of it has to wait, also one that does nothing: what follows counts on what precedes it.
CUDA programming guide, "Programmatic Dependent Launch and Synchronization".
"""

from functools import cache

import torch
import triton

_MEASURED = (9, 0)  # there a decode step of one sequence is 100 µs shorter for it, and one of 64 no longer


def launches_early(device: torch.device) -> bool:
    """Whether kernels on this device are launched so."""
    return device.type == "cuda" and not triton.knobs.runtime.interpret and _has_pdl(device)


@cache
def _has_pdl(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) == _MEASURED
