"""Churn: clients on adapters that are relabelled, unloaded and imported again all the while; one JSON line.

    python -m benchmarks.churn [--cpu-seconds 60] [--max-seconds 540] [--clients 32] [--adapters 48]

A server of a tiny base, with room for 8 adapters on the device, runs as a process of its own on loopback. Every
answer is compared with what transformers and PEFT compute for the digest that it names. Exits 1 if any differs, if a
label was answered by what it did not mean, or if anything is left behind; stderr says what. Needs the repository.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.live import surroundings
from tests.support.churn.run import Outcome, Size, run_churn


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu-seconds", type=float, default=60.0, help="of the engine")
    parser.add_argument("--max-seconds", type=float, default=540.0, help="of the traffic, whatever the engine used")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--adapters", type=int, default=48)
    args = parser.parse_args()
    torch.set_num_threads(1)
    size = Size(
        cpu_seconds=args.cpu_seconds,
        max_seconds=args.max_seconds,
        num_clients=args.clients,
        num_adapters=args.adapters,
    )
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["LORIKEET_CACHE"] = str(Path(scratch) / "cache")
        outcome = run_churn(Path(scratch), size)
    print(json.dumps(summary(size, outcome) | surroundings()), flush=True)
    faults = outcome.faults
    if outcome.engine_cpu_seconds < size.cpu_seconds:
        faults.append(f"the engine used {outcome.engine_cpu_seconds:.1f} s only; raise --max-seconds")
    for fault in faults:
        print(fault, file=sys.stderr)
    return int(bool(faults))


def summary(size: Size, outcome: Outcome) -> dict[str, object]:
    """What the line says."""
    metrics, verdict = outcome.metrics, outcome.verdict
    return {
        "bench": "churn",
        "clients": size.num_clients,
        "adapters": size.num_adapters,
        "answers": len(outcome.journal.records),
        "digests": outcome.num_digests,
        "distinct": verdict.num_distinct,
        "mismatches": len(verdict.mismatches),
        "ties": verdict.num_ties,
        "stale": outcome.num_stale,
        "problems": len(outcome.journal.problems),
        "swaps": outcome.num_swaps,
        "calls": dict(outcome.journal.calls),
        "refusals": dict(outcome.journal.refusals),
        "loads": int(metrics["lorikeet_adapter_loads_total"]),
        "evictions": int(metrics["lorikeet_adapter_evictions_total"]),
        "preemptions": int(metrics["lorikeet_preemptions_total"]),
        "engine_cpu_s": round(outcome.engine_cpu_seconds, 1),
        "seconds": round(outcome.seconds, 1),
    }


if __name__ == "__main__":
    sys.exit(main())
