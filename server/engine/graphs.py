"""Decode steps as CUDA graphs: captured for a ladder of batch sizes, with and without LoRA, and replayed.

A graph reads its inputs at fixed addresses: `run` writes them, plans the attention, and replays the smallest graph
that holds the batch. Rows beyond the batch compute on a spare page of the cache and are thrown away. The token that
each row decodes is read from the sampler's last tokens, so no step waits for the host to know it; the likeliest token
of each row is put there, for the sampler to leave or to replace.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from server.engine.sampler import Sampler
from server.kernels.triton.argmax import argmax_rows
from server.lora.batch import TokenSpan
from server.lora.gpu_batch import GRAPH_MAX_RANK, GpuLoraTables, warm_up
from server.lora.pool import AdapterPool
from server.model.attention import AttentionChunk, DecodeBucket
from server.model.batch import ForwardBatch
from server.model.flashinfer_attention import FlashInferAttention
from server.model.kv_cache import KVCache
from server.model.transformer import Transformer

BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256)


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    logits: Tensor  # [bucket, vocab]
    likeliest: Tensor  # [bucket]


class DecodeGraphs:
    """All graphs of one engine. Their buffers are shared: one graph runs at a time, in one stream."""

    def __init__(
        self,
        model: Transformer,
        cache: KVCache,
        attention: FlashInferAttention,
        sampler: Sampler,
        pool: AdapterPool,
        max_num_seqs: int,
        progress: Callable[[str], None],
    ) -> None:
        self._model = model
        self._cache = cache
        self._sampler = sampler
        self._device = cache.k.device
        self._spare_slot = attention.num_pages * attention.page_size
        sizes = [size for size in BUCKETS if size < max_num_seqs] + [min(max_num_seqs, BUCKETS[-1])]
        self.max_batch = sizes[-1]
        # Rows of the sampler, positions and cache slots of each token.
        self._inputs = torch.zeros(3, self.max_batch, dtype=torch.int64, device=self._device)
        self._inputs_host = torch.zeros(3, self.max_batch, dtype=torch.int64, pin_memory=True)
        self._lora = GpuLoraTables(pool, sizes)
        self._copied = torch.cuda.Event()
        self._buckets: dict[int, DecodeBucket] = {}
        self._graphs: dict[tuple[int, bool], _Captured] = {}
        progress("compiling or loading the low-rank kernels")
        warm_up(pool)
        memory = None
        for size in reversed(sizes):
            progress(f"capturing decode graphs, {size} sequences")
            self._buckets[size] = attention.decode_bucket(size)
            for with_lora in (False, True):
                memory = self._capture(size, with_lora, memory)

    def holds(self, spans: Sequence[TokenSpan]) -> bool:
        """Whether some graph serves a decode batch of these adapters."""
        return len(spans) <= self.max_batch and all(span.rank <= GRAPH_MAX_RANK for span in spans)

    @torch.inference_mode()
    def run(
        self, rows: Sequence[int], chunks: Sequence[AttentionChunk], slots: Sequence[int], spans: Sequence[TokenSpan]
    ) -> tuple[Tensor, Tensor]:
        """Logits [n, vocab] and likeliest tokens [n] of n decodes; valid until the next call."""
        n = len(rows)
        size = min(size for size in self._buckets if size >= n)
        self._copied.synchronize()  # the copies of the step before have left the host's buffers
        padding = size - n
        self._inputs_host[:, :size] = torch.tensor(
            [
                [*rows, *[self._sampler.spare_row] * padding],
                [*(chunk.start for chunk in chunks), *[0] * padding],
                [*slots, *[self._spare_slot] * padding],
            ]
        )
        self._inputs.copy_(self._inputs_host, non_blocking=True)
        self._buckets[size].update(chunks)
        with_lora = any(span.rows is not None for span in spans)
        if with_lora:
            self._lora.update(spans, size)
        self._copied.record()
        captured = self._graphs[size, with_lora]
        captured.graph.replay()
        return captured.logits[:n], captured.likeliest[:n]

    @torch.inference_mode()
    def _capture(self, size: int, with_lora: bool, memory: Any) -> Any:
        """Capture one graph into the memory pool `memory` (None: a new one); the pool, which all graphs share."""
        self._inputs[0] = self._sampler.spare_row
        self._inputs[1] = 0
        self._inputs[2] = self._spare_slot
        self._buckets[size].update([])
        self._lora.update([TokenSpan(1, None)] * size, size)
        torch.cuda.synchronize(self._device)
        # Kernels compile and libraries allocate on a first run, which no graph may hold.
        self._forward(size, with_lora)
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=memory):
            logits, likeliest = self._forward(size, with_lora)
        self._graphs[size, with_lora] = _Captured(graph, logits, likeliest)
        return graph.pool()

    def _forward(self, size: int, with_lora: bool) -> tuple[Tensor, Tensor]:
        rows, positions, slots = (row[:size] for row in self._inputs)
        batch = ForwardBatch(
            input_ids=self._sampler.last_tokens[rows],
            positions=positions,
            slots=slots,
            sample_index=None,
            attention=self._buckets[size].plan,
            lora=self._lora.term(size) if with_lora else None,
        )
        logits = self._model.forward(batch, self._cache)
        likeliest = argmax_rows(logits)
        self._sampler.last_tokens[rows] = likeliest
        return logits, likeliest
