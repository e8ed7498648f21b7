"""The memory that training steps take by the kernel's account, beside the estimate, for each of some configurations.

    python -m tests.trainer.measure_memory TINY_BASE BASE CONFIGURATIONS_JSON

Prints one JSON line a configuration. Each is a fork of this process, which has imported everything and computed
nothing. It first trains the tiny base, so that libraries have what they keep for themselves; its peak counts from
there. Blocks go straight back to the kernel (MALLOC_MMAP_THRESHOLD_), so the peak is that of what is alive.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from tests.trainer.recorder import Recorder
from trainer.batches import Feed
from trainer.encoding import Example
from trainer.loop import Loop
from trainer.memory import checkpoint_layers, estimate
from trainer.methods import METHODS
from trainer.methods.adapter import add_adapter, choose_targets, linear_layers
from trainer.settings import Settings

CPU = torch.device("cpu")


def status(name: str) -> int:
    """Bytes, from /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


def measure(base: Path, settings: Settings, rows: int, length: int, dtype: torch.dtype, checkpointing: bool) -> int:
    """Bytes at the peak of two steps, over what the process had before the model."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now
    before = status("VmRSS")
    lm = METHODS[settings.method].load_base(base, settings, dtype, CPU, "eager" if length <= 512 else "sdpa")
    if settings.method != "full":
        add_adapter(lm, settings, choose_targets(linear_layers(lm), settings.target_modules))
    if checkpointing:
        checkpoint_layers(lm)
    ids = [5 + n % 300 for n in range(length)]
    examples = [Example.of(ids, [True] * length) for _ in range(2 * rows)]
    feed = Feed(lambda first: [examples][first:], batch_size=rows, pack_to=None, seed=0)
    Loop(lm, settings, pad_id=0, device=CPU, dtype=dtype).run(feed, 2, [], Recorder())
    return status("VmHWM") - before


def main() -> None:
    tiny, base = Path(sys.argv[1]), Path(sys.argv[2])
    for case in json.loads(sys.argv[3]):
        rows, length, checkpointing = case["rows"], case["length"], case["checkpointing"]
        settings = Settings(**({"batch_size": rows} | case["settings"]))
        dtype: Any = getattr(torch, case["dtype"])
        reader, writer = os.pipe()
        if (pid := os.fork()) == 0:
            torch.set_num_threads(1)
            measure(tiny, settings, 1, 300, dtype, checkpointing)
            os.write(writer, str(measure(base, settings, rows, length, dtype, checkpointing)).encode())
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code:
            sys.exit(f"{case} ended with {code}")
        found = estimate(
            base,
            settings,
            rows=rows,
            length=length,
            learned=rows * (length - 1),
            dtype=dtype,
            device=CPU,
            checkpointing=checkpointing,
        )
        print(json.dumps({"case": case, "measured": int(os.read(reader, 100)), "estimated": found.total}), flush=True)


if __name__ == "__main__":
    main()
