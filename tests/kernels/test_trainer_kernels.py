"""The trainer's kernels against their plain torch definitions, and those against autograd; on the CPU by Triton's
interpreter."""

import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import Tensor

from tests.kernels.triton_device import DEVICE  # isort: skip  (first: it sets the interpreter up)
from trainer.kernels import reference, triton

DTYPES = [pytest.param(torch.float32, 2e-6, id="float32"), pytest.param(torch.bfloat16, 8e-3, id="bfloat16")]


def close(got: Tensor, want: Tensor, tolerance: float) -> bool:
    return bool((got.double() - want.double()).norm() <= tolerance * want.double().norm())


def draw(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*size, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(seed)).to(dtype)


def gradients(result: Tensor, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(result, inputs, grad))


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("hidden", [64, 100])
@pytest.mark.parametrize("adds", [False, True])
def test_rms_norm(dtype: torch.dtype, tolerance: float, hidden: int, adds: bool) -> None:
    x, grad, more = (draw(5, hidden, dtype=dtype, seed=seed) for seed in range(3))
    weight = draw(hidden, dtype=dtype).abs() + 0.5
    want = F.rms_norm(x.double(), (hidden,), weight.double(), 1e-5)
    assert close(reference.rms_norm(x, weight, 1e-5), want, tolerance)
    assert close(triton.rms_norm(x, weight, 1e-5), want, tolerance)
    exact = x.double().requires_grad_()
    (d_x,) = gradients(F.rms_norm(exact, (hidden,), weight.double(), 1e-5), [exact], grad.double())
    d_x = d_x + more.double() if adds else d_x
    residual = more if adds else None
    assert close(reference.rms_norm_backward(x, weight, 1e-5, grad, residual), d_x, tolerance)
    assert close(triton.rms_norm_backward(x, weight, 1e-5, grad, residual), d_x, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(("n", "rows", "heads", "d"), [(6, 3, 5, 8), (4, 4, 1, 12)])
def test_rope(dtype: torch.dtype, tolerance: float, n: int, rows: int, heads: int, d: int) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    x, grad = draw(n, heads, d, dtype=dtype), draw(n, heads, d, dtype=dtype, seed=1)
    angles = draw(rows, d // 2, seed=2)
    cos, sin = (torch.cat([t, t], dim=-1).to(dtype) for t in (angles.cos(), angles.sin()))
    exact = x.double().requires_grad_()
    spread = (table.double().repeat(n // rows, 1) for table in (cos, sin))
    turned, _ = apply_rotary_pos_emb(exact, exact, *spread)
    (d_x,) = gradients(turned, [exact], grad.double())
    for kernels in (reference, triton):
        assert close(kernels.rope_(x.clone(), cos, sin), turned.detach(), tolerance)
        assert close(kernels.rope_(grad.clone(), cos, sin, inverse=True), d_x, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("width", [32, 1500])
def test_swiglu(dtype: torch.dtype, tolerance: float, width: int) -> None:
    gate, up, grad = (draw(3, width, dtype=dtype, seed=seed) for seed in range(3))
    exact = [gate.double().requires_grad_(), up.double().requires_grad_()]
    want = F.silu(exact[0]) * exact[1]
    d_gate, d_up = gradients(want, exact, grad.double())
    for kernels in (reference, triton):
        assert close(kernels.swiglu(gate, up), want.detach(), tolerance)
        g, u, d = gate.clone(), up.clone(), grad.clone()
        kernels.swiglu_backward_(g, u, d)
        assert close(g, d_gate, tolerance)
        assert close(u, d_up, tolerance)
        assert close(d, want.detach(), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("words", [40, 9000])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_cross_entropy(dtype: torch.dtype, tolerance: float, words: int, scale: float) -> None:
    logits = draw(4, words, dtype=dtype) * 4
    targets = torch.tensor([0, words - 1, 7, 7], device=DEVICE)
    exact = logits.double().requires_grad_()
    want = F.cross_entropy(exact * scale, targets, reduction="sum")
    (d_logits,) = gradients(want, [exact], torch.ones_like(want))
    for kernels in (reference, triton):
        got = logits.clone()
        assert float(kernels.cross_entropy_(got, targets, scale)) == pytest.approx(float(want), rel=1e-5)
        assert close(got, d_logits, tolerance)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dequantize(quant_type: str, nested: bool, dtype: torch.dtype) -> None:
    weight = draw(96, 192, dtype=dtype)
    packed, state = quantize_4bit(weight, quant_type=quant_type, compress_statistics=nested)
    got, want = triton.dequantize(packed, state), dequantize_4bit(packed, state)
    assert got.dtype is want.dtype
    torch.testing.assert_close(got, want, rtol=1e-6 if dtype is torch.float32 else 8e-3, atol=0)
