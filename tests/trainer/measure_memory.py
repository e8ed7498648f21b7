"""The memory that training steps take by the kernel's account, beside the estimate, for each of some configurations;
with "devices" in one, that of the last of so many processes that share the weights.

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

from tests.trainer.processes import meeting_place
from tests.trainer.recorder import Recorder
from trainer.batches import Feed
from trainer.encoding import Example
from trainer.groups import Group, joined
from trainer.loop import Loop
from trainer.loss import CausalLoss
from trainer.memory import checkpoint_layers, estimate
from trainer.methods import METHODS
from trainer.methods.adapter import add_adapter, choose_targets, linear_layers
from trainer.settings import Settings
from trainer.sharding import shard

CPU = torch.device("cpu")


def status(name: str) -> int:
    """Bytes, from /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


def measure(
    base: Path, settings: Settings, rows: int, length: int, dtype: torch.dtype, checkpointing: bool, group: Group
) -> int:
    """Bytes at the peak of two steps, over what the process had before the model."""
    before = status("VmRSS")
    lm = METHODS[settings.method].load_base(base, settings, dtype, CPU, "eager" if length <= 512 else "sdpa")
    if settings.method != "full":
        add_adapter(lm, settings, choose_targets(linear_layers(lm), settings.target_modules))
    if checkpointing:
        checkpoint_layers(lm)
    loss = CausalLoss(lm)
    if group.size > 1:
        shard(loss, group, CPU)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now
    ids = [5 + n % 300 for n in range(length)]
    size = rows * group.size
    examples = [Example.of(ids, [True] * length) for _ in range(2 * size)]
    feed = Feed(lambda first: [examples][first:], batch_size=size, pack_to=None, seed=0)
    Loop(lm, settings, loss=loss, pad_id=0, device=CPU, dtype=dtype, group=group).run(feed, 2, [], Recorder())
    return status("VmHWM") - before


def measure_apart(tiny: Path, case: dict[str, Any], base: Path, settings: Settings) -> int:
    """The same in processes of their own, of which the last one's counts."""
    store, address = meeting_place()
    rows, length, size = case["rows"], case["length"], case.get("devices", 1)
    dtype: Any = getattr(torch, case["dtype"])
    reader, writer = os.pipe()
    pids = []
    for rank in range(size):
        if (pid := os.fork()) == 0:
            os.environ |= address | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
            torch.set_num_threads(1)
            with joined("cpu") as group:
                measure(tiny, settings, 1, 300, dtype, case["checkpointing"], group)
                taken = measure(base, settings, rows, length, dtype, case["checkpointing"], group)
                if rank == size - 1:
                    os.write(writer, str(taken).encode())
            os._exit(0)
        pids.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    del store
    if any(codes):
        sys.exit(f"{case}: a process failed")
    return int(os.read(reader, 100))


def main() -> None:
    tiny, base = Path(sys.argv[1]), Path(sys.argv[2])
    for case in json.loads(sys.argv[3]):
        rows, length, size = case["rows"], case["length"], case.get("devices", 1)
        options = {"batch_size": rows * size, "micro_batch": rows} | case["settings"]
        settings = Settings(**options)
        measured = measure_apart(tiny, case, base, settings)
        found = estimate(
            base,
            settings,
            rows=rows,
            length=length,
            learned=rows * (length - 1),
            dtype=getattr(torch, case["dtype"]),
            device=CPU,
            checkpointing=case["checkpointing"],
            num_shards=size,
        )
        print(json.dumps({"case": case, "measured": measured, "estimated": found.total}), flush=True)


if __name__ == "__main__":
    main()
