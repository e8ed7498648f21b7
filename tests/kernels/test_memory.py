"""Memory that is set aside."""

import pytest
import torch

from server.errors import DoesNotFit
from server.kernels.memory import reserve

CPU = torch.device("cpu")


@pytest.mark.parametrize("is_sparse", [True, False])
def test_it_is_zero_and_of_the_shape(is_sparse: bool) -> None:
    made = reserve((3, 5, 7), torch.bfloat16, CPU, is_sparse)
    assert (made.shape, made.dtype) == ((3, 5, 7), torch.bfloat16)
    assert not made.any()
    assert reserve((0, 5), torch.float32, CPU, is_sparse).shape == (0, 5)


def test_what_no_system_has_says_what_to_lower() -> None:
    with pytest.raises(DoesNotFit, match=r"2097152\.0 GiB .* lower --kv-cache-memory"):
        reserve((1 << 51,), torch.uint8, CPU)
