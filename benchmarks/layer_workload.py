"""What a step without adapters launches in a decoder layer and after the last, and the bytes that must move."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.lora_workload import COLD_BYTES
from server.base.spec import ModelSpec
from server.kernels import add_rms_norm, pack_linear, rope_and_store, rope_table, silu_mul
from server.model.attention import AttentionBackend, AttentionChunk, AttentionPlan

PAGE = 16
PROMPT = 512  # tokens of a sequence that a prefill has
KEYS = 640  # of a sequence that a decode has
LLAMA_8B = ModelSpec.from_config(
    {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
    }
)


@dataclass(frozen=True, slots=True)
class Launch:
    """`run(i)` is the kernel over the i-th of `copies` of its weights or keys, so that these come from memory.
    `num_bytes`: what it reads once and writes once."""

    kernel: str
    run: Callable[[int], object]
    copies: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class LayerWorkload:
    """The launches of a step of `rows` tokens: decodes, or, for more than 256, prompts of PROMPT tokens."""

    spec: ModelSpec
    rows: int
    dtype: torch.dtype
    device: torch.device

    def random(self, *size: int) -> Tensor:
        return torch.randn(*size, dtype=self.dtype, device=self.device).mul_(0.05)

    def launches(self, attention: Callable[[int], AttentionBackend] | None = None) -> Iterator[Launch]:
        """`attention(num_pages)` makes the backend; without, attention is left out."""
        spec, rows = self.spec, self.rows
        size, hidden = self.dtype.itemsize, spec.hidden_size
        x, residual, weight = self.random(rows, hidden), self.random(rows, hidden), self.random(hidden)
        norm = (4 * rows + 1) * hidden * size
        yield Launch("add_rms_norm", lambda i: add_rms_norm(x, residual, weight, 1e-5), 8, norm)
        yield self._rope()
        gate_up = self.random(rows, 2 * spec.intermediate_size)
        yield Launch("silu_mul", lambda i: silu_mul(gate_up), 8, 3 * rows * spec.intermediate_size * size)
        if self._decodes:  # more rows are bound by operations
            yield from self._products()
        if attention is not None:
            yield self._attention(attention)

    @property
    def _decodes(self) -> bool:
        return self.rows <= 256

    def _rope(self) -> Launch:
        spec, rows = self.spec, self.rows
        heads, kv_heads, d = spec.num_heads, spec.num_kv_heads, spec.head_dim
        qkv = self.random(rows, (heads + 2 * kv_heads) * d)
        cos, sin = (t.unsqueeze(1) for t in rope_table(d, rows, 1e4, None, self.dtype, self.device))
        slots = torch.arange(rows, device=self.device)
        k_cache, v_cache = self.random(rows, kv_heads, d), self.random(rows, kv_heads, d)
        num_bytes = (2 * qkv.numel() + cos.numel() + sin.numel()) * self.dtype.itemsize
        return Launch(
            "rope_and_store",
            lambda i: rope_and_store(qkv, None, 1e-5, cos, sin, slots, k_cache, v_cache),
            8,
            num_bytes,
        )

    def _products(self) -> Iterator[Launch]:
        """By whichever kernel the layer's plan names."""
        spec = self.spec
        qkv = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
        shapes = {
            "qkv": (qkv, spec.hidden_size),
            "o": (spec.hidden_size, spec.num_heads * spec.head_dim),
            "gate_up": (2 * spec.intermediate_size, spec.hidden_size),
            "down": (spec.hidden_size, spec.intermediate_size),
            "head": (spec.vocab_size, spec.hidden_size),
        }
        for name, (width, features) in shapes.items():
            yield self._product(name, width, features)

    def _product(self, name: str, width: int, features: int) -> Launch:
        copies = max(2, -(-COLD_BYTES // (width * features * self.dtype.itemsize)))
        layers = [pack_linear(self.random(width, features)) for _ in range(copies)]
        x = self.random(self.rows, features)
        num_bytes = (width * features + self.rows * (width + features)) * self.dtype.itemsize
        return Launch(f"product {name}", lambda i: layers[i](x), copies, num_bytes)

    def _attention(self, attention: Callable[[int], AttentionBackend]) -> Launch:
        spec, length = self.spec, 1 if self._decodes else min(self.rows, PROMPT)
        keys = KEYS if self._decodes else length
        count = self.rows // length
        pages = -(-keys // PAGE)
        plan = self._plan(attention(count * pages), keys, length, count, pages)
        token = spec.num_kv_heads * spec.head_dim
        read = 2 * count * keys * token * self.dtype.itemsize
        copies = max(2, -(-COLD_BYTES // read)) if self._decodes else 2
        shape = ((count * pages + 1) * PAGE, spec.num_kv_heads, spec.head_dim)
        caches = [(self.random(*shape), self.random(*shape)) for _ in range(copies)]
        q = self.random(self.rows, spec.num_heads, spec.head_dim)
        return Launch(
            f"attention {keys} keys", lambda i: plan.run(q, *caches[i]), copies, read + 2 * q.numel() * q.element_size()
        )

    def _plan(self, backend: AttentionBackend, keys: int, length: int, count: int, pages: int) -> AttentionPlan:
        chunks = [AttentionChunk(keys - length, length, range(i * pages, (i + 1) * pages)) for i in range(count)]
        if not self._decodes or self.device.type != "cuda":
            return backend.plan(*((chunks, []) if self._decodes else ([], chunks)))
        from server.model.flashinfer_attention import FlashInferAttention

        assert isinstance(backend, FlashInferAttention)
        bucket = backend.decode_bucket(count)
        bucket.update(chunks)
        return bucket.plan
