"""What a GPU's memory goes to, measured: the largest step before the KV cache is set aside, and everything after.

Imported only where a GPU is used.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from server.base.memory import GRAPHS_BYTES, SLACK
from server.engine.messages import SamplingParams
from server.engine.sampler import Sampler
from server.lora.batch import TokenSpan, build_lora_batch
from server.lora.pool import AdapterPool
from server.model.attention import AttentionChunk
from server.model.batch import ForwardBatch
from server.model.flashinfer_attention import FlashInferAttention
from server.model.kv_cache import KVCache
from server.model.transformer import Transformer


class DeviceMemory:
    """One GPU's memory since before anything of the engine was on it, but for the CUDA context."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._counted = 0
        torch.cuda.init()
        self._reserved_at_first = torch.cuda.memory_reserved(device)
        self._free_at_first, self._total = torch.cuda.mem_get_info(device)

    @contextmanager
    def counted(self) -> Iterator[None]:
        """What is allocated here, and stays, is of a kind that is counted by itself: it is no workspace."""
        before = torch.cuda.memory_allocated(self._device)
        yield
        self._counted += torch.cuda.memory_allocated(self._device) - before

    def left_for_kv(self, worst_step: int) -> int:
        """Bytes for the KV cache beside a worst step that takes `worst_step` more than what is there now."""
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self._device)
        return max(0, int(free - worst_step - GRAPHS_BYTES - SLACK * self._total))

    def by_kind(self, known: dict[str, int]) -> dict[str, int]:
        """`known` kinds, each as its tensors' sizes say, and what else the engine has: `workspace` is what torch holds
        but for what was `counted`, for steps and graphs; `runtime` are libraries and kernels, which only the driver
        sees."""
        torch.cuda.synchronize(self._device)
        free, _ = torch.cuda.mem_get_info(self._device)
        reserved = torch.cuda.memory_reserved(self._device) - self._reserved_at_first
        runtime = max(0, self._free_at_first - free - reserved)
        return known | {"workspace": reserved - self._counted, "runtime": runtime}


@torch.inference_mode()
def worst_step_bytes(
    model: Transformer, pool: AdapterPool, page_size: int, max_model_len: int, max_tokens: int, max_seqs: int
) -> int:
    """What a step of `max_tokens` prompt tokens, with adapters, takes at its peak, with a draw for `max_seqs` rows
    that penalises and sorts the vocabulary, beside weights, adapters and KV: it is run. Compiles the prefill
    kernels."""
    spec, embedding = model.spec, model.weights.embedding
    device = embedding.device
    num_pages = -(-max_tokens // page_size) + 1
    cache = KVCache.allocate(spec, num_pages, page_size, embedding.dtype, device)
    attention = FlashInferAttention(spec, page_size, num_pages, embedding.dtype, device)
    chunks = [
        AttentionChunk(0, min(max_model_len, max_tokens - first), _pages(first, max_tokens, page_size))
        for first in range(0, max_tokens, max_model_len)
    ]
    positions = torch.cat([torch.arange(chunk.length, device=device) for chunk in chunks])
    rows = ((0, min(16, pool.num_rows)),) if pool.num_rows else None
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    sampler = Sampler(max_seqs, spec.vocab_size, device)
    dearest = SamplingParams(temperature=1.0, top_p=0.9, repetition_penalty=1.1, frequency_penalty=0.1, seed=0)
    for row in range(max_seqs):
        sampler.admit(row, dearest, [], [])
    logits = model.forward(
        ForwardBatch(
            input_ids=torch.zeros(max_tokens, dtype=torch.int64, device=device),
            positions=positions,
            slots=torch.arange(max_tokens, device=device),
            sample_index=torch.zeros(max_seqs, dtype=torch.int64, device=device),
            attention=attention.plan([], chunks),
            lora=build_lora_batch(pool, [], [TokenSpan(max_tokens, rows)]),
        ),
        cache,
    )
    sampler.sample(logits, range(max_seqs), [0] * max_seqs)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _pages(first: int, max_tokens: int, page_size: int) -> list[int]:
    """Pages of a sequence whose first token is at slot `first`, rounded down to a page."""
    return list(range(first // page_size, -(-max_tokens // page_size) + 1))
