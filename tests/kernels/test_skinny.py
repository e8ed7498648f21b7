"""Products of a few dozen rows in CUDA C++, against torch in float64."""

from dataclasses import replace

import pytest
import torch

from server.kernels.cuda.module import compile_source
from server.kernels.cuda.skinny import macros, skinny_linear
from server.kernels.cuda.skinny_plans import _HOPPER, MAX_ROWS, MIN_ROWS, ROWS, SkinnyPlan, skinny_plan
from server.kernels.linear import pack_linear

TOLERANCE = {torch.bfloat16: 3e-3, torch.float16: 4e-4}  # half a unit in the last place of y, and a little more
SHARED_BYTES = 227 * 1024  # that a block of threads may have on Hopper
PLANS = (
    SkinnyPlan(1, 1, 2, 3, splits=1),
    SkinnyPlan(2, 2, 1, 3, splits=8),
    SkinnyPlan(1, 3, 1, 4, splits=4),
    SkinnyPlan(2, 1, 2, 2, splits=2, early=False),
)


@pytest.mark.parametrize("shape", list(_HOPPER), ids=str)
def test_a_measured_plan_fits_its_shape_and_the_gpu(shape: tuple[int, int]) -> None:
    features, _ = shape
    plan = skinny_plan(MAX_ROWS, *shape)
    assert plan is not None
    assert ROWS >= MAX_ROWS
    assert features % (plan.columns * 64) == 0
    assert plan.splits * plan.columns * 64 * plan.stages <= features  # every part fills its stages
    assert plan.shared_bytes <= SHARED_BYTES


@pytest.mark.parametrize("rows", [0, MIN_ROWS - 1, MAX_ROWS + 1])
def test_other_numbers_of_rows_are_left_to_cublas(rows: int) -> None:
    assert skinny_plan(rows, 4096, 6144) is None


def test_other_shapes_are_left_to_cublas() -> None:
    assert skinny_plan(MAX_ROWS, 4096, 4100) is None


@pytest.mark.parametrize("is_bfloat16", [0, 1])
@pytest.mark.parametrize("plan", [*PLANS, *set(_HOPPER.values())], ids=str)
def test_the_source_compiles(plan: SkinnyPlan, is_bfloat16: int) -> None:
    dtype = torch.bfloat16 if is_bfloat16 else torch.float16
    assert compile_source("skinny.cu", macros(plan, dtype), "sm_90a")


def off(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> float:
    exact = x.double() @ weight.double().t()
    return float((y.double() - exact).norm() / exact.norm())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("rows", [1, 17, 33, 64, 65, 130])
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_the_product_of_rows_that_fill_no_tile(plan: SkinnyPlan, rows: int, dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(rows)
    wide = torch.randn(rows, 2 * 4096, device="cuda", generator=generator).to(dtype)
    weight = torch.randn(604, 4096, device="cuda", generator=generator).to(dtype)  # no multiple of any width
    x = wide[:, 4096:]  # rows lie apart
    got = skinny_linear(x, weight, plan)
    assert off(got, x, weight) < TOLERANCE[dtype]
    assert torch.equal(got, skinny_linear(x, weight, replace(plan, early=not plan.early)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", list(_HOPPER), ids=str)
def test_measured_products_replay_from_a_graph_after_a_merge(shape: tuple[int, int], dtype: torch.dtype) -> None:
    features, out = shape
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(MAX_ROWS, features, device="cuda", generator=generator).to(dtype)
    linear = pack_linear(torch.randn(out, features, device="cuda", generator=generator).mul_(0.02).to(dtype))
    linear(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear(x)
    some = torch.randperm(out, device="cuda", generator=generator)[:512]
    for seed in range(2):
        linear.write(torch.randn(out, features, device="cuda", generator=generator.manual_seed(seed)).mul_(0.02))
        graph.replay()
        assert off(y[:, some], x, linear.weight[some]) < TOLERANCE[dtype]
