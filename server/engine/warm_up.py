"""Launches once whatever kernels a step may launch, so that none is compiled or loaded while requests wait.

Decode steps that are captured have run by then (`server.engine.graphs`); these are the others.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from server.engine.messages import SamplingParams
from server.engine.sampler import Sampler
from server.lora.batch import TokenSpan, build_lora_batch
from server.lora.pool import AdapterPool
from server.model.attention import AttentionBackend, AttentionChunk
from server.model.batch import ForwardBatch
from server.model.kv_cache import KVCache
from server.model.transformer import LayerWeights, Transformer

_SAMPLINGS = (
    SamplingParams(temperature=0.0, seed=0, logprobs=5),
    SamplingParams(temperature=1.0, seed=0),
    SamplingParams(temperature=1.0, seed=0, top_k=40),
    SamplingParams(temperature=1.0, seed=0, top_p=0.9),
    SamplingParams(temperature=1.0, seed=0, top_k=40, top_p=0.9, min_p=0.1),
    SamplingParams(temperature=1.0, seed=0, repetition_penalty=1.1, frequency_penalty=0.1, presence_penalty=0.1),
)


def row_counts(most: int) -> list[int]:
    """Numbers of tokens up to `most`: one of each span of eight up to 512 at either end, so that kernels which change
    at some multiple of eight are met on both sides."""
    spans = [n for first in range(8, 520, 8) for n in (first, first + 1)]
    return sorted({n for n in (*range(1, 8), *spans, most) if n <= most})


@torch.inference_mode()
def warm_up(
    model: Transformer,
    cache: KVCache,
    attention: AttentionBackend,
    pool: AdapterPool,
    max_tokens: int,
    max_seqs: int,
) -> None:
    """Run steps of one layer over up to `max_tokens` tokens, no more than the cache has room for, with and without an
    adapter, and every way to draw for `max_seqs` rows. What they write to the cache's first pages is nobody's."""
    device = cache.k.device
    if pool.is_cuda:
        from server.lora.gpu_batch import warm_up as warm_up_low_rank

        warm_up_low_rank(pool)
    counts = row_counts(max_tokens)
    ids = torch.zeros(counts[-1], dtype=torch.int64, device=device)
    slots = torch.arange(counts[-1], device=device)
    adapters = [None, ((0, min(16, pool.num_rows)),)] if pool.num_rows else [None]
    for layer in _kinds(model.weights.layers):
        one = Transformer(model.spec, replace(model.weights, layers=(layer,)), counts[-1])
        for n in counts:
            chunk = AttentionChunk(0, n, range(-(-n // cache.page_size)))
            for rows in adapters:
                batch = ForwardBatch(
                    input_ids=ids[:n],
                    positions=slots[:n],
                    slots=slots[:n],
                    sample_index=slots[: min(n, max_seqs)],
                    attention=attention.plan([], [chunk]),
                    lora=build_lora_batch(pool, [], [TokenSpan(n, rows)]),
                )
                logits = one.forward(batch, cache)
                if device.type == "cuda":  # a plan's tables leave the host before the next plan is made
                    torch.cuda.synchronize(device)
    _draw(logits)


def _draw(logits: Tensor) -> None:
    rows = range(len(logits))
    sampler = Sampler(len(logits), logits.shape[1], logits.device)
    for params in _SAMPLINGS:
        for row in rows:
            sampler.admit(row, params, [0], [0])
        sampler.sample(logits, rows, [1] * len(rows))


def _kinds(layers: Sequence[LayerWeights]) -> list[LayerWeights]:
    """One layer of each combination of formats."""
    kinds = {
        tuple((type(linear), linear.num_bytes) for linear in (layer.qkv, layer.o, layer.gate_up, layer.down)): layer
        for layer in layers
    }
    return list(kinds.values())
