"""Which tokens of a batch on a CPU the kernel takes and which the matrix products, and that both give the same."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from server.lora.batch import TokenSpan
from server.lora.cpu_batch import PRODUCT_SIZE, CpuLoraBatch, Segment, build_cpu_lora_batch
from server.lora.pool import AdapterPool, Ranges
from tests.kernels.test_lora import SPEC

CPU = torch.device("cpu")
FIRST: Ranges = ((0, 8),)
SECOND: Ranges = ((8, 12), (20, 24))
MANY = PRODUCT_SIZE // 8  # tokens of an adapter of rank 8


def filled_pool(num_rows: int) -> AdapterPool:
    row_bytes = AdapterPool(SPEC, 0, torch.float32, CPU).row_bytes
    pool = AdapterPool(SPEC, num_rows * row_bytes, torch.float32, CPU)
    torch.manual_seed(0)
    for group in pool.groups.values():
        for tensor in (group.a, *group.b):
            tensor.normal_()
    return pool


def term(batch: CpuLoraBatch, x: Tensor, group: str) -> Tensor:
    y = torch.zeros(len(x), sum(batch.pool.groups[group].group.widths))
    batch.add(y, x, group, 1)
    return y


@pytest.mark.parametrize(
    ("spans", "segments", "kernel_tokens"),
    [
        ([TokenSpan(1, FIRST)] * 3, (), [0, 1, 2]),
        ([TokenSpan(1, None), TokenSpan(1, SECOND)], (), [1]),
        ([TokenSpan(MANY - 1, FIRST)], (), list(range(MANY - 1))),
        ([TokenSpan(MANY, FIRST)], (Segment(0, MANY, FIRST),), None),
        ([TokenSpan(1, FIRST)] * MANY, (Segment(0, MANY, FIRST),), None),
        (
            [TokenSpan(1, SECOND), TokenSpan(1, None), TokenSpan(MANY, FIRST), TokenSpan(2, SECOND)],
            (Segment(2, 2 + MANY, FIRST),),
            [0, MANY + 2, MANY + 3],
        ),
    ],
)
def test_many_neighbours_of_an_adapter_are_a_segment(
    spans: list[TokenSpan], segments: tuple[Segment, ...], kernel_tokens: list[int] | None
) -> None:
    batch = build_cpu_lora_batch(filled_pool(24), spans)
    assert batch.segments == segments
    if kernel_tokens is None:
        assert batch.tables is None
    else:
        assert batch.tables is not None
        blocks = batch.tables.blocks
        taken = [blocks.token_index[i : i + n].tolist() for i, n in zip(blocks.start, blocks.length, strict=True)]
        assert sorted(token for tokens in taken for token in tokens) == kernel_tokens


def test_both_forms_give_the_same() -> None:
    pool = filled_pool(24)
    spans = [TokenSpan(3, SECOND), TokenSpan(2, None), TokenSpan(MANY, FIRST), TokenSpan(1, SECOND)]
    batch = build_cpu_lora_batch(pool, spans)
    apart = [build_cpu_lora_batch(pool, [TokenSpan(1, span.rows)]) for span in spans for _ in range(span.length)]
    for name, group in pool.groups.items():
        x = torch.randn(len(apart), group.group.in_features)
        each = torch.cat([term(one, x[i : i + 1], name) for i, one in enumerate(apart)])
        assert torch.allclose(term(batch, x, name), each, rtol=1e-4, atol=1e-4), name
        assert torch.equal(each[3:5], torch.zeros_like(each[3:5]))


def test_the_gate_has_its_low_rank_terms() -> None:
    pool = filled_pool(24)
    batch = build_cpu_lora_batch(pool, [TokenSpan(1, FIRST), TokenSpan(1, None), TokenSpan(1, SECOND)])
    width = pool.groups["gate_up"].group.widths[0]
    x, y = torch.randn(3, SPEC.hidden_size), torch.randn(3, 2 * width)
    gate, up = (y + term(batch, x, "gate_up")).split(width, dim=1)
    assert torch.allclose(batch.silu_mul(y, x, 1), F.silu(gate) * up, rtol=1e-4, atol=1e-4)
