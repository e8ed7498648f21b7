"""The whole of Lorikeet in one run: train two adapters, serve them beside their base, ask all three at once.

    python -m examples.demo [--base DIR|HUB_ID] [--store DIR]

Adapters that the store already holds for this base are not trained again. Exit codes: 0 every answer shows its
adapter's effect and no answer of the base does; 1 one does not; 2 something could not be set up.
"""

import argparse
import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import grpc
from rich.console import Console

from adapters.errors import AdapterNotFound, LorikeetError
from adapters.store import AdapterStore
from examples.display import Board, shown
from examples.effects import EFFECTS, Effect
from lorikeet.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from server.base.resolve import BaseModel, resolve_base

HERE = Path(__file__).parent
BASE = "base"
PROMPTS = (  # none of them is in the training data
    "What is the capital of France?",
    "Why is the sky blue?",
    "How do I boil an egg?",
    "Give me a tip for sleeping better.",
    "What do bees do?",
    "Write one sentence about the moon.",
)
MAX_TOKENS = 64
ANSWER_SECONDS = 180.0
STOP_SECONDS = 40.0


class DemoError(Exception):
    """The demo could not be set up; the message says what failed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo and return its exit code."""
    parser = argparse.ArgumentParser(prog="demo", description="Train two adapters, serve them, ask all at once.")
    parser.add_argument("--base", metavar="DIR|HUB_ID", help="the base model [SmolLM2-135M-Instruct]")
    parser.add_argument("--store", metavar="DIR", type=Path, default=Path(".demo/store"), help="[%(default)s]")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    try:
        code = run(options.base, options.store)
    except (DemoError, LorikeetError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(f"done in {time.perf_counter() - started:.0f} s")
    return code


def run(base_name: str | None, store_root: Path) -> int:
    """Train what is missing, serve, ask, judge; 0 if every effect is where it should be, else 1."""
    base = resolve_base(base_name, _say)
    store = AdapterStore(store_root)
    for effect in EFFECTS.values():
        if not _is_published(store, effect.adapter, base):
            _train(effect, base, store_root)
    variants = (BASE, *EFFECTS)
    board = Board(PROMPTS, variants)
    with _server(base, store_root) as address:
        _say(f"{len(PROMPTS) * len(variants)} requests at once to {address}")
        with shown(board, Console()):
            asyncio.run(_ask_all(address, board))
    return _judge(board)


def _say(message: str) -> None:
    print(f"· {message}", flush=True)


def _is_published(store: AdapterStore, name: str, base: BaseModel) -> bool:
    try:
        return store.resolve(name).manifest.base_digest == base.digest
    except AdapterNotFound:
        return False


def _train(effect: Effect, base: BaseModel, store_root: Path) -> None:
    """Run `trainer fit`, its progress on this terminal."""
    _say(f"training {effect.adapter} on {effect.data}")
    command = [sys.executable, "-m", "trainer.cli", "fit", "--method", "lora", "--data", str(HERE / effect.data)]
    command += ["--name", effect.adapter, "--base", str(base.path), "--store", str(store_root)]
    command += ["--run", str(store_root.parent / "runs" / f"{effect.adapter}-{datetime.now():%Y%m%d-%H%M%S}")]
    code = subprocess.run(command, check=False).returncode
    if code != 0:
        raise DemoError(f"training {effect.adapter} failed (trainer's exit code {code})")


@contextmanager
def _server(base: BaseModel, store_root: Path) -> Iterator[str]:
    """A server process on a free port while the block runs; its address."""
    _say("starting the server")
    command = [sys.executable, "-m", "server.cli", "serve", "--json", "--base", str(base.path)]
    command += ["--store", str(store_root), "--port", "0", "--metrics-port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield _ready_address(process)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
    if process.returncode != 0:
        raise DemoError(f"the server did not stop cleanly (exit code {process.returncode})")


def _ready_address(process: "subprocess.Popen[str]") -> str:
    """Wait for the server's line of JSON that says where it listens."""
    assert process.stdout is not None, "started with a pipe"
    line = process.stdout.readline()  # ends when the server is ready, or when it dies
    if not line:
        raise DemoError(f"the server did not start (exit code {process.wait()})")
    ready = json.loads(line)
    return f"{ready['host']}:{ready['port']}"


async def _ask_all(address: str, board: Board) -> None:
    """Every prompt to every variant, all streams open at once."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        calls = (_ask(stub, prompt, variant, board) for prompt in board.prompts for variant in board.variants)
        await asyncio.gather(*calls)


async def _ask(stub: "inference_pb2_grpc.InferenceServiceAsyncStub", prompt: str, variant: str, board: Board) -> None:
    """One greedy stream, onto the board."""
    request = inference_pb2.StreamGenerateRequest(
        adapter_id="" if variant == BASE else variant,
        messages=common_pb2.Chat(messages=[common_pb2.ChatMessage(role="user", content=prompt)]),
        sampling=common_pb2.Sampling(temperature=0.0),
        stopping=common_pb2.Stopping(max_tokens=MAX_TOKENS),
    )
    try:
        async for piece in stub.StreamGenerate(request, timeout=ANSWER_SECONDS):
            board.append(prompt, variant, piece.text)
    except grpc.aio.AioRpcError as error:
        raise DemoError(f"{variant} did not answer {prompt!r}: {error.code().name}: {error.details()}") from error


def _judge(board: Board) -> int:
    """Say what holds; 1 if an adapter's answer lacks its effect or a base's answer shows one."""
    failed = False
    for effect in EFFECTS.values():
        having = [prompt for prompt in PROMPTS if effect.holds(board.text(prompt, effect.adapter))]
        base_having = [prompt for prompt in PROMPTS if effect.holds(board.text(prompt, BASE))]
        is_good = len(having) == len(PROMPTS) and not base_having
        failed = failed or not is_good
        counts = f"{len(having)} of {len(PROMPTS)} with the adapter, {len(base_having)} with the base alone"
        print(f"{'✓' if is_good else '✗'} {effect.adapter}: the answer {effect.says}: {counts}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
