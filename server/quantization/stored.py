"""The tensors in which bitsandbytes stores a 4-bit weight, as transformers' `save_pretrained` writes them.

weight                                        codes, uint8 [out · in / 2, 1] (or the same bytes as another dtype)
weight.absmax                                 float32 [blocks], or uint8 with double quantization
weight.quant_map                              float32 [16]
weight.nested_absmax, weight.nested_quant_map float32 [blocks / 256], float32 [256]: double quantization only
weight.quant_state.bitsandbytes__nf4 | __fp4  uint8: the rest as JSON
"""

import json
from collections.abc import Callable, Container
from typing import Any

import torch
from torch import Tensor

from server.base.quantization import BLOCK_SIZES, QUANT_TYPES
from server.base.weights import NESTED_BLOCK_SIZE
from server.errors import BaseModelError
from server.kernels.four_bit import NestedScales, QuantizedWeight
from server.kernels.reference.four_bit import code_table

STATE = "quant_state.bitsandbytes__"


def stored_quant_type(names: Container[str], path: str) -> str | None:
    """How a checkpoint with tensors `names` holds the module's weight: "nf4", "fp4", or None for not in 4 bits."""
    return next((kind for kind in QUANT_TYPES if f"{path}.weight.{STATE}{kind}" in names), None)


def read_quantized(
    read: Callable[[str], Tensor], path: str, quant_type: str, shape: tuple[int, int], dtype: torch.dtype
) -> QuantizedWeight:
    """The weight [out, in] of a module; `read` gives a tensor as it is stored, on the device, and names one that is
    missing. Raises BaseModelError naming the tensor that does not fit. The dtype in which it was quantized does not
    matter: it dequantizes to `dtype`."""
    weight = f"{path}.weight"
    state = _state(read, f"{weight}.{STATE}{quant_type}")
    _check(state["shape"] == list(shape), weight, f"is {state['shape']} before quantization, config.json says {shape}")
    block_size = state["blocksize"]
    _check(block_size in BLOCK_SIZES, weight, f"blocks of {block_size} are not supported")
    num_blocks = -(-shape[0] * shape[1] // block_size)
    table = code_table(quant_type, torch.device("cpu"))
    stored_table = read(f"{weight}.quant_map").cpu().float()
    fits = stored_table.shape == table.shape and torch.allclose(stored_table, table, rtol=0, atol=1e-4)
    _check(fits, f"{weight}.quant_map", f"is not the code of {quant_type}")
    packed = read(weight).flatten().view(torch.uint8)
    _check(packed.numel() * 2 == shape[0] * shape[1], weight, f"holds {2 * packed.numel()} codes for {shape}")
    absmax = read(f"{weight}.absmax").flatten()
    is_number = absmax.dtype is torch.uint8 or absmax.dtype.is_floating_point
    _check(is_number, f"{weight}.absmax", f"is {absmax.dtype}, neither a float nor uint8")
    _check(absmax.numel() == num_blocks, f"{weight}.absmax", f"has {absmax.numel()} values for {num_blocks} blocks")
    nested = _nested(read, weight, state, num_blocks) if absmax.dtype is torch.uint8 else None
    return QuantizedWeight(
        packed, absmax if nested is not None else absmax.float(), nested, quant_type, block_size, shape, dtype
    )


def stored_tensors(weight: QuantizedWeight) -> dict[str, Tensor]:
    """What to store for a weight: what follows the module's path and a dot → tensor."""
    import bitsandbytes.functional

    quant_state: Any = bitsandbytes.functional.QuantState
    nested = weight.nested
    state = quant_state(
        absmax=weight.absmax,
        shape=torch.Size(weight.shape),
        code=code_table(weight.quant_type, weight.packed.device),
        blocksize=weight.block_size,
        quant_type=weight.quant_type,
        dtype=weight.dtype,
        offset=None if nested is None else nested.offset,
        state2=None
        if nested is None
        else quant_state(absmax=nested.absmax, code=nested.table, blocksize=NESTED_BLOCK_SIZE, dtype=torch.float32),
    )
    tensors = {f"weight.{name}": tensor.cpu() for name, tensor in state.as_dict(packed=True).items()}
    return {"weight": weight.packed.view(-1, 1).cpu(), **tensors}


def _state(read: Callable[[str], Tensor], name: str) -> dict[str, Any]:
    """The state's plain fields."""
    try:
        state: dict[str, Any] = json.loads(bytes(read(name).cpu().tolist()))
        state["shape"] = [int(size) for size in state["shape"]]
        state["blocksize"] = int(state["blocksize"])
        if (offset := state.get("nested_offset")) is not None:
            state["nested_offset"] = float(offset)
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise BaseModelError(f"{name}: is not the state of a quantized weight ({error})") from error
    return state


def _nested(read: Callable[[str], Tensor], weight: str, state: dict[str, Any], num_blocks: int) -> NestedScales:
    size, offset = state.get("nested_blocksize"), state.get("nested_offset")
    _check(offset is not None, weight, "absmax is quantized, but its state has no nested_offset")
    _check(size == NESTED_BLOCK_SIZE, weight, f"nested blocks of {size} are not supported")
    absmax, table = (read(f"{weight}.{name}").float().flatten() for name in ("nested_absmax", "nested_quant_map"))
    expected = -(-num_blocks // NESTED_BLOCK_SIZE)
    _check(absmax.numel() == expected, f"{weight}.nested_absmax", f"has {absmax.numel()} values for {expected} blocks")
    _check(table.numel() == 256, f"{weight}.nested_quant_map", f"has {table.numel()} values, not 256")
    return NestedScales(absmax, table, torch.tensor(offset, device=absmax.device))


def _check(holds: bool, name: str, message: str) -> None:
    if not holds:
        raise BaseModelError(f"{name}: {message}")
