"""The low-rank term of few tokens in one call: each token meets the rank rows of its own adapter, and no others.

In torch a product of a layer takes four to eight operations, of which each costs 10 to 20 µs whatever little it does:
for one token, some twenty times what reading the rows takes. From about a thousand tokens × rank on,
matrix products are faster.

A token's result depends on nothing else in the batch, to the last bit.
"""

import logging
from collections.abc import Callable
from ctypes import CFUNCTYPE, Array, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import cfunc, njit, types
from numba.extending import intrinsic
from torch import Tensor

from server.kernels.lora_blocks import LoraBlocks
from server.kernels.lora_rows import LoraRows

log = logging.getLogger(__name__)

# What an element is in memory: Numba has no 16-bit floats, so these stand for bfloat16 and float16.
_ELEMENTS = {torch.bfloat16: types.uint16, torch.float16: types.int16, torch.float32: types.float32}


@dataclass(frozen=True, slots=True)
class BlockTables:
    """A step's blocks, as the kernel takes them."""

    blocks: LoraBlocks
    description: "Array[c_int64]"  # how many blocks, and the addresses of the tables

    @classmethod
    def of(cls, blocks: LoraBlocks) -> "BlockTables":
        tables = (blocks.start, blocks.length, blocks.first_row, blocks.rank, blocks.token_index, blocks.row_index)
        words = [blocks.num_blocks, *(table.data_ptr() for table in tables)]
        return cls(blocks, (c_int64 * len(words))(*words))


def lora_add(y: Tensor, x: Tensor, rows: LoraRows, tables: BlockTables) -> None:
    """Add the low-rank term to y [n, sum(widths)] in place, as `reference.lora.lora_add` defines it; x is [n, in].

    All are of one dtype and contiguous. Both products, and the sum with y, are taken in float32 and rounded once. Safe
    from any thread; other Python threads run meanwhile.
    """
    for tensor in (y, x):
        assert tensor.is_contiguous(), f"{tuple(tensor.shape)} with strides {tensor.stride()}"
        assert tensor.dtype == rows.a.dtype, f"{tensor.dtype} for rows of {rows.a.dtype}"
    compiled(y.dtype)(y.data_ptr(), x.data_ptr(), rows.description, tables.description)


@cache
def compiled(dtype: torch.dtype) -> Callable[..., None]:
    """`_lora_add` for tensors of a dtype. Compiling takes a second or two, once: the machine code is kept beside this
    file or, where that cannot be written, in the user's cache directory."""
    pointer = types.CPointer
    signature = types.void(*[pointer(_ELEMENTS[dtype])] * 2, *[pointer(types.int64)] * 2)
    try:
        function = cfunc(signature, cache=True)(_lora_add)
    except RuntimeError as error:  # no directory for it
        log.info("the low-rank kernel is compiled at each start: %s", error)
        function = cfunc(signature)(_lora_add)
    call: Any = CFUNCTYPE(None, *[c_void_p] * 4)(function.address)
    call.compiled = function  # owns the machine code
    return call  # type: ignore[no-any-return]


@intrinsic
def _pointer(typing, address, element):
    """An address as a pointer to elements of a type."""

    def emit(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

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


def _lora_add(y, x, product, tables):
    num_slices, num_inputs, num_outputs = product[1], product[2], product[3]
    a = _pointer(product[0], y)
    num_blocks = tables[0]
    start, length = _pointer(tables[1], types.int32), _pointer(tables[2], types.int32)
    first_row, rank = _pointer(tables[3], types.int32), _pointer(tables[4], types.int32)
    token_index, row_index = _pointer(tables[5], types.int32), _pointer(tables[6], types.int32)
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
        for place in range(start[block], start[block] + length[block]):
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
