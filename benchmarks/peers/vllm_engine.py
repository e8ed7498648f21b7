"""Time vLLM as `benchmarks.engine` times Lorikeet: the same cases, kind of prompts, two-run difference and JSON keys.

It imports nothing of Lorikeet, as it runs in vLLM's own environment:

    python3 -m venv peer && peer/bin/pip install vllm
    peer/bin/python benchmarks/peers/vllm_engine.py --model DIR --adapters DIR [--quantization nf4]

`--adapters` holds PEFT directories a0, a1, … of one rank. For vLLM's CPU build, as `benchmarks.engine` runs by default:
`--cases 1x0,16x0,1x1,16x1,16x16 --prompt 32 --new 32`, and VLLM_CPU_KVCACHE_SPACE=2.
"""

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # as Lorikeet's: the engine in this process
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

GPU_CASES = "1x0,64x0,1x1,64x1,64x8,64x64"


def main() -> None:
    """Run the cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a model directory")
    parser.add_argument("--adapters", type=Path)
    parser.add_argument("--cases", default=GPU_CASES, help="batch x adapters, …")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quantization", choices=["none", "nf4"], default="none", help="nf4: by bitsandbytes")
    parser.add_argument("--memory", type=float, default=0.85, help="share of the GPU's memory that vLLM may take")
    args = parser.parse_args()
    cases = [tuple(map(int, case.split("x"))) for case in args.cases.split(",")]
    run, peer = start(args, max(batch for batch, _ in cases), max(adapters for _, adapters in cases))
    for batch, adapters in cases:
        line = {"peer": peer, "mode": "bnb-lora" if args.quantization == "nf4" else "lora"}
        print(json.dumps(line | time_case(run, batch, adapters, args.new, args.repeats)), flush=True)


def start(args: argparse.Namespace, most: int, num_adapters: int) -> tuple[Callable[[int, int, int], float], str]:
    """A loaded vLLM for up to `most` sequences: `run(batch, new, adapters)` in seconds, and its name."""
    import vllm
    from vllm.lora.request import LoRARequest

    options: dict[str, Any] = {}
    if args.quantization == "nf4":
        options |= {"quantization": "bitsandbytes", "load_format": "bitsandbytes"}
    if num_adapters:
        rank = json.loads((args.adapters / "a0" / "adapter_config.json").read_text())["r"]
        options |= {
            "enable_lora": True,
            "max_lora_rank": rank,
            "max_loras": num_adapters,
            "max_cpu_loras": num_adapters,
        }
    llm = vllm.LLM(
        model=args.model,
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=args.prompt + args.new + 16,
        max_num_seqs=most,
        gpu_memory_utilization=args.memory,
        enable_prefix_caching=False,
        disable_log_stats=True,
        **options,
    )
    vocab = min(llm.llm_engine.model_config.get_vocab_size(), 40000)
    rng = random.Random(0)

    def run(batch: int, new: int, adapters: int) -> float:
        ids = [[rng.randrange(1000, vocab) for _ in range(args.prompt)] for _ in range(batch)]
        named = [LoRARequest(f"a{i}", i + 1, str(args.adapters / f"a{i}")) for i in range(adapters)]
        sampling = vllm.SamplingParams(temperature=0, max_tokens=new, min_tokens=new, ignore_eos=True, detokenize=False)
        began = time.perf_counter()
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in ids],
            sampling,
            lora_request=[named[i % adapters] for i in range(batch)] if adapters else None,
            use_tqdm=False,
        )
        took = time.perf_counter() - began
        assert all(len(output.outputs[0].token_ids) == new for output in outputs), "a sequence ended early"
        return took

    return run, f"vllm {vllm.__version__}"


def time_case(
    run: Callable[[int, int, int], float], batch: int, adapters: int, new: int, repeats: int
) -> dict[str, object]:
    """The time to all first tokens, and of a decode step by the difference of two runs; medians of `repeats`."""
    for _ in range(2):  # the first loads adapters and may compile
        run(batch, 4, adapters)
    first = statistics.median(run(batch, 1, adapters) for _ in range(repeats))
    step = (statistics.median(run(batch, 1 + new, adapters) for _ in range(repeats)) - first) / new
    return {
        "batch": batch,
        "adapters": adapters,
        "prefill_ms": round(first * 1e3, 1),
        "step_ms": round(step * 1e3, 2),
        "decode_tok_s": round(batch / step, 1),
    }


if __name__ == "__main__":
    main()
