"""Time the whole server through gRPC beside the engine alone; one JSON line each.

    python -m benchmarks.serving [--model DIR] [--streams 16] [--adapters 16] [--prompt 32] [--new 256]

A server is started as a process of its own on loopback. `streams` clients, in one more process, each stream `new`
tokens, stream i with adapter i % adapters; `decode_tok_s` is all their tokens over the time from the first token of the
last stream to have one, to the first end of a stream: the batch is full throughout. The engine is timed over as many
steps in a process of its own. `rss_bytes` is what front end and engine hold together before the first request,
`ready_s` the time from the start of the process until it takes requests.
"""

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import grpc

from adapters.store import AdapterStore
from benchmarks.live import surroundings
from benchmarks.random_adapters import write_random_adapters
from lorikeet.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from server.base.resolve import BaseModel, resolve_base


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model directory or hub id; the embedded default when absent")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--client-of", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.client_of is not None:
        print(json.dumps(asyncio.run(drive(args))))
        return
    base = resolve_base(args.model)
    with tempfile.TemporaryDirectory() as scratch:
        publish(base, Path(scratch), args.adapters, args.rank)
        served = time_server(args, Path(scratch) / "store")
        alone = time_engine(args, Path(scratch) / "adapters")
    case = {"mode": "lora", "batch": args.streams, "adapters": args.adapters}
    name, about = f"lorikeet {version('lorikeet')}", surroundings()
    served["share_of_engine"] = round(served["decode_tok_s"] / alone, 3)
    print(json.dumps({"peer": f"{name} engine", **case, "decode_tok_s": round(alone, 1), **about}))
    print(json.dumps({"peer": f"{name} grpc", **case, **served, **about}))


def publish(base: BaseModel, scratch: Path, count: int, rank: int) -> None:
    store = AdapterStore(scratch / "store")
    for path in write_random_adapters(base.spec, scratch / "adapters", count, rank):
        store.publish(path, path.name, base_digest=base.digest, base_name=base.name, linears=base.spec.linears())


def time_server(args: argparse.Namespace, store: Path) -> dict[str, float]:
    """Start `lorikeet serve`, drive it from another process, stop it."""
    command = [sys.executable, "-m", "server.cli", "serve", "--json", "--store", str(store), "--port", "0"]
    command += ["--log-level", "warning"]
    command += ["--metrics-port", "0", "--device", args.device, *(["--base", args.model] if args.model else [])]
    began = time.perf_counter()
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None, "the server's output is a pipe"
        ready = json.loads(server.stdout.readline())
        ready_s = round(time.perf_counter() - began, 1)
        memory = resident_bytes(server.pid)
        client = [sys.executable, "-m", "benchmarks.serving", "--client-of", str(ready["port"])]
        for name in ("streams", "adapters", "prompt", "new"):
            client += [f"--{name}", str(getattr(args, name))]
        done = subprocess.run(client, stdout=subprocess.PIPE, text=True, check=True, timeout=540)
        result: dict[str, float] = json.loads(done.stdout)
        return {**result, "rss_bytes": memory, "ready_s": ready_s}
    finally:
        server.terminate()
        server.wait(60)


def resident_bytes(pid: int) -> int:
    """Resident memory of a process and its children."""
    total = 0
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue  # it ended meanwhile
        if pid in (int(entry.parent.name), int(fields[1])):
            total += int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
    return total


async def drive(args: argparse.Namespace) -> dict[str, float]:
    """The client process: all streams at once, twice, the first time to warm up."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{args.client_of}") as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        await run_streams(stub, args, new=4)
        return {"decode_tok_s": round(await run_streams(stub, args, args.new), 1)}


async def run_streams(
    stub: "inference_pb2_grpc.InferenceServiceAsyncStub", args: argparse.Namespace, new: int
) -> float:
    """Tokens per second while all streams run."""
    rng = random.Random(0)
    arrivals: list[list[tuple[float, int]]] = [[] for _ in range(args.streams)]

    async def stream(i: int) -> None:
        request = inference_pb2.StreamGenerateRequest(
            adapter_id=f"a{i % args.adapters}" if args.adapters else "",
            token_ids=common_pb2.TokenIds(ids=[rng.randrange(1000, 40000) for _ in range(args.prompt)]),
            sampling=common_pb2.Sampling(temperature=0.0),
            stopping=common_pb2.Stopping(max_tokens=new, ignore_eos=True),
        )
        async for response in stub.StreamGenerate(request):
            arrivals[i].append((time.perf_counter(), len(response.token_ids)))

    await asyncio.gather(*(stream(i) for i in range(args.streams)))
    begin = max(arrival[0][0] for arrival in arrivals)
    end = min(arrival[-1][0] for arrival in arrivals)
    tokens = sum(count for arrival in arrivals for when, count in arrival if begin < when <= end)
    return tokens / (end - begin) if end > begin else 0.0


def time_engine(args: argparse.Namespace, adapters: Path) -> float:
    """The engine's tokens per second in a process of its own, over as many steps."""
    command = [sys.executable, "-m", "benchmarks.engine", "--cases", f"{args.streams}x{args.adapters}"]
    command += [
        "--adapters",
        str(adapters),
        "--prompt",
        str(args.prompt),
        "--new",
        str(args.new),
        "--device",
        args.device,
    ]
    done = subprocess.run(
        [*command, *(["--model", args.model] if args.model else [])], stdout=subprocess.PIPE, text=True, check=True
    )
    return float(json.loads(done.stdout.splitlines()[-1])["decode_tok_s"])


if __name__ == "__main__":
    main()
