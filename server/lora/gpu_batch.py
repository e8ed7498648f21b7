"""The low-rank term of a step on a GPU: its tables of token blocks, copied to the device once a step."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from server.kernels.lora_blocks import LoraBlocks, LoraBlocksShape, count_blocks
from server.kernels.triton.lora import lora_add, lora_silu_mul
from server.kernels.triton.plans import DECODE_BLOCK, EXPAND_ROWS, lora_plans, lora_scratch_size
from server.lora.batch import TokenSpan
from server.lora.pool import AdapterPool

PREFILL_BLOCK = 64
GRAPH_MAX_RANK = 64  # decodes with an adapter of a larger rank run outside the graphs


@dataclass(frozen=True, slots=True)
class GpuLoraBatch:
    """The term of one step; `blocks` are on the pool's device, `scratch` is float32 there."""

    pool: AdapterPool
    blocks: LoraBlocks
    scratch: Tensor

    def add(self, y: Tensor, x: Tensor, group: str, layer: int) -> None:
        """y [n, out] += the low-rank term of x [n, in], in place, for one fused product of one layer."""
        pool = self.pool.groups[group]
        rows = pool.layers[layer]
        lora_add(y, x, rows.a, rows.b, self.blocks, pool.group.widths, self.scratch)

    def silu_mul(self, y: Tensor, x: Tensor, layer: int) -> Tensor:
        """silu(gate) · up [n, i] of y [n, 2·i], those products, with their low-rank terms; y is used up."""
        rows = self.pool.groups["gate_up"].layers[layer]
        return lora_silu_mul(y, x, rows.a, rows.b, self.blocks, self.scratch)


def build_gpu_lora_batch(pool: AdapterPool, spans: Sequence[TokenSpan]) -> GpuLoraBatch | None:
    """The term of a step outside the graphs; None when no token has an adapter."""
    rows = [span.rows for span in spans]
    distinct = {ranges for ranges in rows if ranges is not None}
    if not distinct:
        return None
    lengths = [span.length for span in spans]
    ranks = [sum(stop - start for start, stop in ranges) for ranges in distinct]
    block_tokens = DECODE_BLOCK if max(lengths) == 1 else PREFILL_BLOCK
    base_tokens = sum(span.length for span in spans if span.rows is None)
    shape = LoraBlocksShape(
        tokens=sum(lengths),
        rows=sum(ranks),
        blocks=count_blocks(lengths, rows, block_tokens),
        block_tokens=block_tokens,
        max_rank=-(-max(ranks) // 16) * 16,
        base_blocks=-(-base_tokens // block_tokens),
    )
    device = _device(pool)
    packed = torch.empty(shape.size, dtype=torch.int32, pin_memory=device.type == "cuda")
    shape.fill(packed.numpy(), lengths, rows)
    return GpuLoraBatch(pool, shape.view(packed.to(device, non_blocking=True)), _scratch(pool, shape))


def warm_up(pool: AdapterPool) -> None:
    """Launch once, on no tokens, every low-rank kernel that a step can need: none is compiled while requests wait."""
    device = _device(pool)
    for name, entry in pool.groups.items():
        in_features, widths = entry.group.in_features, entry.group.widths
        x = torch.zeros(1, in_features, dtype=pool.dtype, device=device)
        y = torch.zeros(1, sum(widths), dtype=pool.dtype, device=device)
        rows = entry.layers[0]
        for block_tokens in (DECODE_BLOCK, PREFILL_BLOCK):
            for plan in lora_plans(in_features, widths, block_tokens, device):
                for max_rank in (*EXPAND_ROWS, EXPAND_ROWS[-1] + 16):
                    shape = LoraBlocksShape(tokens=1, rows=1, blocks=1, block_tokens=block_tokens, max_rank=max_rank)
                    blocks = shape.view(torch.zeros(shape.size, dtype=torch.int32, device=device))
                    scratch = torch.empty(plan.parts(in_features) * len(widths) * max_rank, device=device)
                    lora_add(y, x, rows.a, rows.b, blocks, widths, scratch, plan)
                    if name == "gate_up":
                        lora_silu_mul(y, x, rows.a, rows.b, blocks, scratch, plan)


class GpuLoraTables:
    """The terms of captured decode steps: tables at fixed addresses for each batch size, one scratch for all."""

    def __init__(self, pool: AdapterPool, sizes: Sequence[int]) -> None:
        self._pool = pool
        device = _device(pool)
        self._shapes = {
            size: LoraBlocksShape(
                tokens=size,
                rows=size * GRAPH_MAX_RANK,
                blocks=size,
                block_tokens=DECODE_BLOCK,
                max_rank=GRAPH_MAX_RANK,
            )
            for size in sizes
        }
        self._host = {
            size: torch.zeros(shape.size, dtype=torch.int32, pin_memory=True) for size, shape in self._shapes.items()
        }
        self._device = {
            size: torch.zeros(shape.size, dtype=torch.int32, device=device) for size, shape in self._shapes.items()
        }
        self._scratch = max((_scratch(pool, shape) for shape in self._shapes.values()), key=len)

    def update(self, spans: Sequence[TokenSpan], size: int) -> None:
        """Write the tables of a decode batch. The caller waits until those of the batch before have left the host."""
        self._shapes[size].fill(self._host[size].numpy(), [1] * len(spans), [span.rows for span in spans])
        self._device[size].copy_(self._host[size], non_blocking=True)

    def term(self, size: int) -> GpuLoraBatch:
        """What a capture of `size` tokens adds."""
        return GpuLoraBatch(self._pool, self._shapes[size].view(self._device[size]), self._scratch)


def _scratch(pool: AdapterPool, shape: LoraBlocksShape) -> Tensor:
    products = [(entry.group.in_features, entry.group.widths) for entry in pool.groups.values()]
    return torch.empty(lora_scratch_size(shape, products, _device(pool)), dtype=torch.float32, device=_device(pool))


def _device(pool: AdapterPool) -> torch.device:
    return next(iter(pool.groups.values())).a.device
