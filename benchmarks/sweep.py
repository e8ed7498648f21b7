"""Small jobs side by side over one base, against the same jobs one process after the other; one JSON line.

    python -m benchmarks.sweep [--model DIR] [--jobs 8] [--rows 8] [--epochs 2] [--batch-size 2]

Both train the same: `trainer sweep` once, and `trainer fit` for each job. Seconds are wall time of whole processes, as
someone at a terminal waits for them. `largest_difference` is that of any of the last step's losses.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.live import surroundings
from trainer.run_directory import RunDirectory
from trainer.tasks import TASKS, write_rows

RANKS = (4, 8, 16, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model directory or hub id; the embedded default when absent")
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--rows", type=int, default=8, help="of each job")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        configs = [write_job(directory, args, number) for number in range(args.jobs)]
        together = directory / "jobs.yaml"
        jobs = [json.loads(config.read_text()) | {"name": config.stem} for config in configs]
        together.write_text(json.dumps({"jobs": jobs}))
        sweep = seconds(["sweep", str(together), "--out", str(directory / "together"), "--at-once", str(args.jobs)])
        separate = 0.0
        for config in configs:
            separate += seconds(["fit", "--config", str(config), "--run", str(directory / "alone" / config.stem)])
        differences = [
            abs(last_loss(directory / "together" / config.stem) - last_loss(directory / "alone" / config.stem))
            for config in configs
        ]
    case = {"bench": "sweep", "jobs": args.jobs, "rows": args.rows, "epochs": args.epochs}
    case |= {"batch_size": args.batch_size, "sweep_seconds": round(sweep, 2), "separate_seconds": round(separate, 2)}
    case |= {"speedup": round(separate / sweep, 2), "largest_difference": max(differences)}
    print(json.dumps(case | surroundings()), flush=True)


def write_job(directory: Path, args: argparse.Namespace, number: int) -> Path:
    """A job's settings, as JSON, which YAML takes; without a name, so that nothing is published."""
    data = directory / f"rows-{number}.jsonl"
    write_rows(data, TASKS["bookings"].train(args.rows, number))
    config = directory / f"job-{number}.yaml"
    settings = {"data": str(data), "base": args.model, "rank": RANKS[number % len(RANKS)], "seed": number}
    settings |= {"epochs": args.epochs, "batch_size": args.batch_size, "device": args.device}
    config.write_text(json.dumps(settings))
    return config


def seconds(arguments: list[str]) -> float:
    """The wall time of a `trainer` command."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "trainer.cli", *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ)
    return time.perf_counter() - began


def last_loss(run: Path) -> float:
    """Of the last step."""
    return float([line["loss"] for line in RunDirectory.open(run).metrics() if "loss" in line][-1])


if __name__ == "__main__":
    main()
