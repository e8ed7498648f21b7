"""The fused layer kernels against their plain torch definitions; on the CPU by Triton's interpreter."""

from types import ModuleType

import pytest
import torch

from tests.kernels.triton_device import DEVICE  # isort: skip  (first: it sets the interpreter up)
from server.kernels.reference import layer as reference
from server.kernels.triton import layer as triton_layer

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> bool:
    return bool((got.double() - want.double()).norm() <= TOLERANCE[dtype] * want.double().norm())


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("hidden", [64, 100])
def test_add_rms_norm(dtype: torch.dtype, hidden: int) -> None:
    torch.manual_seed(0)
    x, residual = torch.randn(2, 5, hidden, device=DEVICE).to(dtype)
    weight = torch.rand(hidden, device=DEVICE).to(dtype) + 0.5
    want, want_residual = reference.add_rms_norm(x, residual.clone(), weight, 1e-5)
    got, got_residual = triton_layer.add_rms_norm(x, residual, weight, 1e-5)
    assert got_residual is residual
    assert close(got_residual, want_residual, dtype)
    assert close(got, want, dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("width", [32, 1500])
def test_silu_mul(dtype: torch.dtype, width: int) -> None:
    gate_up = torch.randn(3, 2 * width, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0)).to(dtype)
    assert close(triton_layer.silu_mul(gate_up), reference.silu_mul(gate_up), dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(6, 2, 8), (3, 3, 16), (4, 1, 12), (16, 8, 24)])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("few", [2, 3], ids=["many tokens", "few tokens"])
def test_rope_and_store(
    dtype: torch.dtype, heads: int, kv_heads: int, d: int, normed: bool, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_layer, "_FEW_TOKENS", few)
    generator = torch.Generator(DEVICE).manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=DEVICE, generator=generator).to(dtype)

    cos, sin = reference.rope_table(d, 40, 10000.0, None, dtype, torch.device(DEVICE))
    positions = torch.tensor([0, 39, 7], device=DEVICE)
    slots = torch.tensor([11, 2, 19], device=DEVICE)
    rows = (cos[positions].unsqueeze(1), sin[positions].unsqueeze(1))
    qkv = draw(3, (heads + 2 * kv_heads) * d)
    norms = (draw(d).abs() + 0.5, draw(d).abs() + 0.5) if normed else None
    caches = [draw(20, kv_heads, d) for _ in range(2)]
    copies = [cache.clone() for cache in caches]
    want = reference.rope_and_store(qkv, norms, 1e-5, *rows, slots, *copies)
    got = triton_layer.rope_and_store(qkv, norms, 1e-5, *rows, slots, *caches)
    assert close(got, want, dtype)
    assert close(caches[0], copies[0], dtype)
    assert torch.equal(caches[1], copies[1]), "values are copied as they are"
    untouched = [i for i in range(20) if i not in (11, 2, 19)]
    assert torch.equal(caches[0][untouched], copies[0][untouched]), "another slot was written"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 64, 2000])
def test_real_shapes_in_a_graph(dtype: torch.dtype, rows: int) -> None:
    """Of Llama-3.1-8B: one capture, replayed with other values, is what the definitions make of those."""
    hidden, intermediate, heads, kv_heads, d = 4096, 14336, 32, 8, 128
    generator = torch.Generator(DEVICE).manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=DEVICE, generator=generator).to(dtype)

    x, residual, weight, gate_up = draw(rows, hidden), draw(rows, hidden), draw(hidden), draw(rows, 2 * intermediate)
    qkv, (k_cache, v_cache) = draw(rows, (heads + 2 * kv_heads) * d), (draw(rows, kv_heads, d) for _ in range(2))
    cos, sin = (t.unsqueeze(1) for t in reference.rope_table(d, rows, 10000.0, None, dtype, torch.device(DEVICE)))
    slots = torch.randperm(rows, device=DEVICE, generator=generator)

    def run(layer: ModuleType) -> list[torch.Tensor]:
        total = residual.clone()
        normed, _ = layer.add_rms_norm(x, total, weight, 1e-5)
        q = layer.rope_and_store(qkv, None, 1e-5, cos, sin, slots, k_cache, v_cache)
        return [normed, total, layer.silu_mul(gate_up), q, k_cache.clone(), v_cache.clone()]

    run(triton_layer)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(triton_layer)
    for _ in range(2):
        for tensor in (x, residual, gate_up, qkv):
            tensor.copy_(draw(*tensor.shape))
        graph.replay()
        results = [tensor.clone() for tensor in captured]
        assert all(close(got, want, dtype) for got, want in zip(results, run(reference), strict=True))
