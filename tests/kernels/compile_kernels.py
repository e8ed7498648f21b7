"""Compile what the engine launches, for a GPU that need not be there. A process of its own, as Triton either
interprets or compiles. Prints one JSON line: name → most bytes of shared memory.

    python -m tests.kernels.compile_kernels CAPABILITY
"""

import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from server.kernels.lora_blocks import LoraBlocksShape
from server.kernels.reference.layer import rope_table
from server.kernels.triton import layer, lora
from server.kernels.triton.argmax import argmax_rows
from server.kernels.triton.attention import DecodePlan as AttentionPlan
from server.kernels.triton.attention import DecodeScratch, DecodeTables, paged_decode
from server.kernels.triton.gemv import gemv, gemv_silu_mul
from server.kernels.triton.gemv_plans import GemvPlan
from server.kernels.triton.plans import EXPAND_ROWS, AnyPlan, DecodePlan, _prefill_plan

HOPPER = 90
PRODUCTS = {"qkv": (4096, (4096, 1024, 1024)), "gate_up": (4096, (14336, 14336)), "odd": (72, (200,))}


class Device:
    """What Triton asks of a driver before it launches."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def empty(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(*size, dtype=dtype)


def low_rank(plan: AnyPlan, name: str, block_tokens: int, max_rank: int, dtype: torch.dtype = torch.bfloat16) -> None:
    features, widths = PRODUCTS[name]
    shape = LoraBlocksShape(2, max_rank, 1, block_tokens, max_rank)
    blocks = shape.view(torch.zeros(shape.size, dtype=torch.int32))
    a, b = empty(1, len(widths), features, dtype=dtype), [empty(1, width, dtype=dtype) for width in widths]
    scratch = torch.zeros(plan.parts(features) * 2 * len(widths) * max_rank)
    x, y = empty(2, features, dtype=dtype), empty(2, sum(widths), dtype=dtype)
    lora.lora_add(y, x, a, b, blocks, widths, scratch, plan)
    if name == "gate_up":
        lora.lora_silu_mul(y, x, a, b, blocks, scratch, plan)


def launch_all(is_hopper: bool) -> None:
    for name, (features, widths) in PRODUCTS.items():
        plan = _prefill_plan(features, widths, 128, 64, is_hopper)
        for max_rank in (*EXPAND_ROWS, EXPAND_ROWS[-1] + 16):
            low_rank(plan, name, 64, max_rank)
        low_rank(plan, name, 64, EXPAND_ROWS[-1], torch.float32)
    low_rank(DecodePlan(512, 4, 1024, 4, 128, early=is_hopper), "gate_up", 16, 16)
    layer.add_rms_norm(empty(2, 4096), empty(2, 4096), empty(4096), 1e-5)
    layer.silu_mul(empty(2, 2 * 14336))
    for rows in (2, 300):
        cos, sin = (t.unsqueeze(1) for t in rope_table(128, rows, 1e4, None, torch.bfloat16, torch.device("cpu")))
        caches = empty(rows, 8, 128), empty(rows, 8, 128)
        layer.rope_and_store(empty(rows, 6144), (empty(128), empty(128)), 1e-5, cos, sin, torch.arange(rows), *caches)
    gemv(empty(1, 4096), empty(32, 4096), None, GemvPlan(8, 2048, 4, early=is_hopper))
    gemv_silu_mul(empty(1, 4096), empty(32, 4096), GemvPlan(4, 2048, 4, early=is_hopper))
    argmax_rows(empty(2, 5000))
    tables = DecodeTables(torch.zeros(8, dtype=torch.int32), torch.zeros(4, 8, dtype=torch.int32))
    scratch = DecodeScratch.allocate(2, 4, 32, 8, 128, torch.device("cpu"))
    attention = AttentionPlan(64, 4, 2, early=is_hopper, prefetch=int(is_hopper))
    paged_decode(empty(2, 32, 128), empty(64, 8, 128), empty(64, 8, 128), tables, scratch, 16, 0.1, attention)


def compiled(capability: int) -> Iterator[tuple[str, int]]:
    kernels: list[tuple[str, int]] = []
    launch = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = launch(self, *arguments, grid=grid, warmup=True, **options)
        kernels.append((self.__name__, kernel.metadata.shared))
        return kernel

    driver.set_active(Device(capability))
    JITFunction.run = compile_only
    launch_all(capability == HOPPER)
    yield from kernels


if __name__ == "__main__":
    most: dict[str, int] = {}
    for name, shared in compiled(int(sys.argv[1])):
        most[name] = max(shared, most.get(name, 0))
    print(json.dumps(most))
