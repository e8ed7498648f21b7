"""The forward pass against transformers: every family, chunked, over scattered pages."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from server.base.quantization import Quantization
from server.base.spec import ModelSpec
from server.errors import BaseModelError
from server.kernels import linear
from server.kernels.triton.gemv_plans import MAX_ROWS, GemvPlan
from server.model.attention import AttentionChunk, TorchAttention
from server.model.batch import ForwardBatch
from server.model.kv_cache import KVCache
from server.model.loader import load_weights
from server.model.transformer import Transformer
from tests.model.tiny import FAMILIES, save_tiny

PAGE = 8
CPU = torch.device("cpu")


def load(
    directory: Path, dtype: torch.dtype = torch.float32, quantization: Quantization | None = None
) -> tuple[Transformer, KVCache]:
    spec = ModelSpec.from_config(json.loads((directory / "config.json").read_text()))
    model = Transformer(spec, load_weights(directory, spec, dtype, CPU, quantization), spec.max_position)
    return model, KVCache.allocate(spec, 32, PAGE, dtype, CPU)


def logits_in_chunks(model: Transformer, cache: KVCache, ids: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Logits [len(ids), vocab] of one sequence computed in chunks of the given lengths, on scattered pages."""
    pages = torch.randperm(32, generator=torch.Generator().manual_seed(3)).tolist()
    slots = torch.tensor([pages[p // PAGE] * PAGE + p % PAGE for p in range(len(ids))])
    attention = TorchAttention(model.spec.softmax_scale, model.spec.num_kv_heads, PAGE, CPU)
    logits, start = [], 0
    for length in lengths:
        stop = start + length
        chunk = AttentionChunk(start, length, pages[: -(-stop // PAGE)])
        plan = attention.plan([chunk], []) if length == 1 else attention.plan([], [chunk])
        batch = ForwardBatch(
            ids[start:stop], torch.arange(start, stop), slots[start:stop], torch.arange(length), plan, None
        )
        logits.append(model.forward(batch, cache))
        start = stop
    assert start == len(ids)
    return torch.cat(logits)


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_logits_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    oracle = save_tiny(family, tmp_path)
    model, cache = load(tmp_path)
    ids = torch.randint(0, 199, (70,), generator=torch.Generator().manual_seed(0))
    want = oracle(ids[None]).logits[0]
    got = logits_in_chunks(model, cache, ids, [13, 30, 1, 1, 25])
    assert (got - want).abs().max() < 1e-4
    assert torch.equal(got.argmax(-1), want.argmax(-1))


@torch.inference_mode()
def test_a_step_that_draws_nothing_does_not_use_the_head(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    model, cache = load(tmp_path)
    weights = replace(model.weights, head=None)  # type: ignore[arg-type]
    headless = Transformer(model.spec, weights, model.spec.max_position)
    attention = TorchAttention(model.spec.softmax_scale, model.spec.num_kv_heads, PAGE, CPU)
    plan = attention.plan([], [AttentionChunk(0, 5, [3])])
    slots = torch.arange(3 * PAGE, 3 * PAGE + 5)
    batch = ForwardBatch(torch.arange(5), torch.arange(5), slots, torch.arange(0), plan, None)
    assert headless.forward(batch, cache).shape == (0, 199)
    assert cache.k[:, slots].any(), "K and V are cached all the same"


@pytest.mark.parametrize("family", ["llama", "llama-bias", "qwen3"])
@torch.inference_mode()
def test_products_of_few_rows_by_triton(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU with plans for every shape: SiLU × up is fused where there is no bias."""
    fused = []

    def plan(rows: int, weight: torch.Tensor, gated: bool = False) -> GemvPlan | None:
        fused.append(gated)
        return GemvPlan(4, 64, 1) if rows <= MAX_ROWS else None

    monkeypatch.setattr(linear, "gemv_plan", plan)
    oracle = save_tiny(family, tmp_path)
    model, cache = load(tmp_path)
    ids = torch.randint(0, 199, (20,), generator=torch.Generator().manual_seed(0))
    want = oracle(ids[None]).logits[0]
    got = logits_in_chunks(model, cache, ids, [15, 1, 1, 3])
    assert (got - want).abs().max() < 1e-4
    assert any(fused) == (family != "llama-bias")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.inference_mode()
def test_half_precision_is_as_near_to_float32_as_transformers_is(dtype: torch.dtype, tmp_path: Path) -> None:
    oracle = save_tiny("llama", tmp_path)
    ids = torch.randint(0, 199, (70,), generator=torch.Generator().manual_seed(0))
    exact = oracle(ids[None]).logits[0]
    theirs = oracle.to(dtype)(ids[None]).logits[0].float()
    model, cache = load(tmp_path, dtype)
    ours = logits_in_chunks(model, cache, ids, [40, 1, 29]).float()
    assert (ours - exact).norm() <= 1.3 * (theirs - exact).norm()


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_tiny("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load(tmp_path)


def test_a_wrong_shape_is_named(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 81}))
    with pytest.raises(BaseModelError, match=r"gate_proj\.weight is \[80, 48\], config.json says \[81, 48\]"):
        load(tmp_path)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(BaseModelError, match=r"model\.safetensors"):
        load(tmp_path)
