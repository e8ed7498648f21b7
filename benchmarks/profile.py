"""What the GPU does in steady decode: a table of kernels, and the share of the time in which none runs.

    python -m benchmarks.profile --model DIR --adapters DIR [--cases 1x1,64x64] [--steps 20]

A case is batch × adapters, as in `benchmarks.engine`. `wall_ms` is a step without the profiler. In the profiler's trace
of as many steps, `busy_ms` is the time a step in which at least one kernel or copy runs, kernels that overlap counted
once, and `idle` the share of the trace, from its first kernel to the end of its last, in which none does. The table's
times are sums, so kernels that overlap (those launched early wait for their predecessors) add up to more than the step.
One JSON line a case follows its table.
"""

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.engine import Bench, Collector, accelerator, adapter_ref
from benchmarks.live import surroundings
from benchmarks.random_adapters import write_random_adapters
from server.base.resolve import resolve_base
from server.config import EngineConfig
from server.engine.build import build_engine

SETTLING = 40  # steps before the first that is timed


@dataclass(frozen=True, slots=True)
class Span:
    """One kernel or copy; times are microseconds."""

    name: str
    start: float
    end: float


def covered(spans: Iterable[Span]) -> float:
    """Time in which at least one of them runs."""
    total, until = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start):
        total += max(0.0, span.end - max(span.start, until))
        until = max(until, span.end)
    return total


def by_kernel(spans: Iterable[Span]) -> list[tuple[str, float, int]]:
    """(name, summed time, launches), the longest first."""
    times: defaultdict[str, float] = defaultdict(float)
    counts: defaultdict[str, int] = defaultdict(int)
    for span in spans:
        times[span.name] += span.end - span.start
        counts[span.name] += 1
    return [(name, times[name], counts[name]) for name in sorted(times, key=lambda name: -times[name])]


def traced(steps: int, bench: Bench) -> list[Span]:
    """What the device does in so many steps."""
    activity = ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU
    with profile(activities=[activity]) as trace:
        bench.step(steps)
    events = [event for event in trace.events() or [] if event.device_type.name == activity.name]
    return [Span(event.name, event.time_range.start, event.time_range.end) for event in events]


def case(bench: Bench, batch: int, adapters: int, steps: int) -> tuple[dict[str, object], list[str]]:
    """The JSON line and the table of one case."""
    bench.run(batch, 4, adapters)
    bench.submit(batch, adapters, SETTLING + batch + 2 * steps + 10)
    bench.step(SETTLING)
    began = time.perf_counter()
    bench.step(steps)
    wall = (time.perf_counter() - began) / steps * 1e3
    spans = traced(steps, bench)
    bench.finish()
    length = max(span.end for span in spans) - min(span.start for span in spans)
    busy = covered(spans)
    kernels = [(name, us / steps, count / steps) for name, us, count in by_kernel(spans)]
    table = [f"{us:10.1f} us {count:7.1f} x  {name[:80]}" for name, us, count in kernels[:20]]
    line = {
        "bench": "profile",
        "batch": batch,
        "adapters": adapters,
        "wall_ms": round(wall, 3),
        "busy_ms": round(busy / steps / 1e3, 3),
        "idle": round(1 - busy / length, 4),
        "kernels": [[name[:60], round(us, 1), round(count, 1)] for name, us, count in kernels[:12]],
    }
    return line, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model directory; the embedded default when absent")
    parser.add_argument("--adapters", type=Path, help="PEFT directories a0, a1, …; random ones when absent")
    parser.add_argument("--cases", default="1x0,1x1,64x0,64x64", help="batch x adapters, …")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quantization", choices=["none", "nf4", "fp4"])
    args = parser.parse_args()
    cases = [(int(batch), int(adapters)) for batch, adapters in (case.split("x") for case in args.cases.split(","))]
    base, collector = resolve_base(args.model), Collector()
    batch = max(batch for batch, _ in cases)
    config = EngineConfig(
        base_path=str(base.path),
        base_digest=base.digest,
        device=args.device,
        max_model_len=min(base.spec.max_position, args.prompt + SETTLING + batch + 2 * args.steps + 16),
        max_num_seqs=batch,
        max_batch_tokens=max(8192, batch),
        prefix_caching=False,
        canary=False,
        quantization=args.quantization,
    )
    engine = build_engine(config, collector)
    count = max(adapters for _, adapters in cases)
    with tempfile.TemporaryDirectory() as scratch:
        if args.adapters is None:
            write_random_adapters(base.spec, Path(scratch), count, 8)
        refs = [adapter_ref((args.adapters or Path(scratch)) / f"a{i}", base) for i in range(count)]
        bench = Bench(engine, collector, min(base.spec.vocab_size, 40000), refs, args.prompt)
    for batch, adapters in cases:
        line, table = case(bench, batch, adapters, args.steps)
        print(f"{batch} x {adapters}: {line['wall_ms']} ms a step, idle {line['idle']:.2%}", *table, sep="\n")
        print(json.dumps(line | surroundings() | accelerator(args.device)), flush=True)


if __name__ == "__main__":
    main()
