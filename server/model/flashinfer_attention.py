"""Paged attention on CUDA by FlashInfer (Ye et al., 2025, arXiv 2501.01005). Imported only where a GPU is used.

FlashInfer compiles its kernels on first use of a shape and keeps them in the user's cache: `FlashInferAttention`
does so when it is made, at start-up.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import flashinfer
import torch
from torch import Tensor

from server.base.spec import ModelSpec
from server.kernels.triton.attention_plans import decode_plan
from server.model.attention import AttentionChunk, DecodeBucket, page_tables
from server.model.paged_decode import PagedDecodeBucket

WORKSPACE_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class FlashInferPlan:
    """One step's attention; `wrapper` has been planned."""

    wrapper: flashinfer.BatchPrefillWithPagedKVCacheWrapper | flashinfer.BatchDecodeWithPagedKVCacheWrapper
    page_size: int

    def run(self, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        pages = (-1, self.page_size, *k_cache.shape[1:])
        out = torch.empty_like(q)  # without it a prefill's wrapper fills one with zeros first
        self.wrapper.run(q, (k_cache.view(pages), v_cache.view(pages)), out=out)
        return out


class FlashInferAttention:
    """Plans steps with prefills afresh, and decode batches of fixed size for CUDA graphs (`decode_bucket`)."""

    def __init__(
        self, spec: ModelSpec, page_size: int, num_pages: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.page_size = page_size
        self.num_pages = num_pages
        self.device = device
        self.max_pages = min(num_pages, -(-spec.max_position // page_size))  # of a sequence
        self._spec = spec
        self._shape = (spec.num_heads, spec.num_kv_heads, spec.head_dim, page_size)
        self._dtype = dtype
        self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._prefill = flashinfer.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD")
        self._copied = torch.cuda.Event()

    def plan(self, decodes: Sequence[AttentionChunk], prefills: Sequence[AttentionChunk]) -> FlashInferPlan:
        """Decodes are prefills of one token: a step that has prefills is not bound by its decodes."""
        chunks = [*decodes, *prefills]
        pages, page_start, last_page = page_tables(chunks, self.page_size)
        token_start = [0]
        for chunk in chunks:
            token_start.append(token_start[-1] + chunk.length)
        self._copied.synchronize()  # the plan before has left FlashInfer's buffer on the host, which has room for one
        heads, kv_heads, head_dim, page_size = self._shape
        self._prefill.plan(
            _host(token_start),
            _host(page_start),
            _host(pages).to(self.device, non_blocking=True),
            _host(last_page),
            heads,
            kv_heads,
            head_dim,
            page_size,
            causal=True,
            sm_scale=self._spec.softmax_scale,
            q_data_type=self._dtype,
            kv_data_type=self._dtype,
        )
        self._copied.record()
        return FlashInferPlan(self._prefill, page_size)

    def decode_bucket(self, batch: int) -> DecodeBucket:
        """Decode attention for exactly `batch` sequences: by FlashInfer where no own kernel was measured faster."""
        plan = decode_plan(batch, *self._shape, self._dtype, self.device)
        if plan is None:
            return FlashInferBucket(self, batch)
        cores = torch.cuda.get_device_properties(self.device).multi_processor_count
        return PagedDecodeBucket(
            self._spec, plan, batch, self.page_size, self.max_pages, self.num_pages, cores, self.device
        )

    def plan_decode(self, wrapper: flashinfer.BatchDecodeWithPagedKVCacheWrapper, *tables: Tensor) -> None:
        """Plan a bucket's wrapper: page starts and last page lengths in pinned host memory, pages on the device."""
        page_start, pages, last_page = tables
        wrapper.plan(
            page_start,
            pages,
            last_page,
            *self._shape,
            sm_scale=self._spec.softmax_scale,
            q_data_type=self._dtype,
            kv_data_type=self._dtype,
        )

    @property
    def shares_kv_heads(self) -> bool:
        """Whether enough query heads share a KV head that a decode is faster as a small product on tensor cores."""
        heads, kv_heads = self._shape[:2]
        return heads // kv_heads >= 4

    @property
    def workspace(self) -> Tensor:
        return self._workspace


class FlashInferBucket:
    """Page tables of a decode batch at fixed addresses, and FlashInfer's plan for it; see `DecodeBucket`."""

    def __init__(self, attention: FlashInferAttention, batch: int) -> None:
        self._attention = attention
        self._batch = batch
        device = attention.device
        self._pages = torch.zeros(batch * attention.max_pages, dtype=torch.int32, device=device)
        self._pages_host = torch.zeros(len(self._pages), dtype=torch.int32, pin_memory=True)
        self._page_start_host = torch.zeros(batch + 1, dtype=torch.int32, pin_memory=True)
        self._last_page_host = torch.ones(batch, dtype=torch.int32, pin_memory=True)
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            attention.workspace,
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=attention.shares_kv_heads,
            paged_kv_indptr_buffer=torch.zeros(batch + 1, dtype=torch.int32, device=device),
            paged_kv_indices_buffer=self._pages,
            paged_kv_last_page_len_buffer=torch.ones(batch, dtype=torch.int32, device=device),
        )
        self.plan = FlashInferPlan(wrapper, attention.page_size)

    def update(self, chunks: Sequence[AttentionChunk]) -> None:
        """Plan for these decodes. The caller waits until the copies of the update before have left the host."""
        pages, page_start, last_page = page_tables(chunks, self._attention.page_size)
        padding = self._batch - len(chunks)  # those attend to one token of the spare page
        pages += [self._attention.num_pages] * padding
        page_start += range(page_start[-1] + 1, page_start[-1] + 1 + padding)
        last_page += [1] * padding
        count = len(pages)
        self._pages_host[:count] = torch.tensor(pages, dtype=torch.int32)
        self._page_start_host.copy_(torch.tensor(page_start, dtype=torch.int32))
        self._last_page_host.copy_(torch.tensor(last_page, dtype=torch.int32))
        self._pages[:count].copy_(self._pages_host[:count], non_blocking=True)
        self._attention.plan_decode(self.plan.wrapper, self._page_start_host, self._pages[:count], self._last_page_host)


def _host(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32).pin_memory()
