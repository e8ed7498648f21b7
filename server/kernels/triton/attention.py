"""Decode attention over the paged cache: one query token a sequence, the query heads of a KV head as one small product.

A program takes a run of keys of one sequence and KV head. Where a sequence has several runs, each leaves its part in
scratch and the last to arrive merges them in order (Dao et al., 2023, "Flash-Decoding"): which one that is does not
change the result. The grid is fixed, so a captured launch serves any lengths: the length of a run is a value on the
device, chosen afresh each step by `run_tokens`, and programs without keys end at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """A sequence has at most `splits` runs, read `block_tokens` keys at a time. `early`: see `kernels.triton.pdl`;
    the first `prefetch` tiles are then asked into the L2 cache while the kernel ahead still runs."""

    splits: int
    block_tokens: int
    num_warps: int
    num_stages: int
    early: bool = False
    prefetch: int = 0


@dataclass(frozen=True, slots=True)
class DecodeTables:
    """Where each sequence's keys are, int32 on the device: its `pages` from `page_start`[i] to `page_start`[i + 1],
    with `last_page`[i] tokens in the last; `run` [1] is the length of a run, a multiple of the plan's block_tokens."""

    pages: Tensor
    page_start: Tensor
    last_page: Tensor
    run: Tensor


@dataclass(frozen=True, slots=True)
class DecodeScratch:
    """Parts of split sequences: outputs and log-sums in float32, and how many have arrived (zero between launches)."""

    parts: Tensor
    log_sums: Tensor
    arrived: Tensor

    @classmethod
    def allocate(
        cls, batch: int, heads: int, kv_heads: int, head_dim: int, plan: DecodePlan, device: torch.device
    ) -> "DecodeScratch":
        count = batch * heads * plan.splits
        return cls(
            torch.empty(count * head_dim, dtype=torch.float32, device=device),
            torch.empty(count, dtype=torch.float32, device=device),
            torch.zeros(batch * kv_heads, dtype=torch.int32, device=device),
        )


def run_tokens(num_keys: Sequence[int], kv_heads: int, plan: DecodePlan, programs: int) -> int:
    """Keys in a run, so that about `programs` programs share the batch's keys evenly and no sequence has more than
    `plan.splits` runs. A quarter more than an even share: a short second run costs more than it saves."""
    share = -(-sum(num_keys) * kv_heads * 5 // (programs * 4))
    tokens = max(share, -(-max(num_keys) // plan.splits), 1)
    return -(-tokens // plan.block_tokens) * plan.block_tokens


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
    _decode_kernel[(kv_heads, n, plan.splits)](
        q, k_cache, v_cache, out, tables.pages, tables.page_start, tables.last_page, tables.run,
        scratch.parts, scratch.log_sums, scratch.arrived, scale * _LOG2_E,
        KV_HEADS=kv_heads, GROUP=group, D=d, PAGE=page_size, SPLITS=plan.splits,
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
    q, k_cache, v_cache, out, pages, page_start, last_page, run, parts, log_sums, arrived, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_Q: tl.constexpr, MEMBERS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
    EARLY: tl.constexpr, PREFETCH: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Grid (KV_HEADS, sequences, SPLITS); `scale` includes log2 e, as all exponentials are powers of two."""
    head, sequence, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if EARLY:
        gdc_launch_dependents()
    first_page = tl.load(page_start + sequence)
    num_pages = tl.load(page_start + sequence + 1) - first_page
    length = (num_pages - 1) * PAGE + tl.load(last_page + sequence)
    run_length = tl.load(run)
    start = split * run_length
    stop = tl.minimum(start + run_length, length)
    pages += first_page
    block = tl.arange(0, BLOCK_T)
    if PREFETCH > 0:  # noqa: SIM102 (known when compiling; the other is not)
        if start < length:
            line = tl.arange(0, 2)  # two lines of 128 bytes a row, if it has as many
            for ahead in tl.static_range(PREFETCH):
                rows = _cache_rows(pages, tl.minimum(start + ahead * BLOCK_T + block, stop - 1), head, PAGE, KV_HEADS)
                offsets = rows[:, None] * D + (line * (D // 2))[None, :]
                _prefetch((k_cache + offsets).to(tl.int64))
                _prefetch((v_cache + offsets).to(tl.int64))
    if EARLY:
        gdc_wait()  # by every program, also those that do nothing
    if start >= length:
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
    if (SPLITS == 1) | (run_length >= length):
        tl.store(out + query_row[:, None] * D + d[None, :], acc, is_query)
    else:
        group = sequence * KV_HEADS + head
        part_row = (group * SPLITS + split) * GROUP + member
        tl.store(parts + part_row[:, None] * D + d[None, :], acc, is_query)
        tl.store(log_sums + part_row, largest + tl.log2(total), member < GROUP)
        tl.debug_barrier()  # all of this program's part is written before it counts as arrived
        num_runs = (length + run_length - 1) // run_length
        if tl.atomic_add(arrived + group, 1, sem="acq_rel") == num_runs - 1:
            tl.store(arrived + group, 0)
            _merge(out, parts, log_sums, group, num_runs, GROUP, D, SPLITS, MEMBERS, BLOCK_D)


@triton.jit
def _merge(
    out, parts, log_sums, group, num_runs,
    GROUP: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr, MEMBERS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out = Σ parts · 2^log_sum / Σ 2^log_sum over a group's runs; all other programs' parts are read past L1."""
    split = tl.arange(0, SPLITS)
    member = tl.arange(0, MEMBERS)
    d = tl.arange(0, BLOCK_D)
    is_part = (split < num_runs)[:, None] & (member < GROUP)[None, :]
    part_row = (group * SPLITS + split)[:, None] * GROUP + member[None, :]
    is_inside = is_part[:, :, None] & (d < D)[None, None, :]
    part = tl.load(parts + part_row[:, :, None] * D + d[None, None, :], is_inside, 0.0, cache_modifier=".cg")
    log_sum = tl.load(log_sums + part_row, is_part, float("-inf"), cache_modifier=".cg")
    largest = tl.where(member < GROUP, tl.max(log_sum, axis=0), 0.0)
    weight = tl.exp2(log_sum - largest[None, :])
    merged = tl.sum(part * weight[:, :, None], axis=0) / tl.sum(weight, axis=0)[:, None]
    out_row = group * GROUP + member
    tl.store(out + out_row[:, None] * D + d[None, :], merged, (member < GROUP)[:, None] & (d < D)[None, :])
