"""Paged decode attention against torch's in float64; on the CPU by Triton's interpreter."""

from itertools import chain

import pytest
import torch

from tests.kernels.triton_device import DEVICE  # isort: skip  (first: it sets the interpreter up)
from server.kernels.reference.attention import prefill_attention
from server.kernels.triton.attention import (
    DecodePlan,
    DecodeScratch,
    DecodeTables,
    cut_runs,
    max_runs,
    paged_decode,
)

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
PAGE = 4
PLAN = DecodePlan(16, 1, 1)


def tables(lengths: list[int], kv_heads: int, programs: int, num_pages: int) -> tuple[DecodeTables, list[list[int]]]:
    """Pages of sequences of these lengths, in no order; and each sequence's slots."""
    free = torch.randperm(num_pages, generator=torch.Generator().manual_seed(1)).tolist()
    pages = [[free.pop() for _ in range(-(-length // PAGE))] for length in lengths]
    starts = [0]
    for own in pages:
        starts.append(starts[-1] + len(own))
    slots = [[page * PAGE + i for page in own for i in range(PAGE)][:n] for own, n in zip(pages, lengths, strict=True)]
    runs = torch.zeros(max_runs(len(lengths), kv_heads, programs), 8, dtype=torch.int32)
    cut = cut_runs(lengths, starts[:-1], kv_heads, PLAN, programs)
    runs[: len(cut)] = torch.tensor(cut)
    flat = torch.tensor(list(chain(*pages)), dtype=torch.int32)
    return DecodeTables(flat.to(DEVICE), runs.to(DEVICE)), slots


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(8, 2, 16), (3, 1, 24), (2, 2, 16)])
@pytest.mark.parametrize("programs", [8, 160], ids=["split", "by block"])
def test_paged_decode(dtype: torch.dtype, heads: int, kv_heads: int, d: int, programs: int) -> None:
    generator = torch.Generator(DEVICE).manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=DEVICE, generator=generator).to(dtype)

    lengths = [1, 50, 16, 33, 300]  # the last: more parts than are merged at a time
    where, slots = tables(lengths, kv_heads, programs, num_pages=120)
    k_cache, v_cache = draw(120 * PAGE, kv_heads, d), draw(120 * PAGE, kv_heads, d)
    unused = sorted(set(range(120 * PAGE)) - set(chain(*slots)))
    k_cache[unused] = v_cache[unused] = float("nan")  # of other sequences, or not yet written
    q = draw(len(lengths), heads, d)
    scratch = DecodeScratch.allocate(len(lengths), len(where.runs), heads, kv_heads, d, torch.device(DEVICE))
    got = paged_decode(q, k_cache, v_cache, where, scratch, PAGE, d**-0.5, PLAN)
    everything = torch.ones(1, 1, dtype=torch.bool, device=DEVICE)
    for i, own in enumerate(slots):
        mask = everything.expand(1, len(own))
        want = prefill_attention(q[i : i + 1].double(), k_cache[own].double(), v_cache[own].double(), mask, d**-0.5)
        error = (got[i].double() - want[0]).norm() / want.norm()
        assert error <= TOLERANCE[dtype], f"sequence of {len(own)} keys: {error}"
    again = paged_decode(q, k_cache, v_cache, where, scratch, PAGE, d**-0.5, PLAN)
    assert torch.equal(got, again), "a second launch finds the scratch as the first did"


@pytest.mark.parametrize("lengths", [[1], [600], [600] * 64, [100_000] + [10] * 63, [4096] * 8, [1] * 128])
@pytest.mark.parametrize("kv_heads", [1, 8])
def test_runs_share_the_keys(lengths: list[int], kv_heads: int) -> None:
    plan = DecodePlan(64, 4, 2)
    runs = cut_runs(lengths, list(range(len(lengths))), kv_heads, plan, programs=528)
    assert len(runs) <= max_runs(len(lengths), kv_heads, 528)
    covered = [[0, 0] for _ in lengths]  # keys and runs so far
    for sequence, pages, start, stop, number, _, *_ in runs:
        assert (pages, start, number) == (sequence, *covered[sequence])
        assert start < stop
        covered[sequence] = [stop, number + 1]
    assert [keys for keys, _ in covered] == lengths
    assert all(count == covered[sequence][1] for sequence, _, _, _, _, count, *_ in runs)
    longest = max(stop - start for _, _, start, stop, *_ in runs)
    assert longest < sum(lengths) * kv_heads * 5 / (528 * 4) + plan.block_tokens


def test_a_batch_that_fills_the_device_is_not_split() -> None:
    runs = cut_runs([600] * 64, [0] * 64, 8, DecodePlan(64, 4, 2), programs=528)
    assert len(runs) == 64
