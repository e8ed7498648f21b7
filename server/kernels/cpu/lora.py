"""The low-rank term of few tokens in one call: each token meets the rank rows of its own adapter, and no others.

In torch a product of a layer takes four to eight operations, of which each costs 10 to 20 µs whatever little it does:
for one token, some twenty times what reading the rows takes. From about a thousand tokens × rank on,
matrix products are faster.

A token's result depends on nothing else in the batch, to the last bit.
"""

import logging
from collections.abc import Callable
from ctypes import CDLL, CFUNCTYPE, Array, addressof, c_int64, c_void_p, cast
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import cfunc, njit, types
from numba.core.caching import FunctionCache
from numba.extending import intrinsic
from torch import Tensor

from server.base.cache import locked
from server.kernels.lora_blocks import LoraBlocks
from server.kernels.lora_rows import LoraRows

log = logging.getLogger(__name__)

# What an element is in memory: Numba has no 16-bit floats, so these stand for bfloat16 and float16.
_ELEMENTS = {torch.bfloat16: types.uint16, torch.float16: types.int16, torch.float32: types.float32}


# Tokens × rank of a step from which on a second thread is worth being woken.
_PARALLEL_SIZE = 64


@dataclass(frozen=True, slots=True)
class BlockTables:
    """A step's blocks, as the kernel takes them, and how many threads it uses."""

    blocks: LoraBlocks
    num_threads: int
    description: "Array[c_int64]"  # how many blocks and tokens, and the addresses of the tables

    @classmethod
    def of(cls, blocks: LoraBlocks) -> "BlockTables":
        tables = (blocks.start, blocks.length, blocks.first_row, blocks.rank, blocks.token_index, blocks.row_index)
        length, rank = blocks.length[: blocks.num_blocks], blocks.rank[: blocks.num_blocks]
        words = [blocks.num_blocks, int(length.sum()), *(table.data_ptr() for table in tables)]
        is_large = int((length * rank).sum()) >= _PARALLEL_SIZE
        num_threads = torch.get_num_threads() if is_large and _openmp() is not None else 1
        return cls(blocks, num_threads, (c_int64 * len(words))(*words))


def lora_add(y: Tensor, x: Tensor, rows: LoraRows, tables: BlockTables) -> None:
    """Add the low-rank term to y [n, sum(widths)] in place, as `reference.lora.lora_add` defines it; x is [n, in].

    All are of one dtype and contiguous. Both products, and the sum with y, are taken in float32 and rounded once. Safe
    from any thread; other Python threads run meanwhile.
    """
    for tensor in (y, x):
        assert tensor.is_contiguous(), f"{tuple(tensor.shape)} with strides {tensor.stride()}"
        assert tensor.dtype == rows.a.dtype, f"{tensor.dtype} for rows of {rows.a.dtype}"
    sizes = rows.description[2], rows.description[3]
    assert (x.shape[1], y.shape[1]) == sizes, f"{tuple(x.shape)} → {tuple(y.shape)} for rows of {sizes}"
    member = compiled(y.dtype)
    addresses = y.data_ptr(), x.data_ptr(), addressof(rows.description), addressof(tables.description)
    if tables.num_threads == 1:
        member((c_int64 * 6)(*addresses, 0, 0))
    else:
        openmp = _openmp()
        assert openmp is not None, "threads without OpenMP"
        task = (c_int64 * 6)(*addresses, openmp.num_threads, openmp.thread_num)
        openmp.parallel(member, task, tables.num_threads, 0)


@cache
def compiled(dtype: torch.dtype) -> Callable[..., None]:
    """`_member` for tensors of a dtype. Compiling takes a second or two, once: the machine code is kept beside this
    file or, where that cannot be written, in the user's cache directory."""
    signature = types.void(types.CPointer(_ELEMENTS[dtype]))
    try:
        function = _kept(signature)
    except (RuntimeError, OSError) as error:  # no directory for it, or no room there
        log.info("the low-rank kernel is compiled at each start: %s", error)
        function = cfunc(signature)(_member)
    call: Any = CFUNCTYPE(None, c_void_p)(function.address)
    call.compiled = function  # owns the machine code
    return call  # type: ignore[no-any-return]


def _kept(signature: Any) -> Any:
    """`_member`, compiled now or at an earlier start; what was cut short there is made again. By one process at a time:
    Numba's index would give the same file to two of them that compile for different dtypes."""
    entries = FunctionCache(_member)
    with locked(Path(entries.cache_path) / "lora.lock"):
        try:
            return cfunc(signature, cache=True)(_member)
        except (EOFError, UnpicklingError):
            entries.flush()
            return cfunc(signature, cache=True)(_member)


class _OpenMP(NamedTuple):
    parallel: Callable[
        ..., None
    ]  # GOMP_parallel(function, its argument, threads, flags): the ABI of libgomp and libomp
    num_threads: int  # addresses of the functions that tell it in a team, and which of its members one is
    thread_num: int


@cache
def _openmp() -> _OpenMP | None:
    """torch's own, whose threads are there already; None where torch has another kind of threads."""
    library = CDLL(torch._C.__file__)
    names = ("GOMP_parallel", "omp_get_num_threads", "omp_get_thread_num")
    if not all(hasattr(library, name) for name in names):
        return None
    parallel, *asked = (getattr(library, name) for name in names)
    parallel.restype = None
    num_threads, thread_num = (cast(function, c_void_p).value or 0 for function in asked)
    return _OpenMP(parallel, num_threads, thread_num)


@intrinsic
def _call(typing, address):
    """What the function at an address says, which takes nothing."""

    def emit(context, builder, signature, arguments):
        function = ir.FunctionType(ir.IntType(32), []).as_pointer()
        return builder.call(builder.inttoptr(arguments[0], function), [])

    return types.int32(address), emit


@intrinsic
def _pointer(typing, address, element):
    """An address, or another pointer, as a pointer to elements of a type."""

    def emit(context, builder, signature, arguments):
        turn = builder.bitcast if isinstance(address, types.CPointer) else builder.inttoptr
        return turn(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(element.dtype)(address, element), emit


@intrinsic
def _load(typing, pointer, index):
    """pointer[index] as float32."""

    def emit(context, builder, signature, arguments):
        value = builder.load(builder.gep(arguments[0], [arguments[1]]))
        if pointer.dtype == types.float32:
            return value
        if pointer.dtype == types.int16:
            return builder.fpext(builder.bitcast(value, ir.HalfType()), ir.FloatType())
        word = ir.IntType(32)
        return builder.bitcast(builder.shl(builder.zext(value, word), word(16)), ir.FloatType())

    return types.float32(pointer, types.intp), emit


@intrinsic
def _store(typing, pointer, index, value):
    """pointer[index] = value, rounded to nearest, ties to even."""

    def emit(context, builder, signature, arguments):
        target, value = builder.gep(arguments[0], [arguments[1]]), arguments[2]
        if pointer.dtype == types.int16:
            value = builder.bitcast(builder.fptrunc(value, ir.HalfType()), ir.IntType(16))
        elif pointer.dtype == types.uint16:
            word = ir.IntType(32)
            bits = builder.bitcast(value, word)
            last = builder.and_(builder.lshr(bits, word(16)), word(1))  # of those that stay
            rounded = builder.lshr(builder.add(builder.add(bits, word(0x7FFF)), last), word(16))
            is_nan = builder.fcmp_unordered("uno", value, value)
            value = builder.trunc(builder.select(is_nan, word(0x7FC0), rounded), ir.IntType(16))
        builder.store(value, target)
        return context.get_dummy_value()

    return types.void(pointer, types.intp, types.float32), emit


@njit(fastmath={"reassoc", "contract", "nsz"})
def _dot(x, a, first, count):
    total = np.float32(0)
    for j in range(count):
        total += x[j] * _load(a, first + j)
    return total


@njit(fastmath={"contract"})
def _add_row(total, row, first, h):
    for j in range(len(total)):
        total[j] += h * _load(row, first + j)


@njit(fastmath={"contract"})
def _add_rows(total, b, r0, r1, r2, r3, h0, h1, h2, h3):
    """Four rows at a time, so that `total` is read and written a quarter as often."""
    for j in range(len(total)):
        pair = h0 * _load(b, r0 + j) + h1 * _load(b, r1 + j)
        total[j] += pair + (h2 * _load(b, r2 + j) + h3 * _load(b, r3 + j))


@njit
def _shrink(h, x, a, rows, num_slices):
    """h[s · rank + i] = x · a[rows[i], s]."""
    rank = len(rows)
    for i in range(rank):
        for s in range(num_slices):
            h[s * rank + i] = _dot(x, a, (rows[i] * num_slices + s) * len(x), len(x))


@njit
def _expand(y, first, b, rows, h, total):
    """y[first + j] += sum over i of h[i] · b[rows[i], j], for j up to the length of `total`, which is scratch."""
    width, rank = len(total), len(rows)
    for j in range(width):
        total[j] = _load(y, first + j)
    whole = rank - rank % 4
    for i in range(0, whole, 4):
        r0, r1, r2, r3 = rows[i] * width, rows[i + 1] * width, rows[i + 2] * width, rows[i + 3] * width
        _add_rows(total, b, r0, r1, r2, r3, h[i], h[i + 1], h[i + 2], h[i + 3])
    for i in range(whole, rank):
        _add_row(total, b, rows[i] * width, h[i])
    for j in range(width):
        _store(y, first + j, total[j])


@njit
def _lora_add(y, x, product, tables, first_place, end):
    """Of the places in token_index, those from first_place to end."""
    num_slices, num_inputs, num_outputs = product[1], product[2], product[3]
    a = _pointer(product[0], y)
    num_blocks = tables[0]
    start, length = _pointer(tables[2], types.int32), _pointer(tables[3], types.int32)
    first_row, rank = _pointer(tables[4], types.int32), _pointer(tables[5], types.int32)
    token_index, row_index = _pointer(tables[6], types.int32), _pointer(tables[7], types.int32)
    max_rank = 0
    for block in range(num_blocks):
        max_rank = max(max_rank, rank[block])
    wide = np.empty(num_inputs, np.float32)
    total = np.empty(num_outputs, np.float32)
    h = np.empty(num_slices * max_rank, np.float32)
    rows = np.empty(max_rank, np.intp)
    for block in range(num_blocks):
        block_rank = rank[block]
        for i in range(block_rank):
            rows[i] = row_index[first_row[block] + i]
        for place in range(max(first_place, start[block]), min(end, start[block] + length[block])):
            token = np.intp(token_index[place])
            for j in range(num_inputs):
                wide[j] = _load(x, token * num_inputs + j)
            _shrink(h, wide, a, rows[:block_rank], num_slices)
            first = token * num_outputs
            for s in range(num_slices):
                width = product[4 + num_slices + s]
                of_slice = h[s * block_rank : (s + 1) * block_rank]
                _expand(y, first, _pointer(product[4 + s], y), rows[:block_rank], of_slice, total[:width])
                first += width


def _member(task):
    """One of a team of threads, each of which takes a share of the tokens. `task` is six words: the addresses of y, x,
    a LoraRows' and a BlockTables' description, and of the functions that tell how many threads there are, which may be
    fewer than were asked for, and which of them this is; 0 for one alone."""
    words = _pointer(task, types.int64)
    team, number = np.int64(1), np.int64(0)
    if words[4] != 0:
        team, number = np.int64(_call(words[4])), np.int64(_call(words[5]))
    y, x = _pointer(words[0], task), _pointer(words[1], task)
    product, tables = _pointer(words[2], types.int64), _pointer(words[3], types.int64)
    num_tokens = tables[1]
    _lora_add(y, x, product, tables, num_tokens * number // team, num_tokens * (number + 1) // team)
