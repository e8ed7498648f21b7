"""The low-rank term of a batch in two launches: shrink, h = A x for all slices, then expand, y += B h.

After Punica (Chen et al., 2023, arXiv 2310.18547) and S-LoRA (Sheng et al., 2023, arXiv 2311.03285), over blocks of
tokens that share an adapter. A plan says by which kernels: a decode's (`lora_decode`) or a prefill's (`lora_prefill`).
Nothing here waits for the device.
"""

from collections.abc import Sequence

from torch import Tensor

from server.kernels.lora_blocks import LoraBlocks
from server.kernels.triton.layer import silu_mul
from server.kernels.triton.lora_decode import MAX_SLICES, decode_expand, decode_shrink
from server.kernels.triton.lora_prefill import prefill_expand, prefill_shrink, prefill_silu_mul
from server.kernels.triton.plans import AnyPlan, DecodePlan, lora_plan


def lora_add(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Sequence[Tensor],
    blocks: LoraBlocks,
    widths: Sequence[int],
    scratch: Tensor,
    plan: AnyPlan | None = None,
) -> None:
    """Add the low-rank term to y [n, sum(widths)] in place, as `reference.lora.lora_add` defines it.

    x [n, in], a [rows, slices, in] and b[s] [rows, widths[s]] have y's dtype; h is rounded to it between the two
    products, which accumulate in float32. `scratch` is float32, of `lora_scratch_size` elements, and may hold anything.
    """
    plan = plan or lora_plan(x.shape[1], widths, blocks.num_blocks, blocks.block_tokens, x.device)
    lora_shrink(x, a, blocks, scratch, plan)
    lora_expand(y, b, blocks, x.shape[1], scratch, plan)


def lora_silu_mul(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Sequence[Tensor],
    blocks: LoraBlocks,
    scratch: Tensor,
    plan: AnyPlan | None = None,
) -> Tensor:
    """silu(gate) · up [n, i] of the products y [n, 2·i] with the low-rank term added: what `silu_mul` makes of
    `lora_add`'s, rounded alike, but in a prefill never written. There every token must be in a block. y is used up."""
    widths = [weight.shape[1] for weight in b]
    plan = plan or lora_plan(x.shape[1], widths, blocks.num_blocks, blocks.block_tokens, x.device)
    if isinstance(plan, DecodePlan):
        lora_add(y, x, a, b, blocks, widths, scratch, plan)
        return silu_mul(y)
    lora_shrink(x, a, blocks, scratch, plan)
    return prefill_silu_mul(y, b, blocks, scratch, plan)


def lora_shrink(x: Tensor, a: Tensor, blocks: LoraBlocks, scratch: Tensor, plan: AnyPlan) -> None:
    """scratch [splits, tokens, slices, max_rank] = parts of A x, for tokens in the order of `blocks.token_index`."""
    assert a.is_contiguous(), "a's rows must follow each other"
    assert x.stride(1) == 1, "x must be contiguous along its features"
    assert a.dtype == x.dtype, f"{a.dtype} weights for {x.dtype} input"
    if isinstance(plan, DecodePlan):
        decode_shrink(x, a, blocks, scratch, plan)
    else:
        prefill_shrink(x, a, blocks, scratch, plan)


def lora_expand(
    y: Tensor, b: Sequence[Tensor], blocks: LoraBlocks, in_features: int, scratch: Tensor, plan: AnyPlan
) -> None:
    """y += B h, with h the sum of the parts in scratch, which the shrink made of `in_features`."""
    assert len(b) <= MAX_SLICES, f"{len(b)} slices"
    assert all(weight.is_contiguous() and weight.dtype == y.dtype for weight in b), "b must be contiguous, of y's dtype"
    assert y.stride(1) == 1, "y must be contiguous along its features"
    if isinstance(plan, DecodePlan):
        decode_expand(y, b, blocks, in_features, scratch, plan)
    else:
        prefill_expand(y, b, blocks, scratch, plan)
