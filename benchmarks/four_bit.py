"""Time products with 4-bit weights at Llama-3.1-8B's shapes beside 16-bit ones, one JSON line each; needs a GPU.

    python -m benchmarks.four_bit [--rows 1,16,64,256,4096] [--quant-type nf4] [--bitsandbytes]

`us` is the median time of one product within a replayed CUDA graph that goes over copies of the weight in turn, so
that they come from memory, as they do in a model. `error` is ‖y − exact‖ / ‖exact‖, exact being float64's product with
code times absmax, unrounded. The product `layer` is the sum of the four.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.lora_workload import time_launches
from server.kernels.four_bit import QuantizedWeight, pack_four_bit
from server.kernels.reference.four_bit import code_table

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
BLOCK_SIZE = 64
COPIES_BYTES = 400_000_000  # several times what the L2 cache holds
Form = Callable[[Tensor, int], Tensor]  # rows x and the number of a copy → y
Line = dict[str, object]


def random_weight(shape: tuple[int, int], quant_type: str, device: torch.device) -> QuantizedWeight:
    """Codes that are all as likely, which takes no operator of bitsandbytes."""
    size = shape[0] * shape[1]
    packed = torch.randint(0, 256, (size // 2,), dtype=torch.uint8, device=device)
    absmax = torch.rand(size // BLOCK_SIZE, device=device) + 0.5
    return QuantizedWeight(packed, absmax, None, quant_type, BLOCK_SIZE, shape, torch.bfloat16)


def exact_values(weight: QuantizedWeight) -> Tensor:
    """Code times absmax, float64 [out, in]."""
    nibbles = torch.stack([weight.packed >> 4, weight.packed & 15], dim=-1).view(-1, BLOCK_SIZE).int()
    table = code_table(weight.quant_type, weight.packed.device).double()
    return (table[nibbles] * weight.absmax.double()[:, None]).view(weight.shape)


def forms(weight: QuantizedWeight, dense: Tensor, with_bitsandbytes: bool) -> dict[str, tuple[int, Form]]:
    """The ways to multiply, each over so many copies of the weight."""
    num_copies = max(3, -(-COPIES_BYTES // weight.packed.numel()))
    copies = [replace(weight, packed=weight.packed.clone(), absmax=weight.absmax.clone()) for _ in range(num_copies)]
    layers = [pack_four_bit([copy]) for copy in copies]
    denses = [dense.clone() for _ in range(max(3, -(-COPIES_BYTES // (2 * dense.numel()))))]
    found: dict[str, tuple[int, Form]] = {
        "16-bit": (len(denses), lambda x, i: F.linear(x, denses[i])),
        f"lorikeet {weight.quant_type}": (num_copies, lambda x, i: layers[i](x)),
    }
    if with_bitsandbytes:
        found[f"bitsandbytes {weight.quant_type}"] = (num_copies, _bitsandbytes_products(copies))
    return found


def _run(form: Form, x: Tensor, index: int) -> None:
    form(x, index)


def _bitsandbytes_products(copies: list[QuantizedWeight]) -> Form:
    bitsandbytes: Any = import_module("bitsandbytes")
    first = copies[0]
    code = code_table(first.quant_type, first.packed.device)
    states = [
        bitsandbytes.functional.QuantState(
            absmax=weight.absmax,
            shape=torch.Size(weight.shape),
            code=code,
            blocksize=BLOCK_SIZE,
            quant_type=weight.quant_type,
            dtype=weight.dtype,
        )
        for weight in copies
    ]

    def product(x: Tensor, index: int) -> Tensor:
        out: Tensor = bitsandbytes.matmul_4bit(x, copies[index].packed.view(-1, 1).t(), quant_state=states[index])
        return out

    return product


def lines(rows: list[int], quant_type: str, with_bitsandbytes: bool) -> Iterator[Line]:
    device = torch.device("cuda")
    sums: dict[tuple[int, str], float] = {}
    for name, shape in SHAPES.items():
        weight = random_weight(shape, quant_type, device)
        values = exact_values(weight)
        dense = (values.float()).bfloat16()
        ways = forms(weight, dense, with_bitsandbytes)
        for n in rows:
            x = torch.randn(n, shape[1], device=device).bfloat16()
            exact = x.double() @ values.t()
            for way, (num_copies, form) in ways.items():
                error = ((form(x, 0).double() - exact).norm() / exact.norm()).item()
                us = 1e6 * time_launches(partial(_run, form, x), num_copies)
                sums[n, way] = sums.get((n, way), 0.0) + us
                yield {"rows": n, "product": name, "form": way, "us": round(us, 2), "error": float(f"{error:.3g}")}
            del exact
        del ways, values, dense
        torch.cuda.empty_cache()
    for (n, way), us in sums.items():
        yield {"rows": n, "product": "layer", "form": way, "us": round(us, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,16,64,256,4096", help="comma-separated; default: %(default)s")
    parser.add_argument("--quant-type", choices=("nf4", "fp4"), default="nf4")
    parser.add_argument("--bitsandbytes", action="store_true", help="time its product as well")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: benchmarks.four_bit needs a CUDA device")
    torch.manual_seed(0)
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    for line in lines([int(n) for n in arguments.rows.split(",")], arguments.quant_type, arguments.bitsandbytes):
        print(json.dumps({**line, **about}), flush=True)


if __name__ == "__main__":
    main()
