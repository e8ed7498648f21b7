"""What loading cold adapters costs those who stream: time between tokens in a storm of loads beside that in calm.

    python -m benchmarks.swap_storm [--model DIR] [--streams 10] [--cold 200] [--rank 8] [--rounds 3]

A server runs as a process of its own on loopback. `streams` clients, in one more process, stream with resident
adapters, each an answer of LONGEST tokens after the other, while `cold` others, never loaded or evicted long since,
are loaded by LoadAdapter, `at-once` at a time. In calm the same streams run, before the storm and after. A gap is the
time between two messages of one answer, as its client sees it. Each round has a server of its own, so that every load
is the first of its digest. Prints a JSON line a round, then one with the medians of the rounds.
"""

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc

from benchmarks.live import adapter_bytes, publish_random, quantile, serving, surroundings
from lorikeet.v1 import adapter_pb2, adapter_pb2_grpc, common_pb2, inference_pb2, inference_pb2_grpc
from server.base.resolve import resolve_base

PROMPT = 32
LONGEST = 200  # tokens of an answer
CALM = 200  # tokens of each stream before the storm, and after
SPARE = 20  # adapters that have room beside those of the streams

Work = Callable[[], Awaitable[None]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model directory or hub id; the embedded default when absent")
    parser.add_argument("--streams", type=int, default=10)
    parser.add_argument("--cold", type=int, default=200)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--at-once", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-canary", action="store_true", help="as the server's")
    parser.add_argument("--threads", type=int, help="of the engine on a CPU")
    parser.add_argument("--client-of", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.client_of is not None:
        asyncio.run(drive(args))
        return
    base = resolve_base(args.model)
    with tempfile.TemporaryDirectory() as scratch:
        publish_random(base, Path(scratch), args.streams + args.cold, args.rank)
        size = adapter_bytes(base, args.rank)
        options = ["--device", args.device, "--adapter-memory", str((args.streams + SPARE) * size)]
        options += ["--threads", str(args.threads)] if args.threads else []
        options += ["--no-canary"] if args.no_canary else []
        rounds = [run_round(args, Path(scratch) / "store", options) for _ in range(args.rounds)]
    result: dict[str, object] = {"bench": "swap_storm", "streams": args.streams, "cold": args.cold, "rank": args.rank}
    result |= {"canary": not args.no_canary, "rounds": len(rounds)}
    result |= {key: round(statistics.median(r[key] for r in rounds), 3) for key in rounds[0]}
    print(json.dumps(result | surroundings()), flush=True)


def run_round(args: argparse.Namespace, store: Path, options: list[str]) -> dict[str, float]:
    """One storm on a new server, so that no adapter was ever loaded; prints its line."""
    with serving(store, args.model, *options) as port:
        command = [sys.executable, "-m", "benchmarks.swap_storm", "--client-of", str(port)]
        for name in ("streams", "cold", "at-once"):
            command += [f"--{name}", str(getattr(args, name.replace("-", "_")))]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=900)
    print(done.stdout, end="", flush=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result


class Streams:
    """The streams of one phase, and the gaps between their messages from when all of them have begun."""

    def __init__(self, stub: "inference_pb2_grpc.InferenceServiceAsyncStub", count: int) -> None:
        self._stub = stub
        self._tasks: list[asyncio.Task[None]] = []
        self._tokens = [0] * count
        self._changed = asyncio.Event()
        self._is_measured = False
        self._rng = random.Random(0)
        self.gaps: list[float] = []
        self.seconds = 0.0  # that `work` took

    async def run(self, work: Work) -> int:
        """Streams while `work` is done, then cancels; the tokens that each stream had meanwhile, at least."""
        self._tasks = [asyncio.create_task(self._stream(i)) for i in range(len(self._tokens))]
        try:
            await self.reach(8)
            self._is_measured = True
            before = min(self._tokens)
            began = time.perf_counter()
            await work()
            self.seconds = time.perf_counter() - began
            self._is_measured = False
            return min(self._tokens) - before
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def reach(self, tokens: int) -> None:
        """Until each stream has had so many tokens."""
        while min(self._tokens) < tokens:
            self._changed.clear()
            await asyncio.wait_for(self._changed.wait(), 60)
            for task in self._tasks:
                if task.done():
                    task.result()
                    raise RuntimeError("a stream has ended too early")

    async def reach_more(self, tokens: int) -> None:
        await self.reach(min(self._tokens) + tokens)

    async def _stream(self, i: int) -> None:
        try:
            while True:
                await self._answer(i)
        finally:
            self._changed.set()

    async def _answer(self, i: int) -> None:
        request = inference_pb2.StreamGenerateRequest(
            adapter_id=f"a{i}",
            token_ids=common_pb2.TokenIds(ids=[self._rng.randrange(1000, 40000) for _ in range(PROMPT)]),
            sampling=common_pb2.Sampling(temperature=0.0),
            stopping=common_pb2.Stopping(max_tokens=LONGEST, ignore_eos=True),
        )
        last = 0.0
        async for piece in self._stub.StreamGenerate(request):
            now = time.perf_counter()
            if self._is_measured and last:
                self.gaps.append(now - last)
            last = now
            self._tokens[i] += len(piece.token_ids)
            self._changed.set()


async def drive(args: argparse.Namespace) -> None:
    """The client process: the storm between two halves of calm."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{args.client_of}") as channel:
        adapters = adapter_pb2_grpc.AdapterServiceStub(channel)
        inference = inference_pb2_grpc.InferenceServiceStub(channel)
        cold = iter([f"a{args.streams + i}" for i in range(args.cold)])

        async def load() -> None:
            for name in cold:
                await adapters.LoadAdapter(adapter_pb2.LoadAdapterRequest(adapter_id=name), timeout=120)

        async def storm() -> None:
            await asyncio.gather(*(load() for _ in range(args.at_once)))

        async def calm(tokens: int) -> Streams:
            streams = Streams(inference, args.streams)
            await streams.run(lambda: streams.reach_more(tokens))
            return streams

        await calm(20)  # to warm up
        before = await calm(CALM)
        stormy = Streams(inference, args.streams)
        tokens = await stormy.run(storm)
        after = await calm(CALM)
        print(json.dumps(compare(before.gaps + after.gaps, stormy) | {"storm_tokens": tokens}), flush=True)


def compare(calm: list[float], stormy: Streams) -> dict[str, float]:
    """Gaps in milliseconds, and the storm's as a ratio to the calm's."""
    storm = stormy.gaps
    result: dict[str, float] = {}
    for name, share in (("median", 0.5), ("p99", 0.99), ("max", 1.0)):
        of_calm, of_storm = quantile(calm, share), quantile(storm, share)
        result[f"calm_{name}_ms"] = round(of_calm * 1e3, 2)
        result[f"storm_{name}_ms"] = round(of_storm * 1e3, 2)
        result[f"{name}_ratio"] = round(of_storm / of_calm, 3)
    return result | {"storm_s": round(stormy.seconds, 2)}


if __name__ == "__main__":
    main()
