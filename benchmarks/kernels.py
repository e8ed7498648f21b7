"""Time the kernels at Llama-3.1-8B's shapes, one JSON line a launch; needs a GPU.

    python -m benchmarks.kernels [--cases 64x64,prefill32768x64,layer64] [--dtype bfloat16]
    python -m benchmarks.kernels --tune [--budget 150]   # prints lines for the table in server/kernels/triton/plans.py

`us` is the median time of one launch within a replayed CUDA graph that goes over many layers' weights in turn, so that
these come from memory, as they do in a model. `bytes` counts each weight of an adapter present, and each element of
x and y, once a read and once a write (in decode these stand in the L2 cache); `share` is bytes over time over the
bandwidth that a large copy reaches here. The product `all` is a model's 32 layers, in milliseconds (`ms`). A case
`layerROWS` has no adapters: all else that a step of so many tokens launches (`benchmarks.layer_workload`).
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import astuple
from functools import partial

import torch

from benchmarks.layer_workload import LLAMA_8B as LAYER_8B
from benchmarks.layer_workload import PAGE, LayerWorkload
from benchmarks.lora_workload import LLAMA_8B, Case, Product, Workload, cases_named, copy_bandwidth, time_launches
from benchmarks.tuning import tune
from server.kernels.triton.plans import DECODE_BLOCK, AnyPlan, DecodePlan, lora_plan
from server.model.attention import AttentionBackend

NUM_LAYERS = 32
CASES = "1x1,64x1,64x8,64x64,64x8mixed,64x64mixed,prefill32768x64,prefill32768x1,layer1,layer64,layer8192"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
Line = dict[str, object]


def main() -> None:
    arguments = _arguments()
    if not torch.cuda.is_available():
        sys.exit("error: benchmarks.kernels needs a CUDA device")
    dtype, device = DTYPES[arguments.dtype], torch.device("cuda")
    torch.manual_seed(0)
    bandwidth = copy_bandwidth(device)
    properties = torch.cuda.get_device_properties(device)
    print(json.dumps({"device": properties.name, "torch": torch.__version__, "copy_gb_s": round(bandwidth / 1e9)}))
    torch.cuda.empty_cache()
    if arguments.tune:
        for key, plan, times in tune(dtype, arguments.budget, arguments.workers):
            print(f"    {key}: {_as_code(plan)},  # µs: {times}", flush=True)
        return
    names = arguments.cases.split(",")
    layers = [int(name.removeprefix("layer")) for name in names if name.startswith("layer")]
    for case in cases_named([name for name in names if not name.startswith("layer")]):
        block_tokens = DECODE_BLOCK if case.length == 1 else arguments.block_tokens
        for line in _case_lines(case, block_tokens, dtype, device, bandwidth):
            print(json.dumps(line), flush=True)
    for rows in layers:
        for line in _layer_lines(LayerWorkload(LAYER_8B, rows, dtype, device), bandwidth):
            print(json.dumps(line), flush=True)


def _layer_lines(load: LayerWorkload, bandwidth: float) -> Iterator[Line]:
    def attention(num_pages: int) -> AttentionBackend:
        from server.model.flashinfer_attention import FlashInferAttention  # only where a GPU is used

        return FlashInferAttention(load.spec, PAGE, num_pages, load.dtype, load.device)

    for launch in load.launches(attention):
        seconds = time_launches(launch.run, launch.copies)
        yield {
            "case": f"layer{load.rows}",
            "kernel": launch.kernel,
            "tokens": load.rows,
            **_speed(seconds, launch.num_bytes, bandwidth),
        }


def _case_lines(
    case: Case, block_tokens: int, dtype: torch.dtype, device: torch.device, bandwidth: float
) -> Iterator[Line]:
    total = floor = 0.0
    for product in LLAMA_8B:
        load = Workload(product, case, block_tokens, dtype, device)
        blocks = load.blocks.num_blocks
        plan = lora_plan(product.in_features, product.widths, blocks, block_tokens, device)
        cost = load.cost
        for kernel, launch, num_bytes in (
            ("shrink", load.shrink, cost.shrink),
            ("expand, silu_mul" if load.does_silu_mul else "expand", load.expand, cost.expand),
            ("both", load.both, sum(cost)),
        ):
            seconds = time_launches(partial(launch, plan=plan), load.layers)
            yield _line(case, product, kernel, seconds, num_bytes, bandwidth)
        total, floor = total + seconds, floor + sum(cost) / bandwidth
    yield {
        **_about(case),
        "product": "all",
        "kernel": "both",
        "ms": round(1e3 * NUM_LAYERS * total, 3),
        "floor_ms": round(1e3 * NUM_LAYERS * floor, 3),
    }


def _line(case: Case, product: Product, kernel: str, seconds: float, num_bytes: int, bandwidth: float) -> Line:
    return {
        **_about(case),
        "product": product.name,
        "kernel": kernel,
        **_speed(seconds, num_bytes, bandwidth),
    }


def _speed(seconds: float, num_bytes: int, bandwidth: float) -> Line:
    return {
        "us": round(1e6 * seconds, 2),
        "bytes": num_bytes,
        "gb_s": round(num_bytes / seconds / 1e9),
        "share": round(num_bytes / seconds / bandwidth, 3),
    }


def _about(case: Case) -> Line:
    return {
        "case": case.name,
        "ranks": "/".join(map(str, case.ranks)),
        "tokens": case.tokens,
        "adapters": case.adapters,
    }


def _as_code(plan: AnyPlan) -> str:
    if isinstance(plan, DecodePlan):
        sizes = (plan.block_k, plan.shrink_warps, plan.block_n, plan.expand_warps, plan.dot_n)
        return f"DecodePlan({', '.join(map(str, sizes))}, early={plan.early})"
    return (
        f"LoraPlan(ShrinkPlan{astuple(plan.shrink)}, ExpandPlan{astuple(plan.expand)}, ExpandPlan{astuple(plan.gate)})"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=CASES, help="comma-separated; default: %(default)s")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
    parser.add_argument("--block-tokens", type=int, default=64, choices=(32, 64, 128), help="of prefill")
    parser.add_argument("--tune", action="store_true", help="search plans instead")
    parser.add_argument("--budget", type=float, default=150, metavar="SECONDS", help="of --tune; default: %(default)s")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="that compile")
    return parser.parse_args()


if __name__ == "__main__":
    main()
