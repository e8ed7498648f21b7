"""Large buffers that cost only what is used of them."""

import contextlib
import math
import mmap
from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from server.errors import DoesNotFit

HUGE_PAGE = 2 << 20  # bytes


def reserve(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, is_sparse: bool = True) -> Tensor:
    """A zeroed tensor. On a CPU it is an anonymous mapping: the operating system backs a page of it with memory
    once it is written, whereas `torch.zeros` writes all of it. What is not `is_sparse` will soon be written to its
    end: it asks for huge pages, as taking 4 KiB at a time costs several times what writing them does. Linux aligns
    to them what is a multiple of their size. Raises DoesNotFit."""
    size = math.prod(shape)
    num_bytes = size * dtype.itemsize
    if device.type != "cpu" or num_bytes == 0:
        return torch.zeros(shape, dtype=dtype, device=device)
    if not is_sparse:
        num_bytes = -(-num_bytes // HUGE_PAGE) * HUGE_PAGE
    try:
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise DoesNotFit(
            f"{num_bytes / 2**30:.1f} GiB of memory cannot be set aside ({error.strerror}); lower --kv-cache-memory, "
            "--adapter-memory or --host-adapter-memory"
        ) from error
    if not is_sparse and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=size).view(shape)


class Scratch:
    """Host memory that is used again: taking new pages costs several times what writing them does."""

    def __init__(self, max_kept: int = 64 << 20) -> None:
        self._max_kept = max_kept  # bytes of a buffer: larger ones are given back to the operating system
        self._free: deque[Tensor] = deque(maxlen=2)

    @contextlib.contextmanager
    def take(self, num_bytes: int) -> Iterator[Tensor]:
        """Bytes of anything, for one user at a time; safe from any thread."""
        try:
            buffer = self._free.pop()
        except IndexError:
            buffer = torch.empty(0, dtype=torch.uint8)
        if buffer.numel() < num_bytes:
            buffer = reserve((num_bytes,), torch.uint8, torch.device("cpu"), is_sparse=False)
        yield buffer[:num_bytes]
        if buffer.numel() <= self._max_kept:
            self._free.append(buffer)
