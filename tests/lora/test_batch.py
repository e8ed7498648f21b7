"""How a batch's rows are put together on a CPU, and that what lies between them does not matter."""

import pytest
import torch

from server.lora.batch import HOLE_BYTES, LoraBatch, TokenSpan, build_lora_batch
from server.lora.pool import AdapterPool, Ranges
from tests.kernels.test_lora import SPEC

CPU = torch.device("cpu")


def filled_pool(num_rows: int) -> AdapterPool:
    row_bytes = AdapterPool(SPEC, 0, torch.float32, CPU).row_bytes
    pool = AdapterPool(SPEC, num_rows * row_bytes, torch.float32, CPU)
    torch.manual_seed(0)
    for group in pool.groups.values():
        for tensor in (group.a, *group.b):
            tensor.normal_()
    return pool


def term(pool: AdapterPool, spans: list[TokenSpan], x: torch.Tensor, group: str) -> torch.Tensor:
    batch = build_lora_batch(pool, spans, [])
    assert batch is not None
    y = torch.zeros(len(x), sum(pool.groups[group].group.widths))
    batch.add(y, x, group, 1)
    return y


@pytest.mark.parametrize("hole", [0, 8, 2000])
def test_adapters_across_a_hole_give_what_each_gives_alone(hole: int) -> None:
    """Whatever is in the hole: others' rows, or what an earlier owner left."""
    pool = filled_pool(8 + hole + 8)
    first: Ranges = ((0, 8),)
    second: Ranges = ((8 + hole, 16 + hole),)
    spans = [TokenSpan(1, first), TokenSpan(1, second), TokenSpan(1, None), TokenSpan(1, first)]
    batch = build_lora_batch(pool, spans, [])
    assert isinstance(batch, LoraBatch)
    product_bytes = pool.row_bytes / (SPEC.num_layers * len(pool.groups))
    assert len(batch.runs) == (2 if hole * product_bytes > HOLE_BYTES else 1)
    for name, group in pool.groups.items():
        x = torch.randn(4, group.group.in_features)
        mixed = term(pool, spans, x, name)
        for i, span in enumerate(spans):
            alone = term(pool, [span], x[i : i + 1], name) if span.rows else torch.zeros(1, mixed.shape[1])
            assert torch.allclose(mixed[i], alone[0], rtol=1e-4, atol=1e-4), (name, i)
