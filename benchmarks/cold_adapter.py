"""How much later the first token of a cold adapter comes than that of a resident one; one JSON line.

    python -m benchmarks.cold_adapter [--model DIR] [--count 40] [--rank 16] [--prompt 32]

A server runs as a process of its own on loopback and does nothing else. Each of `count` adapters that were never
loaded is asked for one token, and between them one that is resident. `file_read_ms` is the time to read a file of an
adapter as large as they are, from the same page cache. `excess_ms` is what the cold first token takes beyond the
resident one's and that reading; `load_ms` is the part of it that the server says it waited for the adapter.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

import grpc

from benchmarks.live import publish_random, quantile, serving, surroundings
from lorikeet.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from server.base.resolve import resolve_base

WARM = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model directory or hub id; the embedded default when absent")
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-canary", action="store_true", help="as the server's")
    args = parser.parse_args()
    options = ["--device", args.device, *(["--no-canary"] if args.no_canary else [])]
    base = resolve_base(args.model)
    with tempfile.TemporaryDirectory() as scratch:
        versions = publish_random(base, Path(scratch), args.count + 1, args.rank)
        reading = [read_seconds(version.path / "adapter_model.safetensors") for version in versions]
        with (
            serving(Path(scratch) / "store", args.model, *options) as port,
            grpc.insecure_channel(f"127.0.0.1:{port}") as channel,
        ):
            result = measure(inference_pb2_grpc.InferenceServiceStub(channel), args)
    result |= {"file_read_ms": statistics.median(reading) * 1e3}
    for share in ("median", "p90"):
        excess = result[f"cold_{share}_ms"] - result[f"resident_{share}_ms"] - result["file_read_ms"]
        result[f"excess_{share}_ms"] = excess
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


def measure(stub: inference_pb2_grpc.InferenceServiceStub, args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds to the first token, as the client sees it."""
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
    pairs = [(first(f"a{1 + i}"), first("a0")) for i in range(args.count)]
    cold, resident = [pair[0][0] for pair in pairs], [pair[1][0] for pair in pairs]
    load = [pair[0][1] for pair in pairs]
    result: dict[str, float] = {}
    for name, values in (("cold", cold), ("resident", resident), ("load", load)):
        result[f"{name}_median_ms"] = statistics.median(values) * 1e3
        result[f"{name}_p90_ms"] = quantile(values, 0.9) * 1e3
    return result


if __name__ == "__main__":
    main()
