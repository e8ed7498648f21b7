"""Time the engine in-process, one JSON line a case, with the keys of the peers' scripts.

    python -m benchmarks.engine [--model DIR] [--adapters DIR] [--cases 1x0,16x16] [--prompt 32] [--new 32]

A case is batch × adapters: `batch` sequences over as many distinct adapters (0: none), greedy, with random prompts.
`prefill_ms` is the time to all first tokens; `step_ms` is that of one decode step, from the difference of two runs.
Each time is the median of `--repeats`. `--adapters` holds PEFT directories a0, a1, …; random ones of `--ranks` are made
when it is absent. `adapter_bytes` are the weights of a case's adapters, each at its own rank: what a decode step reads
for them, once each, beside the base's. With `--merge`, the cases without adapters are timed once more when a0 is merged
into the base and all requests are for it (`mode` ends in `-merged`).

On a GPU, as the peers are timed: `--device cuda --prompt 512 --new 256 --max-batch-tokens 8192`.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import torch

from adapters.content import content_digest
from adapters.files import hash_file
from adapters.validation import CONFIG_FILE, WEIGHTS_FILE
from benchmarks.live import adapter_bytes, surroundings
from benchmarks.random_adapters import write_random_adapters
from server.base.resolve import BaseModel, resolve_base
from server.config import EngineConfig
from server.engine.build import build_engine
from server.engine.engine import Engine
from server.engine.messages import (
    AdapterRef,
    CallDone,
    LoadAdapter,
    MergeAdapter,
    RequestFailed,
    SamplingParams,
    StepOutputs,
    StopParams,
    Submit,
    ToEngine,
    ToFrontend,
)

CPU_CASES = "1x0,16x0,1x1,16x1,16x16"


class Collector:
    """Stands where the front end would: keeps what the engine sends."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self.num_ended = 0
        self.calls_done = 0

    def receive(self, timeout: float) -> Iterable[ToEngine]:
        return ()

    def wake(self) -> None:
        pass

    def send(self, message: ToFrontend) -> None:
        match message:
            case StepOutputs(outputs):
                self.num_tokens += sum(len(output.token_ids) for output in outputs)
                self.num_ended += sum(output.finish_reason is not None for output in outputs)
            case RequestFailed():
                raise RuntimeError(message.error.message)
            case CallDone():
                if message.error is not None:
                    raise RuntimeError(message.error.message)
                self.calls_done += 1


class Bench:
    """An engine with the wanted adapters resident."""

    def __init__(
        self, engine: Engine, collector: Collector, vocab: int, adapters: list[AdapterRef], prompt: int
    ) -> None:
        self._engine = engine
        self._collector = collector
        self._vocab = vocab
        self._adapters = adapters
        self._prompt = prompt
        self._rng = random.Random(0)
        self._num_submitted = 0
        for index, adapter in enumerate(adapters):
            engine.handle(LoadAdapter(str(index), adapter))
        self._await_calls(len(adapters))

    def merge(self) -> None:
        """Merge the first adapter into the base, whatever that does to it."""
        calls, (probe,) = self._collector.calls_done, self._prompts(1)
        self._engine.handle(MergeAdapter("merge", self._adapters[0], probe, drain_seconds=60.0, force=True))
        self._await_calls(calls + 1)

    def _await_calls(self, count: int) -> None:
        while self._collector.calls_done < count:
            self._engine.step()
            time.sleep(0.001)  # leave the interpreter to the threads that work on them

    def run(self, batch: int, new: int, adapters: int) -> float:
        """Seconds for `batch` sequences of `new` tokens each."""
        prompts = self._prompts(batch)
        began = time.perf_counter()
        self._submit(prompts, new, adapters)
        self.finish()
        return time.perf_counter() - began

    def submit(self, batch: int, adapters: int, new: int) -> None:
        """Have `batch` sequences of `new` tokens each begin with the next step."""
        self._submit(self._prompts(batch), new, adapters)

    def step(self, count: int) -> None:
        """So many steps, to the end of what they start on the device."""
        for _ in range(count):
            self._engine.step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def finish(self) -> None:
        """Step until all sequences have ended."""
        while self._collector.num_ended < self._num_submitted:
            self._engine.step()

    def _prompts(self, batch: int) -> list[list[int]]:
        return [[self._rng.randrange(1000, self._vocab) for _ in range(self._prompt)] for _ in range(batch)]

    def _submit(self, prompts: list[list[int]], new: int, adapters: int) -> None:
        sampling, stopping = SamplingParams(temperature=0.0, seed=0), StopParams(max_tokens=new, ignore_eos=True)
        for i, prompt in enumerate(prompts):
            adapter = self._adapters[i % adapters] if adapters else None
            self._engine.handle(Submit(f"{i}", prompt, sampling, stopping, adapter))
        self._num_submitted += len(prompts)

    def case(self, batch: int, adapters: int, new: int, repeats: int) -> dict[str, object]:
        self.run(batch, 4, adapters)
        first = statistics.median(self.run(batch, 1, adapters) for _ in range(repeats))
        whole = statistics.median(self.run(batch, 1 + new, adapters) for _ in range(repeats))
        step = (whole - first) / new
        return {
            "peer": f"lorikeet {version('lorikeet')}",
            "batch": batch,
            "adapters": adapters,
            "prefill_ms": round(first * 1e3, 1),
            "step_ms": round(step * 1e3, 2),
            "decode_tok_s": round(batch / step, 1),
        }


def adapter_ref(directory: Path, base: BaseModel) -> AdapterRef:
    """A PEFT directory under the digest of its files."""
    hashes = {name: hash_file(directory / name) for name in (CONFIG_FILE, WEIGHTS_FILE)}
    return AdapterRef(content_digest(base.digest, hashes), str(directory))


def accelerator(device: str) -> dict[str, object]:
    """The GPU, and the versions of what runs on it."""
    if not device.startswith("cuda"):
        return {}
    found = {package: version(package) for package in ("triton", "flashinfer-python")}
    return {"hardware": torch.cuda.get_device_name(device), **found}


def rank_of(directory: Path) -> int:
    """Of a PEFT adapter whose layers have one rank."""
    rank: int = json.loads((directory / CONFIG_FILE).read_text())["r"]
    return rank


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model directory; the embedded default when absent")
    parser.add_argument("--adapters", type=Path)
    parser.add_argument("--ranks", default="8", help="of random adapters, used in turn: 8,16,64")
    parser.add_argument("--adapter-memory", type=int, help="bytes on the device for adapters")
    parser.add_argument("--cases", default=CPU_CASES, help="batch x adapters, …")
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--max-batch-tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quantization", choices=["none", "nf4", "fp4"], help="as the checkpoint is when absent")
    parser.add_argument("--merge", action="store_true")
    args = parser.parse_args()
    args.cases = [
        (int(batch), int(adapters)) for batch, adapters in (case.split("x") for case in args.cases.split(","))
    ]
    return args


def main() -> None:
    args = parse()
    base = resolve_base(args.model)
    collector = Collector()
    config = EngineConfig(
        base_path=str(base.path),
        base_digest=base.digest,
        device=args.device,
        max_model_len=min(base.spec.max_position, args.prompt + args.new + 16),
        max_num_seqs=max(batch for batch, _ in args.cases),
        max_batch_tokens=args.max_batch_tokens,
        adapter_cache_bytes=args.adapter_memory,
        prefix_caching=False,
        canary=False,
        quantization=args.quantization,
    )
    began = time.perf_counter()
    engine = build_engine(config, collector)
    print(json.dumps({"ready_s": round(time.perf_counter() - began, 1), "memory": engine.stats().memory}), flush=True)
    count = max(int(args.merge), *(adapters for _, adapters in args.cases))
    with tempfile.TemporaryDirectory() as scratch:
        if args.adapters is None:
            write_random_adapters(base.spec, Path(scratch), count, *map(int, args.ranks.split(",")))
        directories = [(args.adapters or Path(scratch)) / f"a{i}" for i in range(count)]
        refs = [adapter_ref(directory, base) for directory in directories]
        sizes = [adapter_bytes(base, rank_of(directory)) for directory in directories]
        bench = Bench(engine, collector, min(base.spec.vocab_size, 40000), refs, args.prompt)
    mode = "bnb-lora" if engine.ready.quantization else "lora"
    about = {"prompt": args.prompt, "new": args.new} | surroundings() | accelerator(args.device)
    for batch, adapters in args.cases:
        line = {"mode": mode} | bench.case(batch, adapters, args.new, args.repeats)
        print(json.dumps(line | {"adapter_bytes": sum(sizes[:adapters])} | about), flush=True)
    if args.merge:
        bench.merge()
        for batch in dict.fromkeys(batch for batch, adapters in args.cases if not adapters):
            line = {"mode": f"{mode}-merged"} | bench.case(batch, 1, args.new, args.repeats)
            print(json.dumps(line | about), flush=True)
    engine.check_integrity()


if __name__ == "__main__":
    main()
