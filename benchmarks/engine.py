"""Time the engine in-process, one JSON line a case, with the keys of the peers' scripts.

    python -m benchmarks.engine [--model DIR] [--adapters DIR] [--cases 1x0,16x16] [--prompt 32] [--new 32]

A case is batch × adapters: `batch` sequences over as many distinct adapters (0: none), greedy, with random prompts.
`prefill_ms` is the time to all first tokens; `step_ms` is that of one decode step, from the difference of two runs.
Each time is the median of `--repeats`. `--adapters` holds PEFT directories a0, a1, …; random ones of rank 8 are made
when it is absent. On a GPU, as the peers are timed: `--device cuda --prompt 512 --new 256 --max-batch-tokens 8192`.
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
from benchmarks.live import surroundings
from benchmarks.random_adapters import write_random_adapters
from server.base.resolve import BaseModel, resolve_base
from server.config import EngineConfig
from server.engine.build import build_engine
from server.engine.engine import Engine
from server.engine.messages import (
    AdapterRef,
    CallDone,
    LoadAdapter,
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
        for index, adapter in enumerate(adapters):
            engine.handle(LoadAdapter(str(index), adapter))
        while collector.calls_done < len(adapters):
            engine.step()
            time.sleep(0.001)  # leave the interpreter to the thread that reads them

    def run(self, batch: int, new: int, adapters: int) -> float:
        """Seconds for `batch` sequences of `new` tokens each."""
        sampling, stopping = SamplingParams(temperature=0.0, seed=0), StopParams(max_tokens=new, ignore_eos=True)
        ended = self._collector.num_ended
        prompts = [[self._rng.randrange(1000, self._vocab) for _ in range(self._prompt)] for _ in range(batch)]
        began = time.perf_counter()
        for i, prompt in enumerate(prompts):
            adapter = self._adapters[i % adapters] if adapters else None
            self._engine.handle(Submit(f"{i}", prompt, sampling, stopping, adapter))
        while self._collector.num_ended < ended + batch:
            self._engine.step()
        return time.perf_counter() - began

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model directory; the embedded default when absent")
    parser.add_argument("--adapters", type=Path)
    parser.add_argument("--cases", default=CPU_CASES, help="batch x adapters, …")
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--max-batch-tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quantization", choices=["none", "nf4", "fp4"], default="none")
    args = parser.parse_args()
    cases = [(int(batch), int(adapters)) for batch, adapters in (case.split("x") for case in args.cases.split(","))]
    base = resolve_base(args.model)
    collector = Collector()
    config = EngineConfig(
        base_path=str(base.path),
        base_digest=base.digest,
        device=args.device,
        max_model_len=min(base.spec.max_position, args.prompt + args.new + 16),
        max_num_seqs=max(batch for batch, _ in cases),
        max_batch_tokens=args.max_batch_tokens,
        prefix_caching=False,
        canary=False,
        quantization=args.quantization,
    )
    began = time.perf_counter()
    engine = build_engine(config, collector)
    print(json.dumps({"ready_s": round(time.perf_counter() - began, 1), "memory": engine.stats().memory}), flush=True)
    count = max(adapters for _, adapters in cases)
    with tempfile.TemporaryDirectory() as scratch:
        if args.adapters is None:
            write_random_adapters(base.spec, Path(scratch), count, rank=8)
        directory = args.adapters or Path(scratch)
        refs = [adapter_ref(directory / f"a{i}", base) for i in range(count)]
        bench = Bench(engine, collector, min(base.spec.vocab_size, 40000), refs, args.prompt)
    for batch, adapters in cases:
        mode = "lora" if args.quantization == "none" else "bnb-lora"
        line = {"mode": mode} | bench.case(batch, adapters, args.new, args.repeats)
        line |= {"prompt": args.prompt, "new": args.new} | surroundings() | accelerator(args.device)
        print(json.dumps(line), flush=True)
    engine.check_integrity()


if __name__ == "__main__":
    main()
