"""How much later the first token of a cold adapter comes than that of a resident one; one JSON line.

    python -m benchmarks.cold_adapter [--model DIR] [--count 40] [--rank 16] [--prompt 32]

A server runs as a process of its own on loopback and does nothing else; it has room for few adapters and keeps no
others in host memory. Each of `count` adapters is asked for one token twice, after all the others: `new` was never
loaded, and has its canary, `cold` was evicted since. After each of them one is asked that is resident. `file_read_ms`
is the time to read a file of an adapter as large as they are, from the same page cache. `excess_ms` is what a first
token takes beyond that of the resident one asked next and that reading, pair by pair, as the speed of a machine changes
within a minute; `load_ms` is the part of it that the server says it waited for the adapter.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

import grpc

from benchmarks.live import adapter_bytes, publish_random, quantile, serving, surroundings
from lorikeet.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from server.base.resolve import resolve_base

WARM = 10
ROOM = 8  # adapters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model directory or hub id; the embedded default when absent")
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-canary", action="store_true", help="as the server's")
    args = parser.parse_args()
    base = resolve_base(args.model)
    room = ROOM * adapter_bytes(base, args.rank)
    options = ["--device", args.device, "--adapter-memory", str(room), "--host-adapter-memory", "0"]
    options += ["--no-canary"] if args.no_canary else []
    with tempfile.TemporaryDirectory() as scratch:
        versions = publish_random(base, Path(scratch), args.count + 1, args.rank)
        reading = [read_seconds(version.path / "adapter_model.safetensors") for version in versions]
        with (
            serving(Path(scratch) / "store", args.model, *options) as port,
            grpc.insecure_channel(f"127.0.0.1:{port}") as channel,
        ):
            result = measure(inference_pb2_grpc.InferenceServiceStub(channel), args, statistics.median(reading))
    case: dict[str, object] = {"bench": "cold_adapter", "count": args.count, "rank": args.rank, "prompt": args.prompt}
    case |= {"canary": not args.no_canary, "file_bytes": versions[0].manifest.size_bytes}
    case |= {key: round(value, 2) for key, value in result.items()}
    print(json.dumps(case | surroundings()), flush=True)


def read_seconds(path: Path) -> float:
    """All of a file that is in the page cache, into memory."""
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(path.stat().st_size)
        began = time.perf_counter()
        assert file.readinto(buffer) == len(buffer), "one read takes it all"
        return time.perf_counter() - began


def measure(
    stub: inference_pb2_grpc.InferenceServiceStub, args: argparse.Namespace, file_read: float
) -> dict[str, float]:
    """Milliseconds to the first token, as the client sees it. `file_read` is in seconds."""
    rng = random.Random(0)

    def first(adapter: str) -> tuple[float, float]:
        """Seconds until it came, and of them those that the adapter took."""
        request = inference_pb2.StreamGenerateRequest(
            adapter_id=adapter,
            token_ids=common_pb2.TokenIds(ids=[rng.randrange(1000, 40000) for _ in range(args.prompt)]),
            sampling=common_pb2.Sampling(temperature=0.0),
            stopping=common_pb2.Stopping(max_tokens=1, ignore_eos=True),
        )
        began = time.perf_counter()
        pieces = stub.StreamGenerate(request, timeout=120)
        piece = next(pieces)
        took = time.perf_counter() - began
        pieces.cancel()
        return took, piece.timings.adapter_load_seconds

    for _ in range(WARM):
        first("a0")
    result: dict[str, float] = {"file_read_ms": file_read * 1e3}
    resident: list[float] = []
    for name in ("new", "cold"):
        pairs = [(first(f"a{1 + i}"), first("a0")) for i in range(args.count)]
        resident += [pair[1][0] for pair in pairs]
        result |= _summary(name, [pair[0][0] for pair in pairs])
        result |= _summary(f"{name}_load", [pair[0][1] for pair in pairs])
        result |= _summary(f"{name}_excess", [pair[0][0] - pair[1][0] - file_read for pair in pairs])
    result |= _summary("resident", resident)
    return result


def _summary(name: str, seconds: list[float]) -> dict[str, float]:
    median, p90 = statistics.median(seconds), quantile(seconds, 0.9)
    return {f"{name}_median_ms": median * 1e3, f"{name}_p90_ms": p90 * 1e3}


if __name__ == "__main__":
    main()
