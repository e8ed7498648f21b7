"""A GPU's low-rank terms, its kernels interpreted here, against those of a CPU on the same step."""

from tests.kernels.triton_device import DEVICE  # isort: skip  (first: it sets the interpreter up)

import pytest
import torch

from server.base.spec import ModelSpec
from server.lora import gpu_batch
from server.lora.batch import LowRankTerm, TokenSpan, build_lora_batch
from server.lora.pool import AdapterPool

SPEC = ModelSpec.from_config(
    {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "max_position_embeddings": 64,
    }
)
BASE, FIRST, SECOND = None, ((0, 4), (8, 12)), ((12, 33),)
STEPS = {
    "decodes": [(1, FIRST), (1, BASE), (1, SECOND), (1, FIRST)],
    "prefills": [(1, BASE), (1, SECOND), (9, FIRST), (70, BASE), (66, SECOND)],
    "no base": [(3, FIRST), (2, SECOND)],
}


def filled_pool(device: str) -> AdapterPool:
    cpu = torch.device("cpu")
    size = 40 * AdapterPool(SPEC, 0, torch.float32, cpu).row_bytes
    pool = AdapterPool(SPEC, size, torch.float32, torch.device(device))
    generator = torch.Generator(cpu).manual_seed(0)
    for group in pool.groups.values():
        for tensor in (group.a, *group.b):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return pool


@pytest.mark.parametrize("name", list(STEPS))
def test_every_product_of_a_step(name: str) -> None:
    spans, pool = [TokenSpan(length, rows) for length, rows in STEPS[name]], filled_pool("cpu")
    n = sum(span.length for span in spans)
    want = build_lora_batch(pool, [], spans)
    got = gpu_batch.build_gpu_lora_batch(filled_pool(DEVICE), spans)
    assert want is not None
    assert got is not None

    def run(term: LowRankTerm, group: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if group == "silu":
            return term.silu_mul(y, x, 1)
        term.add(y, x, group, 1)
        return y

    for group in (*pool.groups, "silu"):
        product = pool.groups["gate_up" if group == "silu" else group].group
        x, y = torch.randn(n, product.in_features) / 64, torch.randn(n, sum(product.widths))
        expected = run(want, group, x, y.clone())
        result = run(got, group, x.to(DEVICE), y.to(DEVICE))
        assert torch.allclose(result.cpu(), expected, rtol=1e-4, atol=1e-5), group


def test_a_step_of_the_base_has_no_term() -> None:
    assert gpu_batch.build_gpu_lora_batch(filled_pool(DEVICE), [TokenSpan(4, None)]) is None


def test_what_is_launched_before_requests_changes_nothing() -> None:
    pool = filled_pool(DEVICE)
    before = [tensor.clone() for group in pool.groups.values() for tensor in (group.a, *group.b)]
    gpu_batch.warm_up(pool)
    after = [tensor for group in pool.groups.values() for tensor in (group.a, *group.b)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
