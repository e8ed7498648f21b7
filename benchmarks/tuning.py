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
from server.kernels.triton.plans import ExpandPlan, LoraPlan, ShrinkPlan, plan_key

Key = tuple[str, int, int, int]

# (features a step, warps, stages) and (columns, warps)
_DECODE_SHRINKS = ((128, 2, 4), (128, 4, 4), (256, 4, 2), (256, 4, 3), (512, 4, 2), (512, 8, 2))
_DECODE_SPLITS = (4, 8, 16)
_DECODE_EXPANDS = ((128, 4), (256, 4), (256, 8), (512, 8))
_PREFILL_SHRINKS = ((64, 4, 3), (64, 4, 5), (64, 8, 3), (128, 4, 2), (128, 8, 3))
_PREFILL_SPLITS = (1, 2)
_PREFILL_EXPANDS = ((64, 4), (128, 4), (128, 8), (256, 8))

_DECODES = ((1, (1,)), (16, (1, 16)), (64, (1, 8, 64)))  # batch, and over how many adapters
_PREFILL = Case(64, 64, 512, (16,))


class _OutOfTimeError(Exception):
    """The budget is spent: what was found so far stands."""


def tune(dtype: torch.dtype, budget: float, workers: int) -> Iterator[tuple[Key, LoraPlan, dict[str, float]]]:
    """The best plan found for each line of the table, with its microseconds a case; ends after about `budget` seconds.

    Plans for one line are judged by the sum, over its cases, of their time over the case's best.
    """
    deadline = time.monotonic() + budget
    jobs = [(product, tokens) for tokens in (16, 64, 128) for product in LLAMA_8B]
    _compile_all(jobs, dtype, workers)
    try:
        for product, block_tokens in jobs:
            if block_tokens == 16:
                for batch, adapters in _DECODES:
                    yield _best(product, [Case(batch, n, 1, (16,)) for n in adapters], block_tokens, dtype, deadline)
            else:
                yield _best(product, [_PREFILL], block_tokens, dtype, deadline)
    except _OutOfTimeError:
        return


def _best(
    product: Product, cases: Sequence[Case], block_tokens: int, dtype: torch.dtype, deadline: float
) -> tuple[Key, LoraPlan, dict[str, float]]:
    loads = [Workload(product, case, block_tokens, dtype, torch.device("cuda")) for case in cases]
    plans = list(_shrinks(product, block_tokens))
    plans = _ranked(loads, plans, "shrink", deadline)[:3]
    expands = [replace(plans[0], expand=expand) for expand in _expands(block_tokens)]
    expand = _ranked(loads, expands, "expand", deadline)[0].expand
    finals = [replace(plan, expand=expand, early=early) for plan, early in pairs(plans, _earlies(block_tokens))]
    best = _ranked(loads, finals, "both", deadline)[0]
    times = {load.case.name: round(1e6 * _time(load, best, "both"), 2) for load in loads}
    return plan_key(product.in_features, product.widths, loads[0].blocks.num_blocks, block_tokens), best, times


def _ranked(loads: Sequence[Workload], plans: Sequence[LoraPlan], part: str, deadline: float) -> list[LoraPlan]:
    """Best first."""
    times: list[list[float]] = []
    for plan in plans:
        if time.monotonic() > deadline:
            raise _OutOfTimeError
        times.append([_time(load, plan, part) for load in loads])
    least = [min(column) for column in zip(*times, strict=True)]
    scores = [sum(t / best for t, best in zip(row, least, strict=True)) for row in times]
    return [plans[i] for i in sorted(range(len(plans)), key=scores.__getitem__)]


def _time(load: Workload, plan: LoraPlan, part: str) -> float:
    launch = {"shrink": load.shrink, "expand": load.expand, "both": load.both}[part]
    return time_launches(partial(launch, plan=plan), load.layers, seconds=0.01)


def _shrinks(product: Product, block_tokens: int) -> Iterable[LoraPlan]:
    slices, expand = len(product.widths), next(iter(_expands(block_tokens)))
    if block_tokens > 16:
        block_r = 16 << (slices - 1).bit_length()
        for (block_k, warps, stages), splits in pairs(_PREFILL_SHRINKS, _PREFILL_SPLITS):
            yield LoraPlan(ShrinkPlan(block_k, block_r, 1, splits, warps, stages), expand)
        return
    for (block_k, warps, stages), splits in pairs(_DECODE_SHRINKS, _DECODE_SPLITS):
        splits *= 2 if product.in_features > 8192 else 1
        if splits * block_k <= product.in_features:
            yield LoraPlan(ShrinkPlan(block_k, 16, slices, splits, warps, stages), expand)


def _expands(block_tokens: int) -> Iterable[ExpandPlan]:
    grid = _DECODE_EXPANDS if block_tokens == 16 else _PREFILL_EXPANDS
    return [ExpandPlan(block_n, 16, warps, 1, ahead) for (block_n, warps), ahead in pairs(grid, (False, True))]


def _earlies(block_tokens: int) -> tuple[bool, ...]:
    """Prefill's launches are too long for their beginning to matter."""
    return (False, True) if block_tokens == 16 else (False,)


def _compile_all(jobs: Sequence[tuple[Product, int]], dtype: torch.dtype, workers: int) -> None:
    """Fill Triton's cache on disk from several processes: compiling one after the other would take all the time."""
    work = [(product, tokens, dtype, plan) for product, tokens in jobs for plan in _grid(product, tokens)]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for done in [pool.submit(compile_plan, *arguments) for arguments in work]:
            done.result()


def _grid(product: Product, block_tokens: int) -> Iterable[LoraPlan]:
    """Plans that between them need every kernel of the search: the expand's depends on the number of splits, too."""
    shrinks, expands = list(_shrinks(product, block_tokens)), list(_expands(block_tokens))
    by_splits = {plan.shrink.splits: plan for plan in shrinks}
    kernels = {(plan.shrink.block_k, plan.shrink.num_warps, plan.shrink.num_stages): plan for plan in shrinks}
    for early in _earlies(block_tokens):
        yield from (replace(plan, early=early) for plan in kernels.values())
        yield from (replace(plan, expand=e, early=early) for plan in by_splits.values() for e in expands)
