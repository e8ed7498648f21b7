"""Attention at real head shapes against torch in float32: captured decodes for batches of all kinds, and prefills."""

from collections.abc import Callable

import pytest
import torch
from transformers import LlamaConfig

from server.base.spec import ModelSpec
from server.model.attention import AttentionChunk, TorchAttention

pytestmark = pytest.mark.gpu

PAGE = 16
NUM_PAGES = 4000
CONFIG = LlamaConfig(hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=16384)
SPEC = ModelSpec.from_config({**CONFIG.to_dict(), "architectures": ["LlamaForCausalLM"]})
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
LENGTHS = {
    1: [[1], [600], [4000]],
    16: [[600] * 16, [4000] + [30] * 12, [17]],
    64: [[600] * 64, [16000] + [20 * i + 1 for i in range(57)], [2] * 49],
}


def torch_attention(device: torch.device) -> TorchAttention:
    return TorchAttention(SPEC.softmax_scale, SPEC.num_kv_heads, PAGE, device)


def drawing(dtype: torch.dtype, device: torch.device) -> Callable[..., torch.Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    return lambda *size: torch.randn(*size, device=device, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("bucket_size", list(LENGTHS))
@torch.inference_mode()
def test_decode_buckets(bucket_size: int, dtype: torch.dtype) -> None:
    from server.model.flashinfer_attention import FlashInferAttention

    device = torch.device("cuda", 0)
    attention, reference = FlashInferAttention(SPEC, PAGE, NUM_PAGES, dtype, device), torch_attention(device)
    draw = drawing(dtype, device)
    shape = ((NUM_PAGES + 1) * PAGE, SPEC.num_kv_heads, SPEC.head_dim)
    q, k_cache, v_cache = draw(bucket_size, SPEC.num_heads, SPEC.head_dim), draw(*shape), draw(*shape)
    bucket = attention.decode_bucket(bucket_size)
    bucket.update([])
    bucket.plan.run(q, k_cache, v_cache)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = bucket.plan.run(q, k_cache, v_cache)
    for lengths in LENGTHS[bucket_size]:
        free = iter(torch.randperm(NUM_PAGES, generator=torch.Generator().manual_seed(2)).tolist())
        chunks = [AttentionChunk(n - 1, 1, [next(free) for _ in range(-(-n // PAGE))]) for n in lengths]
        torch.cuda.synchronize()
        bucket.update(chunks)
        graph.replay()
        first = out.clone()
        graph.replay()
        assert torch.equal(first, out), "a replay finds everything as the one before did"
        assert out.isfinite().all()
        for row, chunk in enumerate(chunks):
            plan = reference.plan([chunk], [])
            want = plan.run(q[row : row + 1].float(), k_cache.float(), v_cache.float())[0]
            error = (out[row].float() - want).norm() / want.norm()
            assert error <= TOLERANCE[dtype], f"row {row} of {len(chunks)}, {chunk.num_keys} keys: {error}"


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@torch.inference_mode()
def test_steps_with_prefills(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row is written, whatever was in the memory that the result takes: decodes, first and later chunks."""
    from server.model.flashinfer_attention import FlashInferAttention

    device = torch.device("cuda", 0)
    attention, reference = FlashInferAttention(SPEC, PAGE, NUM_PAGES, dtype, device), torch_attention(device)
    draw = drawing(dtype, device)
    shape = (NUM_PAGES * PAGE, SPEC.num_kv_heads, SPEC.head_dim)
    k_cache, v_cache = draw(*shape), draw(*shape)
    for starts, lengths in (([0], [1]), ([0] * 16, [512] * 16), ([70, 0, 4000, 33, 0], [1, 1, 300, 100, 1300])):
        free = iter(torch.randperm(NUM_PAGES, generator=torch.Generator().manual_seed(2)).tolist())
        chunks = [
            AttentionChunk(start, length, [next(free) for _ in range(-(-(start + length) // PAGE))])
            for start, length in zip(starts, lengths, strict=True)
        ]
        q = draw(sum(lengths), SPEC.num_heads, SPEC.head_dim)
        decodes = [chunk for chunk in chunks if chunk.length == 1]
        plan = attention.plan(decodes, chunks[len(decodes) :])
        with monkeypatch.context() as patched:
            patched.setattr(torch, "empty_like", lambda like: torch.full_like(like, torch.nan))
            out = plan.run(q, k_cache, v_cache)
        want = reference.plan(decodes, chunks[len(decodes) :]).run(q.float(), k_cache.float(), v_cache.float())
        error = (out.float() - want).flatten(1).norm(dim=1) / want.flatten(1).norm(dim=1)
        assert error.max() <= TOLERANCE[dtype], f"{starts} {lengths}: {error.max()}"


@torch.inference_mode()
def test_a_step_that_is_planned_ahead_leaves_the_one_before_as_it_was() -> None:
    """The device has not begun with the first when the second, of other lengths, is planned."""
    from server.model.flashinfer_attention import FlashInferAttention

    device, dtype = torch.device("cuda", 0), torch.float16
    attention, reference = FlashInferAttention(SPEC, PAGE, NUM_PAGES, dtype, device), torch_attention(device)
    draw = drawing(dtype, device)
    shape = (NUM_PAGES * PAGE, SPEC.num_kv_heads, SPEC.head_dim)
    k_cache, v_cache = draw(*shape), draw(*shape)
    first = [AttentionChunk(50 * i, 64, range(40 * i, 40 * i + 40)) for i in range(10)]
    steps = [first, [AttentionChunk(9000, 1300, range(1000, 1700))]]
    queries = [draw(sum(chunk.length for chunk in step), SPEC.num_heads, SPEC.head_dim) for step in steps]
    for step, q in zip(steps, queries, strict=True):
        attention.plan([], step).run(q, k_cache, v_cache)  # compiles
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)  # cycles
    results = [attention.plan([], step).run(q, k_cache, v_cache) for step, q in zip(steps, queries, strict=True)]
    for step, q, out in zip(steps, queries, results, strict=True):
        want = reference.plan([], step).run(q.float(), k_cache.float(), v_cache.float())
        error = (out.float() - want).flatten(1).norm(dim=1) / want.flatten(1).norm(dim=1)
        assert error.max() <= TOLERANCE[dtype]
