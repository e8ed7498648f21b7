"""Captured batches' decode attention in the whole model, against transformers; on a CPU by Triton's interpreter."""

import json
from pathlib import Path

import pytest
import torch

from tests.kernels.triton_device import DEVICE  # isort: skip  (first: it sets the interpreter up)
from server.base.spec import ModelSpec
from server.kernels import linear
from server.kernels.triton import layer as triton_layer
from server.kernels.triton.attention import DecodePlan
from server.model import transformer
from server.model.attention import AttentionChunk, TorchAttention
from server.model.batch import ForwardBatch
from server.model.kv_cache import KVCache
from server.model.loader import load_weights
from server.model.paged_decode import PagedDecodeBucket
from server.model.transformer import Transformer
from tests.model.tiny import save_tiny

PAGE = 8
SPARE = 24


@torch.inference_mode()
def test_decodes_of_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three sequences, then two, in a bucket of four, whose other rows compute on the spare page. All fused work of
    their layers is by Triton, wherever this runs."""
    oracle = save_tiny("qwen3", tmp_path)
    device = torch.device(DEVICE)
    spec = ModelSpec.from_config(json.loads((tmp_path / "config.json").read_text()))
    model = Transformer(spec, load_weights(tmp_path, spec, torch.float32, device), spec.max_position)
    cache = KVCache.allocate(spec, SPARE + 1, PAGE, torch.float32, device)
    attention = TorchAttention(spec.softmax_scale, spec.num_kv_heads, PAGE, device)
    bucket = PagedDecodeBucket(spec, DecodePlan(16, 1, 1), 4, PAGE, SPARE, SPARE, 4, device)
    generator = torch.Generator().manual_seed(0)
    lengths = [50, 3, 16]
    pages = [[5, 0, 23, 9, 11, 2, 3], [7], [1, 6, 20]]
    ids = [torch.randint(0, 199, (length + 2,), generator=generator) for length in lengths]
    want = [oracle(tokens[None]).logits[0] for tokens in ids]

    def on_device(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, device=device)

    def slot(sequence: int, position: int) -> int:
        return pages[sequence][position // PAGE] * PAGE + position % PAGE

    for i, length in enumerate(lengths):
        plan = attention.plan([], [AttentionChunk(0, length, pages[i])])
        slots = on_device([slot(i, position) for position in range(length)])
        chunk = ids[i][:length].to(device)
        model.forward(ForwardBatch(chunk, torch.arange(length, device=device), slots, None, plan, None), cache)
    for name in ("add_rms_norm", "rope_and_store"):
        monkeypatch.setattr(transformer, name, getattr(triton_layer, name))
    monkeypatch.setattr(linear, "silu_mul", triton_layer.silu_mul)
    for step, sequences in enumerate([[0, 1, 2], [2, 0]]):
        at = [lengths[i] + step for i in sequences]
        bucket.update([AttentionChunk(position, 1, pages[i]) for i, position in zip(sequences, at, strict=True)])
        padding = [0] * (4 - len(sequences))
        batch = ForwardBatch(
            input_ids=on_device([int(ids[i][p]) for i, p in zip(sequences, at, strict=True)] + padding),
            positions=on_device(at + padding),
            slots=on_device([slot(i, p) for i, p in zip(sequences, at, strict=True)] + [SPARE * PAGE for _ in padding]),
            sample_index=None,
            attention=bucket.plan,
            lora=None,
        )
        logits = model.forward(batch, cache).cpu()
        assert logits.isfinite().all()
        for row, (i, position) in enumerate(zip(sequences, at, strict=True)):
            assert (logits[row] - want[i][position]).abs().max() < 1e-4, f"step {step}, sequence {i}"
