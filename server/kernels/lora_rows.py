"""Where the rank rows of one fused product of one layer lie."""

from collections.abc import Sequence
from ctypes import Array, c_int64
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class LoraRows:
    """a [rows, slices, in] and b, one [rows, out_s] a slice: views, of memory that stays where it is."""

    a: Tensor
    b: tuple[Tensor, ...]
    description: "Array[c_int64]"  # what a compiled kernel has to know: a, slices, in, out, each b, each out_s

    @classmethod
    def of(cls, a: Tensor, b: Sequence[Tensor]) -> "LoraRows":
        for tensor in (a, *b):
            assert tensor.is_contiguous(), f"{tuple(tensor.shape)} with strides {tensor.stride()}"
            assert tensor.dtype == a.dtype, f"{tensor.dtype} beside {a.dtype}"
        widths = [weight.shape[1] for weight in b]
        words = [a.data_ptr(), len(b), a.shape[2], sum(widths), *(weight.data_ptr() for weight in b), *widths]
        return cls(a, tuple(b), (c_int64 * len(words))(*words))
