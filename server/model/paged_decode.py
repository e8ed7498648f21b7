"""Decode attention of captured batches by the Triton kernel of `kernels.triton.attention`."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from server.base.spec import ModelSpec
from server.kernels.triton.attention import (
    RUN_FIELDS,
    DecodePlan,
    DecodeScratch,
    DecodeTables,
    cut_runs,
    max_runs,
    paged_decode,
)
from server.model.attention import AttentionChunk, page_tables

PROGRAMS_PER_CORE = 4


@dataclass(frozen=True, slots=True)
class PagedDecodePlan:
    """Decode attention over the sequences of `tables`."""

    tables: DecodeTables
    scratch: DecodeScratch
    page_size: int
    scale: float
    plan: DecodePlan

    def run(self, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        return paged_decode(q, k_cache, v_cache, self.tables, self.scratch, self.page_size, self.scale, self.plan)


class PagedDecodeBucket:
    """Tables of a decode batch of `batch` sequences at fixed addresses; see `model.attention.DecodeBucket`.

    `max_pages` is the most that a sequence has; page `spare_page` belongs to nobody. `cores` are multiprocessors.
    """

    def __init__(
        self,
        spec: ModelSpec,
        plan: DecodePlan,
        batch: int,
        page_size: int,
        max_pages: int,
        spare_page: int,
        cores: int,
        device: torch.device,
    ) -> None:
        self._batch = batch
        self._kv_heads = spec.num_kv_heads
        self._programs = cores * PROGRAMS_PER_CORE
        self._padding = AttentionChunk(0, 1, (spare_page,))
        num_runs = max_runs(batch, spec.num_kv_heads, self._programs)
        self._runs_size = num_runs * RUN_FIELDS
        # The runs, then the pages: one copy a step.
        size = self._runs_size + batch * max_pages
        self._packed = torch.zeros(size, dtype=torch.int32, device=device)
        self._host = torch.zeros(size, dtype=torch.int32, pin_memory=device.type == "cuda")
        runs, pages = self._packed.split([self._runs_size, batch * max_pages])
        heads = (spec.num_heads, spec.num_kv_heads, spec.head_dim)
        self.plan = PagedDecodePlan(
            tables=DecodeTables(pages, runs.view(num_runs, RUN_FIELDS)),
            scratch=DecodeScratch.allocate(batch, num_runs, *heads, device),
            page_size=page_size,
            scale=spec.softmax_scale,
            plan=plan,
        )

    def update(self, chunks: Sequence[AttentionChunk]) -> None:
        """Write the tables of these decodes; rows beyond them attend to one token of the spare page."""
        padded = [*chunks, *[self._padding] * (self._batch - len(chunks))]
        pages, page_start, _ = page_tables(padded, self.plan.page_size)
        num_keys = [chunk.num_keys for chunk in padded]
        runs = cut_runs(num_keys, page_start[:-1], self._kv_heads, self.plan.plan, self._programs)
        values = [value for run in runs for value in run]
        values += [0] * (self._runs_size - len(values))
        values += pages
        self._host[: len(values)] = torch.tensor(values, dtype=torch.int32)
        self._packed[: len(values)].copy_(self._host[: len(values)], non_blocking=True)
