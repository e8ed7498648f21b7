"""Attention over the paged cache. A backend plans once a step, ahead of the layers, and runs once a layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from server.kernels import head_rows, paged_decode_attention, prefill_attention


@dataclass(frozen=True, slots=True)
class AttentionChunk:
    """Tokens [start, start + length) of a sequence whose tokens so far lie in `pages`, in order."""

    start: int
    length: int
    pages: Sequence[int]

    @property
    def num_keys(self) -> int:
        return self.start + self.length


class AttentionPlan(Protocol):
    """One step's attention, ready to run for any layer."""

    def run(self, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        """q [n, heads, d] → [n, heads, d]; the caches [slots, kv_heads, d] hold the batch's own K and V already."""
        ...


class AttentionBackend(Protocol):
    """Makes plans; the chunks are in the order of the batch's tokens, decodes (length 1) first."""

    def plan(self, decodes: Sequence[AttentionChunk], prefills: Sequence[AttentionChunk]) -> AttentionPlan: ...


class DecodeBucket(Protocol):
    """Decode attention of a fixed number of sequences, at the same addresses every step: for CUDA graphs."""

    @property
    def plan(self) -> AttentionPlan: ...

    def update(self, chunks: Sequence[AttentionChunk]) -> None:
        """Attend for these from now on, and harmlessly for the rows beyond them. The caller waits until the copies of
        the update before have left the host."""
        ...


@dataclass(frozen=True, slots=True)
class _Prefill:
    """`length` queries over `slots` [keys] under `mask` [length, keys]; None: the whole sequence, causal."""

    length: int
    slots: Tensor
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class TorchAttentionPlan:
    """Decodes as one padded batch, prefills one by one."""

    scale: float
    num_decodes: int
    decode_rows: Tensor
    decode_mask: Tensor
    prefills: list[_Prefill]

    def run(self, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        n = self.num_decodes
        if n == len(q):
            return paged_decode_attention(q, k_cache, v_cache, self.decode_rows, self.decode_mask, self.scale)
        out = torch.empty_like(q)
        if n:
            out[:n] = paged_decode_attention(q[:n], k_cache, v_cache, self.decode_rows, self.decode_mask, self.scale)
        for chunk in self.prefills:
            rows = slice(n, n + chunk.length)
            keys, values = k_cache.index_select(0, chunk.slots), v_cache.index_select(0, chunk.slots)
            out[rows] = prefill_attention(q[rows], keys, values, chunk.mask, self.scale)
            n = rows.stop
        return out


class TorchAttention:
    """The reference backend: plain torch, any device."""

    def __init__(self, scale: float, kv_heads: int, page_size: int, device: torch.device) -> None:
        self._scale = scale
        self._kv_heads = kv_heads
        self._device = device
        self._page_size = page_size

    def plan(self, decodes: Sequence[AttentionChunk], prefills: Sequence[AttentionChunk]) -> TorchAttentionPlan:
        lengths = torch.tensor([chunk.num_keys for chunk in decodes], dtype=torch.int64)
        longest = int(lengths.max()) if decodes else 0
        num_pages = -(-longest // self._page_size)
        tables = [[*chunk.pages[:num_pages], *[0] * (num_pages - len(chunk.pages))] for chunk in decodes]
        slots = self._slots(torch.tensor(tables, dtype=torch.int64).view(len(decodes), num_pages), longest)
        mask = torch.arange(longest) < lengths[:, None]  # [n, t]
        return TorchAttentionPlan(
            scale=self._scale,
            num_decodes=len(decodes),
            decode_rows=head_rows(slots, self._kv_heads).to(self._device),
            decode_mask=mask[:, None, None, :].to(self._device),
            prefills=[self._prefill(chunk) for chunk in prefills],
        )

    def _prefill(self, chunk: AttentionChunk) -> _Prefill:
        """Query i of the chunk sees keys up to start + i."""
        slots = self._slots(torch.tensor([chunk.pages], dtype=torch.int64), chunk.num_keys)[0].to(self._device)
        if chunk.start == 0:
            return _Prefill(chunk.length, slots, None)
        queries = torch.arange(chunk.start, chunk.num_keys)
        mask = torch.arange(chunk.num_keys) <= queries[:, None]
        return _Prefill(chunk.length, slots, mask.to(self._device))

    def _slots(self, tables: Tensor, num_keys: int) -> Tensor:
        """Page tables [n, pages] → cache slots [n, num_keys]."""
        slots = tables[:, :, None] * self._page_size + torch.arange(self._page_size)
        return slots.flatten(1)[:, :num_keys]


def page_tables(chunks: Sequence[AttentionChunk], page_size: int) -> tuple[list[int], list[int], list[int]]:
    """All pages in a row, where each chunk's begin (and the end), and how many tokens its last page holds."""
    pages: list[int] = []
    page_start = [0]
    last_page: list[int] = []
    for chunk in chunks:
        pages += chunk.pages[: -(-chunk.num_keys // page_size)]
        page_start.append(len(pages))
        last_page.append((chunk.num_keys - 1) % page_size + 1)
    return pages, page_start, last_page
