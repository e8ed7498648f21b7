"""Time a server that is watched beside one that is not; one JSON line.

    python -m benchmarks.observing [--model DIR] [--streams 16] [--adapters 16] [--prompt 32] [--new 32] [--requests 4]
                                   [--seconds 100] [--traces]

Two servers run at once, as processes of their own on loopback, and only one has work at a time: rounds alternate (the
order within each pair, too). In a round, `streams` clients stream `new` tokens each, `requests` times one after the
other, client i with adapter i % adapters. The watched server counts every metric, logs a line of JSON for each call to
a file, has its metrics and its status page read every five seconds, and with `--traces` sends spans to a collector in
this process; the other does none of that, and is the same otherwise.

`cost` is by how much the watched one's tokens per second are lower, the mean over pairs, with half of its 95 %
interval. `frontend_us_per_token` is CPU time of the two front ends, which has little noise; `frontend_cost` is their
difference as a share of all cores' time, and so a bound on the throughput that it can take.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import grpc

from adapters.registry import AdapterRegistry
from adapters.stores import open_store
from benchmarks.live import publish_random, surroundings
from lorikeet.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from server import logs
from server.base.resolve import resolve_base
from server.config import EngineConfig, ServeConfig
from server.engine.messages import Stats
from server.frontend.frontend import Frontend
from server.metrics import Metrics
from server.rpc.lifecycle import run
from server.rpc.observers import observing

LOOK_SECONDS = 5.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model directory or hub id; the embedded default when absent")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--requests", type=int, default=4, help="of each client in a round")
    parser.add_argument("--seconds", type=float, default=100.0, help="of rounds, in all")
    parser.add_argument("--traces", action="store_true", help="send spans, too")
    parser.add_argument("--serve", choices=("plain", "watched"), help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    parser.add_argument("--collector", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve is not None:
        asyncio.run(serve(args))
        return
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        publish_random(resolve_base(args.model), Path(scratch), args.adapters, args.rank)
        collector = stack.enter_context(collecting()) if args.traces else None
        plain = stack.enter_context(serving(args, Path(scratch), "plain", None))
        watched = stack.enter_context(serving(args, Path(scratch), "watched", collector))
        asyncio.run(compare(args, plain, watched))
        case = {"streams": args.streams, "adapters": args.adapters, "prompt": args.prompt, "new": args.new}
        case |= {"requests": args.requests, "device": args.device, "traces": args.traces}
        print(json.dumps({"benchmark": "observing", **case, **summary(plain, watched), **surroundings()}))


# The server, in a process of its own


class Uncounted(Metrics):
    """Counts nothing of what happens with a request."""

    def request_done(self, **of_call: object) -> None: ...

    def request_without_adapter(self, **of_call: object) -> None: ...

    def first_token(self, **of_request: object) -> None: ...

    def output_tokens(self, **of_request: object) -> None: ...

    def prompt_tokens(self, **of_request: object) -> None: ...

    def generation_tokens(self, **of_delta: object) -> None: ...

    def engine_stats(self, stats: Stats, names: Mapping[str, str]) -> None: ...


async def serve(args: argparse.Namespace) -> None:
    """Until SIGTERM; the ports are a line of JSON."""
    is_watched = args.serve == "watched"
    base, store = resolve_base(args.model), open_store(args.store)
    logs.set_up(logs.JSON, "info" if is_watched else "warning")
    config = ServeConfig(
        engine=EngineConfig(base_path=str(base.path), base_digest=base.digest, device=args.device, log_level="warning"),
        base_name=base.name,
        store=store.location,
        port=0,
        metrics_port=0,
        grace=0.0,
        otlp_endpoint=args.collector,
    )
    metrics = Metrics() if is_watched else Uncounted()
    frontend = Frontend(config, base, AdapterRegistry(store, base.digest), metrics)

    def announce(port: int, metrics_port: int) -> None:
        print(json.dumps({"port": port, "metrics_port": metrics_port}), flush=True)

    async with observing(config, {}) as observers:
        heard = observers if is_watched else ()
        await run(config, base, frontend, frontend.catalog, metrics, heard, on_started=announce)


# The client


@dataclass(slots=True)
class Server:
    """One that runs, and what its rounds gave: tokens per second, and its front end's CPU seconds. Metrics and page
    are next read `look_in` seconds of its rounds from now."""

    port: int
    metrics_port: int
    pid: int
    rates: list[float] = field(default_factory=list)
    tokens: int = 0
    cpu: float = 0.0
    look_in: float = LOOK_SECONDS

    def cpu_now(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def serving(args: argparse.Namespace, scratch: Path, kind: str, collector: str | None) -> Iterator[Server]:
    command = [sys.executable, "-m", "benchmarks.observing", "--serve", kind, "--store", str(scratch / "store")]
    command += ["--device", args.device, *(["--model", args.model] if args.model else [])]
    command += ["--collector", collector] if collector is not None else []
    with (scratch / f"{kind}.log").open("wb") as log, started(command, log) as server:
        assert server.stdout is not None, "a pipe"
        ready = json.loads(server.stdout.readline())
        yield Server(ready["port"], ready["metrics_port"], server.pid)


@contextmanager
def started(command: list[str], log: BinaryIO) -> "Iterator[subprocess.Popen[str]]":
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(60)


@contextmanager
def collecting() -> Iterator[str]:
    """A collector that takes spans and keeps none; its URL."""
    from concurrent.futures import ThreadPoolExecutor

    def export(request: bytes, context: object) -> bytes:
        return b""  # an ExportTraceServiceResponse without a complaint

    method: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {"Export": grpc.unary_unary_rpc_method_handler(export)}
    service = "opentelemetry.proto.collector.trace.v1.TraceService"
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, method),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


async def compare(args: argparse.Namespace, plain: Server, watched: Server) -> None:
    """Rounds in pairs until the time is up; before, one to warm up."""
    for server in (plain, watched):
        await play(args, server, None)
    deadline, is_plain_first = time.monotonic() + args.seconds, True
    while time.monotonic() < deadline:
        for server in (plain, watched) if is_plain_first else (watched, plain):
            stop = threading.Event()
            reader = threading.Thread(target=look, args=(server, stop))
            if server is watched:
                reader.start()
            await play(args, server, server.rates)
            stop.set()
            if server is watched:
                await asyncio.to_thread(reader.join)
        is_plain_first = not is_plain_first


async def play(args: argparse.Namespace, server: Server, rates: list[float] | None) -> None:
    """One round, put into `rates`. Its prompts are new ones: none is in the prefix cache."""
    rng = random.Random(len(server.rates))

    async def client(stub: "inference_pb2_grpc.InferenceServiceAsyncStub", i: int) -> int:
        tokens = 0
        for _ in range(args.requests):
            request = inference_pb2.StreamGenerateRequest(
                adapter_id=f"a{i % args.adapters}" if args.adapters else "",
                token_ids=common_pb2.TokenIds(ids=[rng.randrange(1000, 40000) for _ in range(args.prompt)]),
                sampling=common_pb2.Sampling(temperature=0.0),
                stopping=common_pb2.Stopping(max_tokens=args.new, ignore_eos=True),
            )
            tokens += sum([len(piece.token_ids) async for piece in stub.StreamGenerate(request)])
        return tokens

    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        await channel.channel_ready()
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        cpu, begin = server.cpu_now(), time.perf_counter()
        tokens = sum(await asyncio.gather(*(client(stub, i) for i in range(args.streams))))
        seconds = time.perf_counter() - begin
    if rates is not None:
        rates.append(tokens / seconds)
        server.tokens += tokens
        server.cpu += server.cpu_now() - cpu


def look(server: Server, stop: threading.Event) -> None:
    """Reads metrics and status page, every so many seconds of this server's rounds, until told to stop."""
    while True:
        begin = time.monotonic()
        if stop.wait(server.look_in):
            server.look_in -= min(server.look_in, time.monotonic() - begin)
            return
        for path in ("/metrics", "/"):
            with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}{path}", timeout=30) as page:
                page.read()
        server.look_in = LOOK_SECONDS


def summary(plain: Server, watched: Server) -> dict[str, object]:
    costs = [1 - seen / unseen for seen, unseen in zip(watched.rates, plain.rates, strict=True)]
    half = 1.96 * statistics.stdev(costs) / len(costs) ** 0.5 if len(costs) > 1 else float("nan")
    per_token = [server.cpu / server.tokens for server in (plain, watched)]
    rate = statistics.mean(plain.rates)
    return {
        "pairs": len(costs),
        "tok_s": [round(statistics.mean(server.rates), 1) for server in (plain, watched)],
        "cost": round(statistics.mean(costs), 4),
        "cost_half_interval": round(half, 4),
        "frontend_us_per_token": [round(1e6 * seconds, 1) for seconds in per_token],
        "frontend_cost": round((per_token[1] - per_token[0]) * rate / (os.cpu_count() or 1), 4),
    }


if __name__ == "__main__":
    main()
