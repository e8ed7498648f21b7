"""One fused product under a batch of adapters, on a GPU: its tensors, its launches, and what they cost at least."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from server.kernels.lora_blocks import LoraBlocks, LoraBlocksShape, Ranges, count_blocks
from server.kernels.triton.lora import lora_expand, lora_shrink
from server.kernels.triton.lora_prefill import prefill_silu_mul
from server.kernels.triton.plans import AnyPlan, LoraPlan

MAX_RANK = 64
COLD_BYTES = 320 << 20  # of weights gone over in turn: several times the L2 cache of any GPU
MAX_LAYERS = 512


class Product(NamedTuple):
    """x [in_features] → widths, as one fused layer."""

    name: str
    in_features: int
    widths: tuple[int, ...]

    @property
    def is_gated(self) -> bool:
        """Whether SiLU × up follows, which a prefill's expand does, too."""
        return self.name == "gate_up"


LLAMA_8B = (
    Product("qkv", 4096, (4096, 1024, 1024)),
    Product("o", 4096, (4096,)),
    Product("gate_up", 4096, (14336, 14336)),
    Product("down", 14336, (4096,)),
)


@dataclass(frozen=True, slots=True)
class Case:
    """`batch` sequences of `length` tokens, the i-th with adapter i mod `adapters`, whose ranks go round `ranks`.

    Decode tables are made for as many blocks as there are tokens, as a captured graph's are.
    """

    batch: int
    adapters: int
    length: int
    ranks: tuple[int, ...]

    @property
    def name(self) -> str:
        return (
            f"{self.batch}x{self.adapters}"
            if self.length == 1
            else f"prefill{self.batch * self.length}x{self.adapters}"
        )

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def rank_rows(self) -> int:
        """Of all its adapters."""
        return sum(self.ranks[i % len(self.ranks)] for i in range(self.adapters))


class Cost(NamedTuple):
    """Bytes that must move: each weight of an adapter present, x and y elements once a read and once a write, or what
    SiLU × up makes of y once a write."""

    shrink: int
    expand: int


class Workload:
    """Launches of one product over `layers` layers' weights."""

    def __init__(
        self, product: Product, case: Case, block_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.product, self.case, self.device = product, case, device
        rows, slices, columns = case.rank_rows, len(product.widths), sum(product.widths)
        weight_bytes = rows * (slices * product.in_features + columns) * dtype.itemsize
        self.layers = max(2, min(MAX_LAYERS, -(-COLD_BYTES // weight_bytes)))

        def random(*size: int) -> Tensor:
            return torch.randn(*size, dtype=dtype, device=device).mul_(0.02)

        self.a = random(self.layers, rows, slices, product.in_features)
        self.b = [random(self.layers, rows, width) for width in product.widths]
        self.x, self.y = random(case.tokens, product.in_features), random(case.tokens, columns)
        self.blocks = self._blocks(block_tokens)
        self._scratch = torch.empty(0, device=device)

    @property
    def cost(self) -> Cost:
        a, b, x, y = self.a[0], [weight[0] for weight in self.b], self.x, self.y
        weights = sum(weight.numel() for weight in b)
        written = y.numel() // 2 if self.does_silu_mul else y.numel()
        return Cost((a.numel() + x.numel()) * x.element_size(), (weights + y.numel() + written) * y.element_size())

    @property
    def does_silu_mul(self) -> bool:
        return self.product.is_gated and self.case.length > 1

    def shrink(self, layer: int, plan: AnyPlan) -> None:
        lora_shrink(self.x, self.a[layer], self.blocks, self._room(plan), plan)

    def expand(self, layer: int, plan: AnyPlan) -> None:
        b = [weight[layer] for weight in self.b]
        if isinstance(plan, LoraPlan) and self.does_silu_mul:
            prefill_silu_mul(self.y, b, self.blocks, self._room(plan), plan)
        else:
            lora_expand(self.y, b, self.blocks, self.product.in_features, self._room(plan), plan)

    def both(self, layer: int, plan: AnyPlan) -> None:
        self.shrink(layer, plan)
        self.expand(layer, plan)

    def _room(self, plan: AnyPlan) -> Tensor:
        size = plan.parts(self.product.in_features) * self.case.tokens * len(self.product.widths) * MAX_RANK
        if self._scratch.numel() < size:
            self._scratch = torch.zeros(size, device=self.device)
        return self._scratch

    def _blocks(self, block_tokens: int) -> LoraBlocks:
        case = self.case
        adapters: list[Ranges] = []
        first = 0
        for i in range(case.adapters):
            rank = case.ranks[i % len(case.ranks)]
            adapters.append(((first, first + rank),))
            first += rank
        lengths = [case.length] * case.batch
        rows = [adapters[i % case.adapters] for i in range(case.batch)]
        num_blocks = case.tokens if case.length == 1 else count_blocks(lengths, rows, block_tokens)
        shape = LoraBlocksShape(case.tokens, first, num_blocks, block_tokens, MAX_RANK)
        packed = np.zeros(shape.size, dtype=np.int32)
        shape.fill(packed, lengths, rows)
        return shape.view(torch.from_numpy(packed).to(self.device))


def compile_plan(product: Product, block_tokens: int, dtype: torch.dtype, plan: AnyPlan) -> None:
    """Compile what a plan launches, or find it compiled in Triton's cache, by launching it on nothing."""
    device = torch.device("cuda")
    shape = LoraBlocksShape(tokens=16, rows=16, blocks=1, block_tokens=block_tokens, max_rank=MAX_RANK)
    blocks = shape.view(torch.zeros(shape.size, dtype=torch.int32, device=device))
    x, y = (torch.zeros(1, size, dtype=dtype, device=device) for size in (product.in_features, sum(product.widths)))
    a = torch.zeros(1, len(product.widths), product.in_features, dtype=dtype, device=device)
    b = [torch.zeros(1, width, dtype=dtype, device=device) for width in product.widths]
    scratch = torch.zeros(plan.parts(product.in_features) * 16 * len(b) * MAX_RANK, device=device)
    lora_shrink(x, a, blocks, scratch, plan)
    lora_expand(y, b, blocks, product.in_features, scratch, plan)
    if isinstance(plan, LoraPlan) and product.is_gated:
        prefill_silu_mul(y, b, blocks, scratch, plan)


def time_launches(launch: Callable[[int], object], layers: int, seconds: float = 0.03) -> float:
    """Median seconds of launch(layer), from replays of a CUDA graph that holds one for each layer."""
    launch(0)  # compiled, and its buffers made, before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in range(layers):
            launch(layer)
    first = _elapsed(graph.replay)
    times = [_elapsed(graph.replay) for _ in range(max(3, min(50, int(seconds / max(first, 1e-6)))))]
    return sorted(times)[len(times) // 2] / layers


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written a second by a large copy."""
    source = torch.randn(1 << 30, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = sorted(_elapsed(lambda: target.copy_(source)) for _ in range(9))[4]
    return 2 * source.numel() * source.element_size() / seconds


def _elapsed(work: Callable[[], object]) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3


def cases_named(names: Sequence[str]) -> list[Case]:
    """`64x8`, `64x8mixed`, `prefill32768x64`: batch × adapters, of rank 16 or of 8, 16 and 64 in turn."""
    cases = []
    for name in names:
        plain = name.removesuffix("mixed")
        batch, _, adapters = plain.removeprefix("prefill").partition("x")
        if not (batch.isdecimal() and adapters.isdecimal() and int(batch) and int(adapters)):
            raise ValueError(f"{name}: a case is BATCHxADAPTERS or prefillTOKENSxADAPTERS, with or without mixed")
        length = min(512, int(batch)) if plain != plain.removeprefix("prefill") else 1
        ranks = (16,) if plain == name else (8, 16, 64)
        cases.append(Case(int(batch) // length, min(int(adapters), int(batch) // length), length, ranks))
    return cases
