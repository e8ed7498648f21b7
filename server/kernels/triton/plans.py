"""How each low-rank launch is cut into programs: tile sizes, splits, warps and pipeline stages.

`python -m benchmarks.kernels --tune` measures these. No triton here: sizes of buffers follow from plans.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch

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
    """A program takes one block of tokens and, in turn, up to `most_tiles` tiles of `block_n` output columns of one
    slice, or of gate and up."""

    block_n: int
    num_warps: int
    num_stages: int
    most_tiles: int = 8

    def tiles_a_program(self, num_tiles: int) -> int:
        """Of `num_tiles` in all: fewer where not all of a GPU would be used."""
        return max(1, min(self.most_tiles, num_tiles // _PREFILL_PROGRAMS))


@dataclass(frozen=True, slots=True)
class LoraPlan:
    """Both launches of a prefill's fused product; `gate` is the expand that also does SiLU × up."""

    shrink: ShrinkPlan
    expand: ExpandPlan
    gate: ExpandPlan

    def parts(self, in_features: int) -> int:
        """Parts of h that the shrink writes and the expand sums."""
        return self.shrink.splits


EXPAND_ROWS = (16, 64)  # rank rows that a prefill's expand adds at once: by the largest rank, or several times the last
RANK_TILE = 16  # rank rows that a decode's program has in flight at once


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """Both launches of a decode's product. The shrink's program takes one block of tokens, one slice and `block_k`
    input features, the expand's one block and `block_n` output columns of one slice; each asks for its weights at once.
    Where several tokens share them, the expand goes `dot_n` columns at a time. At most `programs` share what there
    is to do, which is as many as a GPU has room for at once. `early`: each is launched before the one ahead of it ends,
    reads its tables and weights and then waits for it (see `kernels.triton.pdl`)."""

    block_k: int
    shrink_warps: int
    block_n: int
    expand_warps: int
    dot_n: int = 256
    programs: int = 528
    early: bool = False

    def parts(self, in_features: int) -> int:
        """Parts of h that the shrink writes and the expand sums."""
        return -(-in_features // self.block_k)


AnyPlan = LoraPlan | DecodePlan

DECODE_BLOCK = 16  # tokens, at most, of a decode's block
# Measured on an H200 by `python -m benchmarks.kernels --tune`, which prints these lines: (kind, input features up to,
# output columns up to, blocks from) → plan.
_HOPPER: Mapping[tuple[str, int, int, int], AnyPlan] = {
    ("decode", 4096, 8192, 0): DecodePlan(256, 4, 512, 2, 128, early=True),
    ("decode", 4096, 8192, 2): DecodePlan(512, 4, 1024, 4, 128, early=True),
    ("decode", 4096, 4096, 0): DecodePlan(256, 4, 512, 2, 128, early=True),
    ("decode", 4096, 4096, 2): DecodePlan(256, 4, 1024, 4, 128, early=True),
    ("decode", 4096, 32768, 0): DecodePlan(256, 4, 512, 2, 128, early=True),
    ("decode", 4096, 32768, 2): DecodePlan(512, 4, 1024, 4, 128, early=True),
    ("decode", 16384, 4096, 0): DecodePlan(256, 4, 512, 2, 128, early=True),
    ("decode", 16384, 4096, 2): DecodePlan(512, 4, 1024, 4, 128, early=True),
}
_HOPPER_CAPABILITY = (9, 0)
_DECODE_BLOCKS_FROM = (2, 0)
_PREFILL_BLOCKS_FROM = (128, 0)

# Where nothing was measured. Decode reads weights: many programs, each with all its loads in flight. Prefill reads and
# writes activations: tiles wide enough for the tensor cores, the input read once for all slices. The expand's were
# measured on an H200 and keep 57 to 164 KiB of tiles, which elsewhere does not fit: there 57 at most.
_HOPPER_EXPANDS = (128, 8, 3), (64, 8, 3)  # columns, warps, stages; the latter with SiLU × up
_OTHER_EXPANDS = (64, 4, 2), (64, 4, 2)
_PREFILL_PROGRAMS = 264  # two for each of an H200's 132 multiprocessors


def lora_plan(
    in_features: int, widths: Sequence[int], num_blocks: int, block_tokens: int, device: torch.device
) -> AnyPlan:
    """The plan of the product [in_features] → widths over `num_blocks` blocks."""
    return _lora_plan(in_features, tuple(widths), num_blocks, block_tokens, device)


def lora_plans(in_features: int, widths: Sequence[int], block_tokens: int, device: torch.device) -> frozenset[AnyPlan]:
    """Every plan that `lora_plan` has for some number of blocks."""
    counts = range(1, _PREFILL_PROGRAMS + 1)  # with more blocks than that, nothing is split any more
    return frozenset(lora_plan(in_features, widths, count, block_tokens, device) for count in counts)


def lora_scratch_size(
    shape: LoraBlocksShape, products: Iterable[tuple[int, Sequence[int]]], device: torch.device
) -> int:
    """float32 elements of scratch that serve every one of `products` (in_features, widths) over blocks of `shape`."""
    return max(
        lora_plan(in_features, widths, shape.blocks, shape.block_tokens, device).parts(in_features)
        * (shape.tokens * len(widths) * shape.max_rank)
        for in_features, widths in products
    )


def plan_key(in_features: int, widths: Sequence[int], num_blocks: int, block_tokens: int) -> tuple[str, int, int, int]:
    """The line of the table that a product's plan stands in."""
    is_decode = block_tokens <= DECODE_BLOCK
    kind = "decode" if is_decode else f"prefill{block_tokens}"
    classes: tuple[int, ...] = _DECODE_BLOCKS_FROM if is_decode else _PREFILL_BLOCKS_FROM
    blocks_from = next(limit for limit in classes if num_blocks >= limit)
    return kind, _power_of_two(in_features), _power_of_two(sum(widths)), blocks_from


@cache
def _lora_plan(
    in_features: int, widths: tuple[int, ...], num_blocks: int, block_tokens: int, device: torch.device
) -> AnyPlan:
    is_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == _HOPPER_CAPABILITY
    if is_hopper:
        measured = _HOPPER.get(plan_key(in_features, widths, num_blocks, block_tokens))
        if measured is not None:
            return measured
    if block_tokens <= DECODE_BLOCK:
        return _decode_plan(in_features, widths, num_blocks)
    return _prefill_plan(in_features, widths, num_blocks, block_tokens, is_hopper)


def _decode_plan(in_features: int, widths: tuple[int, ...], num_blocks: int) -> DecodePlan:
    block_k = min(256 if num_blocks == 1 else 512, max(16, _power_of_two(in_features)))
    block_n = min(512 if num_blocks == 1 else 1024, max(16, _power_of_two(max(widths))))
    return DecodePlan(block_k, 4, block_n, expand_warps=2 if block_n <= 512 else 4, dot_n=min(256, block_n))


def _prefill_plan(
    in_features: int, widths: tuple[int, ...], num_blocks: int, block_tokens: int, is_hopper: bool
) -> LoraPlan:
    block_k = min(64, max(16, _power_of_two(in_features)))
    splits = max(1, min(_PREFILL_PROGRAMS // max(1, num_blocks), 8, in_features // (4 * block_k)))
    splits = 1 << (splits.bit_length() - 1)  # few kernels to compile
    warps = 8 if block_tokens >= 128 else 4
    shrink = ShrinkPlan(block_k, 16 * _power_of_two(len(widths)), 1, splits, warps, num_stages=4)
    expand, gate = (
        ExpandPlan(min(columns, _power_of_two(max(widths))), warps, stages)
        for columns, warps, stages in (_HOPPER_EXPANDS if is_hopper else _OTHER_EXPANDS)
    )
    return LoraPlan(shrink, expand, gate)


def _power_of_two(n: int) -> int:
    """The least power of two that is no less than n."""
    return 1 << (n - 1).bit_length()
