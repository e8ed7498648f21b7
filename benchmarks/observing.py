"""Time a server while it is watched and while it is not, by turns; one JSON line.

    python -m benchmarks.observing [--model DIR] [--streams 16] [--adapters 16] [--prompt 32] [--new 32]
                                   [--seconds 100] [--slice 1] [--traces]

One server, a process of its own on loopback, under a load that goes on: `streams` clients stream one answer after the
other, of `new` tokens give or take a quarter, client i with adapter i % adapters. By turns of `slice` seconds it is
watched or not: watched it counts every metric, logs a line of JSON for each call to a file, has its metrics and its
status page read every five seconds, and with `--traces` sends spans to a collector in this process; else it does none.
Slices come in pairs, one of each kind, the first by turns.

`cost` is by how much fewer tokens came per second while watched, with half of its 95 % interval, from the pairs.
`frontend_us_per_token` is CPU time of the front end, unwatched and watched, which has less noise; `frontend_cost` is
the difference as a share of all cores' time: what it can take of the throughput where the cores are all busy.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import grpc

from benchmarks.live import publish_random, surroundings
from lorikeet.v1 import adapter_pb2, adapter_pb2_grpc, common_pb2, inference_pb2, inference_pb2_grpc
from server.base.resolve import resolve_base

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
    parser.add_argument("--seconds", type=float, default=100.0, help="of slices, in all")
    parser.add_argument("--slice", type=float, default=1.0)
    parser.add_argument("--traces", action="store_true", help="send spans, too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        publish_random(resolve_base(args.model), Path(scratch), args.adapters, args.rank)
        collector = stack.enter_context(collecting()) if args.traces else None
        server = stack.enter_context(serving(args, Path(scratch), collector))
        plain, watched = asyncio.run(compare(args, server))
        case = {"streams": args.streams, "adapters": args.adapters, "prompt": args.prompt, "new": args.new}
        case |= {"slice": args.slice}
        case |= {"device": args.device, "traces": args.traces}
        print(json.dumps({"benchmark": "observing", **case, **summary(plain, watched), **surroundings()}))


@dataclass(frozen=True, slots=True)
class Server:
    """One that runs."""

    port: int
    metrics_port: int
    pid: int

    def cpu(self) -> float:
        """Seconds that its front end has computed so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def watch(self, is_on: bool) -> None:
        os.kill(self.pid, signal.SIGUSR1 if is_on else signal.SIGUSR2)


@dataclass(frozen=True, slots=True)
class Slice:
    """What came in it: tokens, seconds of the clock, seconds that the front end computed."""

    tokens: int
    seconds: float
    cpu: float


@dataclass(slots=True)
class Count:
    """Of tokens that have come."""

    tokens: int = 0


@contextmanager
def serving(args: argparse.Namespace, scratch: Path, collector: str | None) -> Iterator[Server]:
    command = [sys.executable, "-m", "benchmarks.observing_server", "--store", str(scratch / "store")]
    command += ["--device", args.device, *(["--model", args.model] if args.model else [])]
    command += ["--collector", collector] if collector is not None else []
    with (scratch / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout is not None, "a pipe"
        ready = json.loads(process.stdout.readline())
        yield Server(ready["port"], ready["metrics_port"], process.pid)
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


async def compare(args: argparse.Namespace, server: Server) -> tuple[list[Slice], list[Slice]]:
    """Slices unwatched and watched until the time is up. Before, adapters are loaded and each client gets an answer."""
    plain: list[Slice] = []
    watched: list[Slice] = []
    looker, count = Looker(server), Count()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        adapters = adapter_pb2_grpc.AdapterServiceStub(channel)
        for i in range(args.adapters):
            await adapters.LoadAdapter(adapter_pb2.LoadAdapterRequest(adapter_id=f"a{i}"))
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        await asyncio.gather(*(answer(args, stub, i, Count()) for i in range(args.streams)))
        clients = [asyncio.create_task(answers(args, stub, i, count)) for i in range(args.streams)]
        deadline, order = time.monotonic() + args.seconds, (plain, watched)
        while time.monotonic() < deadline:
            for slices in order:
                server.watch(slices is watched)
                with looker.looking() if slices is watched else nullcontext():
                    tokens, cpu, begin = count.tokens, server.cpu(), time.perf_counter()
                    await asyncio.sleep(args.slice)
                    slices.append(Slice(count.tokens - tokens, time.perf_counter() - begin, server.cpu() - cpu))
            order = order[::-1]
        for client in clients:
            client.cancel()
        await asyncio.wait(clients)
    return plain, watched


async def answers(
    args: argparse.Namespace, stub: "inference_pb2_grpc.InferenceServiceAsyncStub", i: int, count: Count
) -> None:
    while True:
        await answer(args, stub, i, count)


async def answer(
    args: argparse.Namespace, stub: "inference_pb2_grpc.InferenceServiceAsyncStub", i: int, count: Count
) -> None:
    """One, to a prompt that is in no prefix cache."""
    request = inference_pb2.StreamGenerateRequest(
        adapter_id=f"a{i % args.adapters}" if args.adapters else "",
        token_ids=common_pb2.TokenIds(ids=[random.randrange(1000, 40000) for _ in range(args.prompt)]),
        sampling=common_pb2.Sampling(temperature=0.0),
        stopping=common_pb2.Stopping(max_tokens=random.randint(args.new * 3 // 4, args.new * 5 // 4), ignore_eos=True),
    )
    async for piece in stub.StreamGenerate(request):
        count.tokens += len(piece.token_ids)


class Looker:
    """Reads a server's metrics and status page, every so many seconds of the time that it is let."""

    def __init__(self, server: Server) -> None:
        self._pages = [f"http://127.0.0.1:{server.metrics_port}{path}" for path in ("/metrics", "/")]
        self._due_in = LOOK_SECONDS

    @contextmanager
    def looking(self) -> Iterator[None]:
        stop = threading.Event()
        thread = threading.Thread(target=self._look, args=(stop,))
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _look(self, stop: threading.Event) -> None:
        while True:
            begin = time.monotonic()
            if stop.wait(self._due_in):
                self._due_in = max(0.0, self._due_in - (time.monotonic() - begin))
                return
            for page in self._pages:
                with urllib.request.urlopen(page, timeout=30) as answer:
                    answer.read()
            self._due_in = LOOK_SECONDS


def summary(plain: list[Slice], watched: list[Slice]) -> dict[str, object]:
    rates = [sum(one.tokens for one in slices) / sum(one.seconds for one in slices) for slices in (plain, watched)]
    costs = [(a.tokens / a.seconds - b.tokens / b.seconds) / rates[0] for a, b in zip(plain, watched, strict=True)]
    half = 1.96 * statistics.stdev(costs) / len(costs) ** 0.5 if len(costs) > 1 else float("nan")
    per_token = [sum(one.cpu for one in slices) / sum(one.tokens for one in slices) for slices in (plain, watched)]
    return {
        "pairs": len(costs),
        "tok_s": [round(rate, 1) for rate in rates],
        "cost": round(1 - rates[1] / rates[0], 4),
        "cost_half_interval": round(half, 4),
        "frontend_us_per_token": [round(1e6 * seconds, 1) for seconds in per_token],
        "frontend_cost": round((per_token[1] - per_token[0]) * rates[0] / (os.cpu_count() or 1), 4),
    }


if __name__ == "__main__":
    main()
