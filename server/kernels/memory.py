"""Large buffers that cost only what is used of them."""

import math
import mmap

import torch
from torch import Tensor


def reserve(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A zeroed tensor. On a CPU it is an anonymous mapping: the operating system backs a page of it with memory
    once it is written, whereas `torch.zeros` writes all of it."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or num_bytes == 0:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=dtype).view(shape)
