"""How each low-rank launch is cut into programs: tile sizes, splits, warps and pipeline stages.

`python -m benchmarks.kernels --tune` measures these. No triton here: sizes of buffers follow from plans.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from math import prod

from server.kernels.lora_blocks import LoraBlocksShape


@dataclass(frozen=True, slots=True)
class ShrinkPlan:
    """A program takes one block of tokens, one of `splits` parts of the input features, and every `programs`-th tile
    of `block_r` rank rows (those of all slices counted), in steps of `block_k` features."""

    block_k: int
    block_r: int
    programs: int
    splits: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class ExpandPlan:
    """A program takes one block of tokens and `block_n` output columns of one slice, over `block_r` rows at a time."""

    block_n: int
    block_r: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class LoraPlan:
    """Both launches of one fused product."""

    shrink: ShrinkPlan
    expand: ExpandPlan


# Decode reads weights: many programs, each with all its loads in flight. Prefill reads and writes activations: tiles
# wide enough for the tensor cores, the input read once for all slices.
_SPLITS_BY_BLOCKS = ((8, 16), (32, 8), (1 << 30, 4))  # decode: blocks up to, splits of 4096 input features
_PREFILL_PROGRAMS = 264  # two for each of an H200's 132 multiprocessors


@cache
def lora_plan(in_features: int, widths: tuple[int, ...], num_blocks: int, block_tokens: int) -> LoraPlan:
    """The plan of the product [in_features] → widths over `num_blocks` blocks."""
    if block_tokens <= 16:
        return _decode_plan(in_features, widths, num_blocks)
    return _prefill_plan(in_features, widths, num_blocks, block_tokens)


def lora_scratch_size(shape: LoraBlocksShape, products: Iterable[tuple[int, tuple[int, ...]]]) -> int:
    """float32 elements of scratch that serve every one of `products` (in_features, widths) over blocks of `shape`."""
    return max(
        lora_plan(in_features, widths, shape.blocks, shape.block_tokens).shrink.splits
        * prod((shape.tokens, len(widths), shape.max_rank))
        for in_features, widths in products
    )


def _decode_plan(in_features: int, widths: tuple[int, ...], num_blocks: int) -> LoraPlan:
    block_k = min(256, max(16, _power_of_two(in_features)))
    splits = next(splits for limit, splits in _SPLITS_BY_BLOCKS if num_blocks <= limit)
    if in_features > 8192:
        splits *= 2
    splits = max(1, min(splits, in_features // block_k))
    shrink = ShrinkPlan(block_k, 16, len(widths), splits, num_warps=4, num_stages=3)
    block_n = 512 if num_blocks * sum(widths) > 1 << 19 else 256
    return LoraPlan(shrink, ExpandPlan(min(block_n, _power_of_two(max(widths))), 16, num_warps=4, num_stages=2))


def _prefill_plan(in_features: int, widths: tuple[int, ...], num_blocks: int, block_tokens: int) -> LoraPlan:
    block_k = min(64, max(16, _power_of_two(in_features)))
    splits = max(1, min(_PREFILL_PROGRAMS // num_blocks, 8, in_features // (4 * block_k)))
    warps = 8 if block_tokens >= 128 else 4
    shrink = ShrinkPlan(block_k, _power_of_two(16 * len(widths)), 1, splits, warps, num_stages=4)
    return LoraPlan(shrink, ExpandPlan(min(128, _power_of_two(max(widths))), 16, warps, num_stages=2))


def _power_of_two(n: int) -> int:
    """The least power of two that is no less than n."""
    return 1 << (n - 1).bit_length()
