"""The measured products of few rows at their real shapes, against torch in float64."""

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.triton_device import DEVICE  # isort: skip  (first: it sets the interpreter up)
from server.kernels.linear import linear_silu_mul, pack_linear
from server.kernels.reference.layer import silu_mul
from server.kernels.triton.gemv_plans import _HOPPER

TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("case", list(_HOPPER), ids=str)
def test_measured_products(case: tuple[int, int, int, bool], dtype: torch.dtype) -> None:
    rows, features, width, gated = case
    generator = torch.Generator(DEVICE).manual_seed(0)
    x = torch.randn(rows, features, device=DEVICE, generator=generator).to(dtype)
    linear = pack_linear(torch.randn(width, features, device=DEVICE, generator=generator).mul_(0.02).to(dtype))
    half = width // 2
    columns = torch.randperm(half, device=DEVICE, generator=generator)[:512]
    if gated:
        got = linear_silu_mul(linear, x)[:, columns]
        products = F.linear(x.double(), linear.weight[torch.cat([columns, columns + half])].double())
        want = silu_mul(products.to(dtype)).double()
    else:
        got = linear(x)[:, columns]
        want = F.linear(x.double(), linear.weight[columns].double())
    assert (got.double() - want).norm() <= 2 * TOLERANCE[dtype] * want.norm()
