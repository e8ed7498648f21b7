"""Products of dozens of rows with 4-bit weights in CUDA C++, against float64."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from server.kernels.cuda.four_bit import RepackedWeight, four_bit_dense, four_bit_warpgroup, repack, warpgroup_macros
from server.kernels.cuda.module import compile_source
from server.kernels.cuda.plans import _MEASURED, _WARPGROUPS, WarpgroupPlan

TOLERANCE = {torch.bfloat16: 2.8e-3, torch.float16: 6e-4}  # x Wᵀ rounded, W rounded in the reference, and a little more
MEASURED = {plan for plans in _MEASURED.values() for plan in plans if isinstance(plan, WarpgroupPlan)}
OTHERS = {plan for _, plans in _WARPGROUPS for plan in plans}
PARTS = {replace(plan, splits=2) for plan in OTHERS}
PLANS = sorted(MEASURED | OTHERS | PARTS, key=str)
OUT, IN = 2064, 4096  # no multiple of any width; more shares than multiprocessors


@pytest.mark.parametrize(
    ("plan", "dtype"),
    [*((plan, torch.bfloat16) for plan in PLANS), *((plan, torch.float16) for plan in sorted(OTHERS, key=str))],
    ids=str,
)
def test_the_source_compiles(plan: WarpgroupPlan, dtype: torch.dtype) -> None:
    assert compile_source("four_bit_warpgroup.cu", warpgroup_macros(plan, dtype), "sm_90a")


def random_weight(out: int, features: int) -> RepackedWeight:
    packed = torch.randint(0, 256, (out * features // 2,), dtype=torch.uint8, device="cuda")
    return repack(packed, torch.rand(out * features // 64, device="cuda") + 0.1, "nf4", (out, features))


def off(y: Tensor, x: Tensor, dense: Tensor) -> float:
    exact = x.double() @ dense.double().t()
    return float((y.double() - exact).norm() / exact.norm())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_rows_that_fill_no_tile(plan: WarpgroupPlan, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = random_weight(OUT, IN)
    dense = four_bit_dense(weight, dtype)
    for rows in (1, 63, 64, 130, 256, 300):
        wide = torch.randn(rows, 2 * IN, device="cuda").to(dtype)
        x = wide[:, IN:]  # rows lie apart
        got = four_bit_warpgroup(x, weight, plan)
        assert off(got, x, dense) < TOLERANCE[dtype], rows
        for early in (True, False):
            assert torch.equal(got, four_bit_warpgroup(x.contiguous(), weight, replace(plan, early=early))), rows
    assert not weight.arrivals.any(), "flags are zeros again"


@pytest.mark.gpu
@pytest.mark.parametrize("features", [256, 512, 768])
@pytest.mark.parametrize("plan", [plan for plan in PLANS if plan.splits == 1], ids=str)
def test_fewer_inputs_than_stages(plan: WarpgroupPlan, features: int) -> None:
    """A tile is over before its first columns of x have all been asked for."""
    torch.manual_seed(0)
    weight = random_weight(34000, features)
    x = torch.randn(200, features, device="cuda").bfloat16()
    got = four_bit_warpgroup(x, weight, plan)
    assert off(got, x, four_bit_dense(weight, torch.bfloat16)) < TOLERANCE[torch.bfloat16]
    assert torch.equal(got, four_bit_warpgroup(x, weight, plan))


@pytest.mark.gpu
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_a_chain_of_products_in_a_graph(plan: WarpgroupPlan) -> None:
    """Each begins before the one whose outputs it reads has ended."""
    torch.manual_seed(0)
    weights = [random_weight(IN, IN) for _ in range(3)]
    for weight in weights:
        weight.absmax.mul_(IN**-0.5)
    x = torch.randn(256, IN, device="cuda").bfloat16()
    expected = x
    for weight in weights:
        expected = four_bit_warpgroup(expected, weight, replace(plan, early=False))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x
        for weight in weights:
            y = four_bit_warpgroup(y, weight, plan)
    for _ in range(3):
        y.zero_()
        graph.replay()
        assert torch.equal(y, expected)
