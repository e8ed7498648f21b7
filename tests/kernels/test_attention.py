"""Paged decode attention against torch's in float64; on the CPU by Triton's interpreter."""

from itertools import chain

import pytest
import torch

from tests.kernels.triton_device import DEVICE  # isort: skip  (first: it sets the interpreter up)
from server.kernels.reference.attention import prefill_attention
from server.kernels.triton.attention import DecodePlan, DecodeScratch, DecodeTables, paged_decode, run_tokens

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
PAGE = 4
PLANS = [DecodePlan(1, 16, 1, 1), DecodePlan(4, 16, 1, 1)]


def tables(lengths: list[int], run: int, num_pages: int) -> tuple[DecodeTables, list[list[int]]]:
    """Pages of sequences of these lengths, in no order; and each sequence's slots."""
    free = torch.randperm(num_pages, generator=torch.Generator().manual_seed(1)).tolist()
    pages = [[free.pop() for _ in range(-(-length // PAGE))] for length in lengths]
    starts = [0]
    for own in pages:
        starts.append(starts[-1] + len(own))
    slots = [[page * PAGE + i for page in own for i in range(PAGE)][:n] for own, n in zip(pages, lengths, strict=True)]

    def on_device(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=DEVICE)

    last = [(n - 1) % PAGE + 1 for n in lengths]
    return DecodeTables(on_device(list(chain(*pages))), on_device(starts), on_device(last), on_device([run])), slots


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(8, 2, 16), (3, 1, 24), (2, 2, 16)])
@pytest.mark.parametrize("plan", PLANS, ids=["whole", "split"])
def test_paged_decode(dtype: torch.dtype, heads: int, kv_heads: int, d: int, plan: DecodePlan) -> None:
    generator = torch.Generator(DEVICE).manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=DEVICE, generator=generator).to(dtype)

    lengths = [1, 50, 16, 33, 64]
    run = run_tokens(lengths, kv_heads, plan, programs=8)
    where, slots = tables(lengths, run, num_pages=60)
    k_cache, v_cache = draw(60 * PAGE, kv_heads, d), draw(60 * PAGE, kv_heads, d)
    unused = sorted(set(range(60 * PAGE)) - set(chain(*slots)))
    k_cache[unused] = v_cache[unused] = float("nan")  # of other sequences, or not yet written
    q = draw(len(lengths), heads, d)
    scratch = DecodeScratch.allocate(len(lengths), heads, kv_heads, d, plan, torch.device(DEVICE))
    got = paged_decode(q, k_cache, v_cache, where, scratch, PAGE, d**-0.5, plan)
    everything = torch.ones(1, 1, dtype=torch.bool, device=DEVICE)
    for i, own in enumerate(slots):
        mask = everything.expand(1, len(own))
        want = prefill_attention(q[i : i + 1].double(), k_cache[own].double(), v_cache[own].double(), mask, d**-0.5)
        error = (got[i].double() - want[0]).norm() / want.norm()
        assert error <= TOLERANCE[dtype], f"sequence of {len(own)} keys: {error}"
    again = paged_decode(q, k_cache, v_cache, where, scratch, PAGE, d**-0.5, plan)
    assert torch.equal(got, again), "a second launch finds the scratch as the first did"


@pytest.mark.parametrize("lengths", [[1], [600], [600] * 64, [100_000] + [10] * 63, [4096] * 8])
def test_runs_share_the_keys(lengths: list[int]) -> None:
    plan = DecodePlan(16, 64, 4, 2)
    run = run_tokens(lengths, 8, plan, programs=528)
    assert run % plan.block_tokens == 0
    assert all(-(-length // run) <= plan.splits for length in lengths)


def test_a_batch_that_fills_the_device_is_not_split() -> None:
    assert run_tokens([600] * 64, 8, DecodePlan(4, 64, 4, 2), programs=528) >= 600
