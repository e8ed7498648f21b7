"""Search of the low-rank kernels' plans: a small grid a product, in bounded time."""

import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import product as pairs
from multiprocessing import get_context

import torch

from benchmarks.lora_workload import LLAMA_8B, Case, Product, Workload, compile_plan, time_launches
from server.kernels.triton.plans import DECODE_BLOCK, AnyPlan, DecodePlan, ExpandPlan, LoraPlan, ShrinkPlan, plan_key

Key = tuple[str, int, int, int]

# Decode: (features, warps) and (columns, warps, columns where tokens share weights).
_DECODE_SHRINKS = ((256, 4), (512, 4), (512, 8), (1024, 8))
_DECODE_EXPANDS = ((512, 2, 128), (512, 4, 256), (1024, 4, 128), (1024, 4, 256))
# Prefill: (features a step, warps, stages) and (columns, warps).
_PREFILL_SHRINKS = ((64, 4, 3), (64, 4, 5), (64, 8, 3), (128, 4, 2), (128, 8, 3))
_PREFILL_SPLITS = (1, 2)
_PREFILL_EXPANDS = ((64, 4), (64, 8), (128, 4), (128, 8))

_DECODES = ((1, (1,)), (16, (1, 16)), (64, (1, 8, 64)))  # batch, and over how many adapters
_PREFILL = Case(64, 64, 512, (16,))


class _OutOfTimeError(Exception):
    """The budget is spent: what was found so far stands."""


def tune(dtype: torch.dtype, budget: float, workers: int) -> Iterator[tuple[Key, AnyPlan, dict[str, float]]]:
    """The best plan found for each line of the table, with its microseconds a case; ends after about `budget` seconds.

    Plans for one line are judged by the sum, over its cases, of their time over the case's best.
    """
    deadline = time.monotonic() + budget
    jobs = [(product, tokens) for tokens in (DECODE_BLOCK, 64, 128) for product in LLAMA_8B]
    _compile_all(jobs, dtype, workers)
    try:
        for product, block_tokens in jobs:
            if block_tokens == DECODE_BLOCK:
                for batch, adapters in _DECODES:
                    yield _best(product, [Case(batch, n, 1, (16,)) for n in adapters], block_tokens, dtype, deadline)
            else:
                yield _best(product, [_PREFILL], block_tokens, dtype, deadline)
    except _OutOfTimeError:
        return


def _best(
    product: Product, cases: Sequence[Case], block_tokens: int, dtype: torch.dtype, deadline: float
) -> tuple[Key, AnyPlan, dict[str, float]]:
    loads = [Workload(product, case, block_tokens, dtype, torch.device("cuda")) for case in cases]
    plans = _ranked(loads, _shrinks(product, block_tokens), "shrink", deadline)[:3]
    expand = _ranked(loads, _expands(plans[0]), "expand", deadline)[0]
    best = _ranked(loads, [final for plan in plans for final in _finals(plan, expand)], "both", deadline)[0]
    times = {load.case.name: round(1e6 * _time(load, best, "both"), 2) for load in loads}
    return plan_key(product.in_features, product.widths, loads[0].blocks.num_blocks, block_tokens), best, times


def _ranked(loads: Sequence[Workload], plans: Sequence[AnyPlan], part: str, deadline: float) -> list[AnyPlan]:
    """Best first."""
    times: list[list[float]] = []
    for plan in plans:
        if time.monotonic() > deadline:
            raise _OutOfTimeError
        times.append([_time(load, plan, part) for load in loads])
    least = [min(column) for column in zip(*times, strict=True)]
    scores = [sum(t / best for t, best in zip(row, least, strict=True)) for row in times]
    return [plans[i] for i in sorted(range(len(plans)), key=scores.__getitem__)]


def _time(load: Workload, plan: AnyPlan, part: str) -> float:
    launch = {"shrink": load.shrink, "expand": load.expand, "both": load.both}[part]
    return time_launches(partial(launch, plan=plan), load.layers, seconds=0.01)


def _shrinks(product: Product, block_tokens: int) -> list[AnyPlan]:
    """Plans that differ in their shrink."""
    if block_tokens <= DECODE_BLOCK:
        return [DecodePlan(*shrink, *_DECODE_EXPANDS[0]) for shrink in _DECODE_SHRINKS]
    block_r = 16 << (len(product.widths) - 1).bit_length()
    (block_n, expand_warps), *_ = _PREFILL_EXPANDS
    return [
        LoraPlan(ShrinkPlan(block_k, block_r, 1, splits, warps, stages), *[ExpandPlan(block_n, expand_warps, 3)] * 2)
        for (block_k, warps, stages), splits in pairs(_PREFILL_SHRINKS, _PREFILL_SPLITS)
    ]


def _expands(plan: AnyPlan) -> list[AnyPlan]:
    """`plan` with every expand."""
    if isinstance(plan, DecodePlan):
        return [replace(plan, block_n=n, expand_warps=warps, dot_n=dot_n) for n, warps, dot_n in _DECODE_EXPANDS]
    expands = [ExpandPlan(n, warps, 3) for n, warps in _PREFILL_EXPANDS]
    return [replace(plan, expand=expand, gate=expand) for expand in expands]  # a product needs one of them


def _finals(shrink: AnyPlan, expand: AnyPlan) -> list[AnyPlan]:
    """The shrink of one plan with the expand of the other, in each way that they can be launched."""
    if isinstance(shrink, DecodePlan) and isinstance(expand, DecodePlan):
        return [
            replace(expand, block_k=shrink.block_k, shrink_warps=shrink.shrink_warps, early=early)
            for early in (False, True)
        ]
    assert isinstance(shrink, LoraPlan)
    assert isinstance(expand, LoraPlan)
    return [replace(expand, shrink=shrink.shrink)]


def _compile_all(jobs: Sequence[tuple[Product, int]], dtype: torch.dtype, workers: int) -> None:
    """Fill Triton's cache on disk from several processes: compiling one after the other would take all the time."""
    work = [(product, tokens, dtype, plan) for product, tokens in jobs for plan in _grid(product, tokens)]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for done in [pool.submit(compile_plan, *arguments) for arguments in work]:
            done.result()


def _grid(product: Product, block_tokens: int) -> Iterable[AnyPlan]:
    """Plans that between them need every kernel of the search: the expand's depends on the number of parts, too."""
    shrinks = _shrinks(product, block_tokens)
    by_parts = {plan.parts(product.in_features): plan for plan in shrinks}
    for plan in (*shrinks, *(expand for shrink in by_parts.values() for expand in _expands(shrink))):
        yield from _finals(plan, plan)
