"""The likeliest token against torch's argmax in float32 on the CPU, ties among them."""

import pytest
import torch

from tests.kernels.triton_device import DEVICE  # isort: skip  (first: it sets the interpreter up)
from server.kernels.triton.argmax import argmax_rows

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 199, 2048, 5000])
def test_ties_go_to_the_lowest(dtype: torch.dtype, width: int) -> None:
    """Small whole numbers: every row has many that are largest, mostly in several parts."""
    x = torch.randint(-3, 4, (5, width), generator=torch.Generator().manual_seed(0)).to(dtype)
    x[3] = -float("inf")
    got = argmax_rows(x.to(DEVICE))
    assert got.dtype == torch.int64
    assert got.tolist() == [row.tolist().index(max(row.tolist())) for row in x.float()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_is_largest(dtype: torch.dtype) -> None:
    x = torch.randn(4, 6001, generator=torch.Generator().manual_seed(1)).to(dtype)
    wanted = [0, 2047, 2048, 6000]
    x[range(4), wanted] = 9.0
    assert argmax_rows(x.to(DEVICE)).tolist() == wanted


def test_an_index_even_where_nothing_is_a_number() -> None:
    x = torch.full((2, 2050), float("nan"))
    x[1, :2049] = -1.0
    assert argmax_rows(x.to(DEVICE)).tolist() == x.argmax(dim=-1).tolist() == [0, 2049]


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 64])
def test_a_vocabulary(rows: int) -> None:
    x = torch.randn(rows, 128256, device=DEVICE, dtype=torch.bfloat16)  # of 128256 in bf16 many are the largest
    want = [row.tolist().index(max(row.tolist())) for row in x.float().cpu()]
    assert argmax_rows(x).tolist() == want
