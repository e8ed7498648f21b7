"""The KV cache's tensors. Which page belongs to whom is `server.engine.pages`' matter."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from server.base.spec import ModelSpec
from server.kernels import reserve


@dataclass(frozen=True, slots=True)
class KVCache:
    """k and v [layers, num_pages · page_size, kv_heads, head_dim]; page p is slots p·page_size and on."""

    k: Tensor
    v: Tensor
    page_size: int

    @classmethod
    def allocate(
        cls, spec: ModelSpec, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> Self:
        shape = (spec.num_layers, num_pages * page_size, spec.num_kv_heads, spec.head_dim)
        return cls(reserve(shape, dtype, device), reserve(shape, dtype, device), page_size)

    @property
    def num_bytes(self) -> int:
        return 2 * self.k.numel() * self.k.element_size()
