"""Decode attention over the paged cache: one query token a sequence, the query heads of a KV head as one small product.

A program takes a run of keys of one sequence and KV head. Where a sequence has several runs, each leaves its part in
scratch and the last to arrive merges them in order (Dao et al., 2023, "Flash-Decoding"): which one that is does not
change the result. The host cuts the runs afresh each step (`cut_runs`), of one length over the batch, so that one long
sequence among short ones keeps as many programs busy as it needs. The grid is fixed, so that a captured launch serves
any lengths: programs without a run end at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_LOG2_E = 1.4426950408889634
RUN_FIELDS = 8  # int32 values that tell a run


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """Keys are read `block_tokens` at a time. `early`: see `kernels.triton.pdl`; the first `prefetch` tiles are then
    asked into the L2 cache while the kernel ahead still runs. Parts are merged `merged` at a time: 16 take 157
    registers, which leaves room for three programs of four warps a multiprocessor, 4 take 96, which leaves five."""

    block_tokens: int
    num_warps: int
    num_stages: int
    early: bool = False
    prefetch: int = 0
    merged: int = 4


@dataclass(frozen=True, slots=True)
class DecodeTables:
    """Which keys there are, int32 on the device: the `pages` of all sequences, one after the other, and `runs` [m, 8],
    each a sequence, where its pages begin, the first key and the one past the last, the run's number among the
    sequence's, how many those are, and two unused. A sequence's runs follow each other; zeros are no run."""

    pages: Tensor
    runs: Tensor


@dataclass(frozen=True, slots=True)
class DecodeScratch:
    """Parts of split sequences: outputs and log-sums in float32, and how many have arrived (zero between launches)."""

    parts: Tensor
    log_sums: Tensor
    arrived: Tensor

    @classmethod
    def allocate(
        cls, batch: int, num_runs: int, heads: int, kv_heads: int, head_dim: int, device: torch.device
    ) -> "DecodeScratch":
        return cls(
            torch.empty(num_runs * heads * head_dim, dtype=torch.float32, device=device),
            torch.empty(num_runs * heads, dtype=torch.float32, device=device),
            torch.zeros(batch * kv_heads, dtype=torch.int32, device=device),
        )


def max_runs(batch: int, kv_heads: int, programs: int) -> int:
    """The most runs that `cut_runs` makes of a batch."""
    return batch + programs * 4 // (kv_heads * 5)


def cut_runs(
    num_keys: Sequence[int], page_start: Sequence[int], kv_heads: int, plan: DecodePlan, programs: int
) -> list[list[int]]:
    """Rows of `DecodeTables.runs`, so that about `programs` programs share the batch's keys evenly. A run is a quarter
    longer than an even share: a short second run costs more than it saves."""
    share = max(-(-sum(num_keys) * kv_heads * 5 // (programs * 4)), 1)
    length = -(-share // plan.block_tokens) * plan.block_tokens
    runs: list[list[int]] = []
    for sequence, (keys, pages) in enumerate(zip(num_keys, page_start, strict=True)):
        count = -(-keys // length)
        runs += [[sequence, pages, i * length, min((i + 1) * length, keys), i, count, 0, 0] for i in range(count)]
    return runs


def paged_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tables: DecodeTables,
    scratch: DecodeScratch,
    page_size: int,
    scale: float,
    plan: DecodePlan,
) -> Tensor:
    """q [n, heads, d] over caches [slots, kv_heads, d] → [n, heads, d]; all contiguous. Scores are in float32."""
    n, heads, d = q.shape
    kv_heads = k_cache.shape[1]
    assert all(x.is_contiguous() for x in (q, k_cache, v_cache)), "q and caches must be contiguous"
    out = torch.empty_like(q)
    if n == 0:
        return out
    group = heads // kv_heads
    _decode_kernel[(kv_heads, len(tables.runs))](
        q, k_cache, v_cache, out, tables.pages, tables.runs,
        scratch.parts, scratch.log_sums, scratch.arrived, scale * _LOG2_E,
        KV_HEADS=kv_heads, GROUP=group, D=d, PAGE=page_size, RUN=RUN_FIELDS, MERGED=plan.merged,
        BLOCK_Q=max(16, triton.next_power_of_2(group)), MEMBERS=triton.next_power_of_2(group),
        BLOCK_D=max(16, triton.next_power_of_2(d)), BLOCK_T=plan.block_tokens,
        EARLY=plan.early, PREFETCH=plan.prefetch if plan.early else 0,
        WIDEN=q.dtype is torch.bfloat16 and bool(triton.knobs.runtime.interpret),
        launch_pdl=plan.early, num_warps=plan.num_warps, num_stages=plan.num_stages,
    )  # fmt: skip
    return out


@triton.jit
def _dot(left, right, WIDEN: tl.constexpr):
    if WIDEN:  # the interpreter keeps bfloat16 as integers, and multiplies those
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, input_precision="ieee")


@triton.jit
def _cache_rows(pages, tokens, head, PAGE: tl.constexpr, KV_HEADS: tl.constexpr):
    """Rows of the cache, seen as [slots · KV_HEADS, d], of a sequence's tokens."""
    page = tl.load(pages + tokens // PAGE).to(tl.int64)
    return (page * PAGE + tokens % PAGE) * KV_HEADS + head


@triton.jit
def _prefetch(address):
    """Ask for the lines at these addresses; what they hold is read later, so it may still change."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit(do_not_specialize=["scale"])
def _decode_kernel(
    q, k_cache, v_cache, out, pages, runs, parts, log_sums, arrived, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, RUN: tl.constexpr,
    MERGED: tl.constexpr, BLOCK_Q: tl.constexpr, MEMBERS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
    EARLY: tl.constexpr, PREFETCH: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Grid (KV_HEADS, runs); `scale` includes log2 e, as all exponentials are powers of two."""
    head, index = tl.program_id(0), tl.program_id(1)
    if EARLY:
        gdc_launch_dependents()
    run = runs + index * RUN
    sequence = tl.load(run)
    pages += tl.load(run + 1)
    start = tl.load(run + 2)
    stop = tl.load(run + 3)
    split = tl.load(run + 4)
    num_runs = tl.load(run + 5)
    block = tl.arange(0, BLOCK_T)
    if PREFETCH > 0:  # noqa: SIM102 (known when compiling; the other is not)
        if start < stop:
            line = tl.arange(0, 2)  # two lines of 128 bytes a row, if it has as many
            for ahead in tl.static_range(PREFETCH):
                rows = _cache_rows(pages, tl.minimum(start + ahead * BLOCK_T + block, stop - 1), head, PAGE, KV_HEADS)
                offsets = rows[:, None] * D + (line * (D // 2))[None, :]
                _prefetch((k_cache + offsets).to(tl.int64))
                _prefetch((v_cache + offsets).to(tl.int64))
    if EARLY:
        gdc_wait()  # by every program, also those that do nothing
    if start >= stop:
        return
    d = tl.arange(0, BLOCK_D)
    member = tl.arange(0, BLOCK_Q)
    is_query = (member < GROUP)[:, None] & (d < D)[None, :]
    query_row = (sequence * KV_HEADS + head) * GROUP + member  # heads of a group follow each other
    query = tl.load(q + query_row[:, None] * D + d[None, :], is_query, 0.0)
    largest = tl.full((BLOCK_Q,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_Q,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_Q, BLOCK_D), dtype=tl.float32)
    for token in range(start, stop, BLOCK_T):
        is_key = token + block < stop
        rows = _cache_rows(pages, tl.minimum(token + block, stop - 1), head, PAGE, KV_HEADS)
        offsets = rows[:, None] * D + d[None, :]
        is_inside = is_key[:, None] & (d < D)[None, :]
        keys = tl.load(k_cache + offsets, is_inside, 0.0)
        values = tl.load(v_cache + offsets, is_inside, 0.0)
        scores = _dot(query, tl.trans(keys), WIDEN) * scale
        scores = tl.where(is_key[None, :], scores, float("-inf"))
        higher = tl.maximum(largest, tl.max(scores, axis=1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(largest - higher)
        total = total * shrink + tl.sum(weights, axis=1)
        acc = acc * shrink[:, None] + _dot(weights.to(values.dtype), values, WIDEN)
        largest = higher
    acc = acc / total[:, None]
    if num_runs == 1:
        tl.store(out + query_row[:, None] * D + d[None, :], acc, is_query)
    else:
        part_row = (index * KV_HEADS + head) * GROUP + member
        tl.store(parts + part_row[:, None] * D + d[None, :], acc, is_query)
        tl.store(log_sums + part_row, largest + tl.log2(total), member < GROUP)
        tl.debug_barrier()  # all of this program's part is written before it counts as arrived
        group = sequence * KV_HEADS + head
        if tl.atomic_add(arrived + group, 1, sem="acq_rel") == num_runs - 1:
            tl.store(arrived + group, 0)
            first_row = ((index - split) * KV_HEADS + head) * GROUP
            _merge(out, parts, log_sums, group, first_row, num_runs, KV_HEADS, GROUP, D, MERGED, MEMBERS, BLOCK_D)


@triton.jit
def _merge(
    out, parts, log_sums, group, first_row, num_runs,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, MERGED: tl.constexpr, MEMBERS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out = Σ parts · 2^log_sum / Σ 2^log_sum over a group's runs; all other programs' parts are read past L1."""
    member = tl.arange(0, MEMBERS)
    d = tl.arange(0, BLOCK_D)
    largest = tl.full((MEMBERS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((MEMBERS,), dtype=tl.float32)
    acc = tl.zeros((MEMBERS, BLOCK_D), dtype=tl.float32)
    for first in tl.range(0, num_runs, MERGED, num_stages=1):  # not pipelined: shared memory is for keys and values
        split = first + tl.arange(0, MERGED)
        is_part = (split < num_runs)[:, None] & (member < GROUP)[None, :]
        part_row = first_row + split[:, None] * (KV_HEADS * GROUP) + member[None, :]
        is_inside = is_part[:, :, None] & (d < D)[None, None, :]
        part = tl.load(parts + part_row[:, :, None] * D + d[None, None, :], is_inside, 0.0, cache_modifier=".cg")
        log_sum = tl.load(log_sums + part_row, is_part, float("-inf"), cache_modifier=".cg")
        higher = tl.where(member < GROUP, tl.maximum(largest, tl.max(log_sum, axis=0)), 0.0)
        weight = tl.exp2(log_sum - higher[None, :])
        shrink = tl.exp2(largest - higher)
        total = total * shrink + tl.sum(weight, axis=0)
        acc = acc * shrink[:, None] + tl.sum(part * weight[:, :, None], axis=0)
        largest = higher
    out_row = group * GROUP + member
    inside = (member < GROUP)[:, None] & (d < D)[None, :]
    tl.store(out + out_row[:, None] * D + d[None, :], acc / tl.where(member < GROUP, total, 1.0)[:, None], inside)
