"""Time training steps on packed random tokens: rank 16, every linear layer; the keys and the rows are those of the
script that times TRL beside it.

    python -m benchmarks.train --model DIR --method qlora --batch 2 --length 2048 --checkpointing

No tokenizer and no data are needed: rows are token ids. A model's directory with nothing but a config.json gets random
weights, made on the device. Prints one JSON line: milliseconds a step, tokens a second, peak GiB (on a GPU torch's,
else the process's), what `trainer estimate` says of it, and what it was timed on.
"""

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.live import surroundings
from benchmarks.random_base import random_base
from trainer.batches import Feed
from trainer.devices import choose_device
from trainer.encoding import Example
from trainer.fused import fuse_where_it_pays
from trainer.groups import Alone
from trainer.loop import Evaluation, Loop, Progress, Step
from trainer.loss import CausalLoss
from trainer.memory import checkpoint_layers, estimate
from trainer.methods import METHODS
from trainer.methods.adapter import add_adapter, choose_targets, linear_layers
from trainer.settings import Settings

WARMUP = 4  # steps that are not counted
ROWS = 64


class Clock:
    """Keeps when each step ended."""

    def __init__(self, device: torch.device, profiles: bool) -> None:
        self._is_cuda = device.type == "cuda"
        self._profiler = torch.profiler.profile() if profiles else None
        self.profiled: dict[str, int] = {}
        self.times: list[float] = []
        self.losses: list[float] = []

    def stepped(self, step: Step) -> None:
        if self._is_cuda:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        self.losses.append(step.loss)
        if self._profiler and len(self.times) == WARMUP - 2:
            self._profiler.start()
        elif self._profiler and len(self.times) == WARMUP - 1:
            self._profiler.stop()
            self._tell(self._profiler.key_averages())

    def _tell(self, events: Any) -> None:
        """Print a table of the step's operations; keep what its kernels took and how often any was launched."""
        order = "self_cuda_time_total" if self._is_cuda else "self_cpu_time_total"
        print(events.table(sort_by=order, row_limit=40, max_name_column_width=70), flush=True)
        kernels = [event for event in events if event.device_type.name == "CUDA" and not event.is_user_annotation]
        launches = [event.count for event in events if "Launch" in event.key]
        time_us = sum(event.self_device_time_total for event in kernels)
        self.profiled = {"kernels_ms": round(time_us / 1e3), "launches": sum(launches)}

    def evaluated(self, evaluation: Evaluation) -> None: ...

    def save(self, progress: Progress) -> None: ...

    def save_best(self, progress: Progress) -> None: ...

    def note(self, message: str) -> None:
        print(message, flush=True)

    def is_stopped(self) -> bool:
        return False


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--method", choices=["lora", "qlora", "full"], default="lora")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--vocab", type=int, default=40000)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--plain", action="store_true", help="transformers' own layers, not the fused ones")
    parser.add_argument(
        "--profile", action="store_true", help="a table of what one of the first steps takes, by kernel"
    )
    options = parser.parse_args()
    device, dtype = choose_device(options.device), getattr(torch, options.dtype)
    settings = Settings(
        method=options.method, rank=16, alpha=32.0, batch_size=options.batch, learning_rate=1e-4, schedule="linear"
    )
    torch.manual_seed(0)
    lm: Any
    if any(options.model.glob("*.safetensors")):
        lm = METHODS[options.method].load_base(options.model, settings, dtype, device, options.attention)
    else:
        lm = random_base(options.model, dtype, device, options.attention, four_bit=options.method == "qlora")
    if options.method != "full":
        add_adapter(lm, settings, choose_targets(linear_layers(lm), settings.target_modules))
    if options.checkpointing:
        checkpoint_layers(lm)
    clock = Clock(device, options.profile)
    fused = None if options.plain or options.method == "full" else fuse_where_it_pays(lm, device, dtype, clock.note)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(1000, options.vocab, (options.length,), generator=generator).tolist() for _ in range(ROWS)]
    examples = [Example.of(ids, [True] * len(ids)) for ids in rows]
    feed = Feed(lambda first: [examples][first:], batch_size=options.batch, pack_to=None, seed=0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    loop = Loop(lm, settings, loss=CausalLoss(lm, fused), pad_id=0, device=device, dtype=dtype, group=Alone())
    loop.run(feed, options.steps, [], clock)
    step = (clock.times[-1] - clock.times[WARMUP - 1]) / (len(clock.times) - WARMUP)
    cuda = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    outcome = {
        "method": options.method,
        "batch": options.batch,
        "length": options.length,
        "checkpointing": options.checkpointing,
        "fused": fused is not None,
        "step_ms": round(step * 1e3),
        "tok_s": round(options.batch * options.length / step),
        "peak_gib": round(peak / 2**30, 1),
        "loss": round(clock.losses[-1], 4),
    }
    expected = estimate(
        options.model,
        settings,
        rows=options.batch,
        length=options.length,
        learned=options.batch * (options.length - 1),
        dtype=dtype,
        device=device,
        checkpointing=options.checkpointing,
    )
    about = surroundings() | ({"hardware": torch.cuda.get_device_name(device)} if cuda else {})
    outcome |= {"estimate_gib": round(expected.total / 2**30, 1)} | clock.profiled
    print(json.dumps(outcome | about), flush=True)


if __name__ == "__main__":
    main()
