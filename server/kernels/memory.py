"""Large buffers that cost only what is used of them."""

import contextlib
import math
import mmap

import torch
from torch import Tensor


def reserve(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, is_sparse: bool = True) -> Tensor:
    """A zeroed tensor. On a CPU it is an anonymous mapping: the operating system backs a page of it with memory
    once it is written, whereas `torch.zeros` writes all of it. What is not `is_sparse` will soon be written to its
    end: it asks for huge pages, as taking 4 KiB at a time costs several times what writing them does."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or num_bytes == 0:
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if not is_sparse and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
