"""Logits under an adapter against PEFT's, in float32: every family and every variant of adapter that is honoured."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from server.base.spec import ModelSpec
from server.lora.batch import TokenSpan, build_lora_batch
from server.lora.pool import AdapterPool
from server.lora.weights import load_adapter
from server.model.attention import AttentionChunk, TorchAttention
from server.model.batch import ForwardBatch
from server.model.kv_cache import KVCache
from server.model.loader import load_weights
from server.model.transformer import Transformer
from tests.engine.inprocess import make_adapter
from tests.engine.test_parity import VARIANTS
from tests.model.tiny import FAMILIES, save_tiny

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_are_those_of_peft(family: str, tmp_path: Path) -> None:
    oracle = save_tiny(family, tmp_path / "base")
    spec = ModelSpec.from_config(json.loads((tmp_path / "base" / "config.json").read_text()))
    model = Transformer(spec, load_weights(tmp_path / "base", spec, torch.float32, CPU), spec.max_position)
    cache = KVCache.allocate(spec, 8, 8, torch.float32, CPU)
    attention = TorchAttention(spec.softmax_scale, spec.num_kv_heads, 8, CPU)
    ids = torch.randint(0, 199, (60,), generator=torch.Generator().manual_seed(1))
    base_logits = oracle(ids[None]).logits[0]
    for i, (name, config) in enumerate(VARIANTS.items()):
        adapter = make_adapter(oracle, tmp_path / f"a{i}", i, **config)
        packed = load_adapter(Path(adapter.path), spec, torch.float32)
        pool = AdapterPool(spec, 1 << 21, torch.float32, CPU)
        rows = pool.allocate(packed.rank)
        assert rows is not None
        pool.write(rows, packed)
        batch = ForwardBatch(
            input_ids=ids,
            positions=torch.arange(60),
            slots=torch.arange(60),
            sample_index=torch.arange(60),
            attention=attention.plan([], [AttentionChunk(0, 60, range(8))]),
            lora=build_lora_batch(pool, [], [TokenSpan(60, rows)]),
        )
        got = model.forward(batch, cache)
        net = PeftModel.from_pretrained(oracle, adapter.path).eval()
        want = net(ids[None]).logits[0]
        net.unload()
        assert (want - base_logits).abs().max() > 0.05, f"{name} has no effect to be seen"
        assert (got - want).abs().max() < 1e-4, name
