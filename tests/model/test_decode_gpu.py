"""Captured decode attention at real head shapes, replayed for batches of all kinds, against torch in float32."""

import pytest
import torch
from transformers import LlamaConfig

from server.base.spec import ModelSpec
from server.model.attention import AttentionChunk, TorchAttention

pytestmark = pytest.mark.gpu

PAGE = 16
NUM_PAGES = 4000
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
LENGTHS = {
    1: [[1], [600], [4000]],
    16: [[600] * 16, [4000] + [30] * 12, [17]],
    64: [[600] * 64, [16000] + [20 * i + 1 for i in range(57)], [2] * 49],
}


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("bucket_size", list(LENGTHS))
@torch.inference_mode()
def test_decode_buckets(bucket_size: int, dtype: torch.dtype) -> None:
    from server.model.flashinfer_attention import FlashInferAttention

    device = torch.device("cuda", 0)
    config = LlamaConfig(hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=16384)
    spec = ModelSpec.from_config({**config.to_dict(), "architectures": ["LlamaForCausalLM"]})
    attention = FlashInferAttention(spec, PAGE, NUM_PAGES, dtype, device)
    reference = TorchAttention(spec.softmax_scale, spec.num_kv_heads, PAGE, device)
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=device, generator=generator).to(dtype)

    shape = ((NUM_PAGES + 1) * PAGE, spec.num_kv_heads, spec.head_dim)
    q, k_cache, v_cache = draw(bucket_size, spec.num_heads, spec.head_dim), draw(*shape), draw(*shape)
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
