"""Products of a few rows against torch in float64; on the CPU by Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.triton_device import DEVICE  # isort: skip  (first: it sets the interpreter up)
from server.kernels.reference.layer import silu_mul
from server.kernels.triton.gemv import gemv, gemv_silu_mul
from server.kernels.triton.gemv_plans import GemvPlan

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}  # the interpreter truncates


def draw(seed: int, *size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*size, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(seed)).to(dtype)


def close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> bool:
    return bool((got.double() - want.double()).norm() <= TOLERANCE[dtype] * want.double().norm())


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(
    ("features", "width", "biased"),
    [(64, 32, False), (192, 40, True), (200, 37, True)],
    ids=["step", "steps", "ragged"],
)
@pytest.mark.parametrize("rows", [1, 3, 4])
def test_gemv(dtype: torch.dtype, features: int, width: int, biased: bool, rows: int) -> None:
    x, weight = draw(0, rows, features, dtype=dtype), draw(1, width, features, dtype=dtype)
    bias = draw(2, width, dtype=dtype) if biased else None
    want = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    got = gemv(x, weight, bias, GemvPlan(4, 64, 1))
    assert (got.shape, got.dtype) == (want.shape, dtype)
    assert close(got, want, dtype)
    assert torch.equal(got, gemv(x, weight, bias, GemvPlan(4, 64, 1))), "sums have one order"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("features", "width"), [(64, 16), (200, 18)])
@pytest.mark.parametrize("rows", [1, 3])
def test_gemv_silu_mul(dtype: torch.dtype, features: int, width: int, rows: int) -> None:
    x, weight = draw(0, rows, features, dtype=dtype), draw(1, 2 * width, features, dtype=dtype)
    want = silu_mul(F.linear(x.double(), weight.double()).to(dtype))
    got = gemv_silu_mul(x, weight, GemvPlan(4, 64, 1))
    assert (got.shape, got.dtype) == (want.shape, dtype)
    assert float((got.double() - want.double()).norm() / want.double().norm()) <= 2 * TOLERANCE[dtype]  # rounded twice


def test_a_row_does_not_depend_on_the_others() -> None:
    x, weight = draw(0, 4, 192, dtype=torch.bfloat16), draw(1, 24, 192, dtype=torch.bfloat16)
    together = gemv(x, weight, None, GemvPlan(4, 64, 1))
    assert torch.equal(together[:2], gemv(x[:2], weight, None, GemvPlan(4, 64, 1)))
