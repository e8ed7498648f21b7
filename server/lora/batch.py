"""Which tokens of a step have which adapter, and the term that they add: one form for CPUs, one for GPUs."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from server.lora.pool import AdapterPool, Ranges


class TokenSpan(NamedTuple):
    """`length` tokens that follow each other in the batch and share an adapter; `rows` None is the base."""

    length: int
    rows: Ranges | None

    @property
    def rank(self) -> int:
        """Rank rows of the adapter; 0 for the base."""
        return sum(stop - start for start, stop in self.rows or ())


class LowRankTerm(Protocol):
    """What the adapters of a batch add to its linear layers."""

    def add(self, y: Tensor, x: Tensor, group: str, layer: int) -> None:
        """y [n, out] += the low-rank term of x [n, in], in place, for one fused product of one layer."""
        ...

    def silu_mul(self, y: Tensor, x: Tensor, layer: int) -> Tensor:
        """silu(gate) · up [n, i] of y [n, 2 · i], one layer's gate and up products of x [n, in], with their low-rank
        terms; y is used up."""
        ...


def build_lora_batch(
    pool: AdapterPool, decodes: Sequence[TokenSpan], prefills: Sequence[TokenSpan]
) -> LowRankTerm | None:
    """None when no token has an adapter. Decodes come first in the batch and have length 1."""
    spans = [*decodes, *prefills]
    if pool.is_cuda:
        from server.lora.gpu_batch import build_gpu_lora_batch

        return build_gpu_lora_batch(pool, spans)
    if all(span.rows is None for span in spans):
        return None
    from server.lora.cpu_batch import build_cpu_lora_batch  # its kernel's compiler takes a while to load

    return build_cpu_lora_batch(pool, spans)
