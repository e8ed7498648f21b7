"""Time TRL's SFTTrainer as `benchmarks.train` times `trainer`: the same rows, rank, targets, optimizer and JSON keys.

    python benchmarks/peers/trl_train.py --model DIR --tokenizer DIR --method qlora --batch 2 --checkpointing

It imports nothing of Lorikeet and needs trl, datasets and bitsandbytes. The tokenizer is only there because SFTTrainer
wants one: rows are token ids.
"""

import argparse
import json
import resource
import tempfile
import time
from typing import Any

import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback

WARMUP = 4  # steps that are not counted
ROWS = 64


class Clock(TrainerCallback):
    """Keeps when each step ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a model directory, with weights")
    parser.add_argument("--tokenizer", required=True, help="a directory with any tokenizer")
    parser.add_argument("--method", choices=["lora", "qlora"], default="lora")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--vocab", type=int, default=40000)
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as scratch:
        trainer, clock = build(args, cuda, scratch)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    step = (clock.times[-1] - clock.times[WARMUP - 1]) / (len(clock.times) - WARMUP)
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    line = {
        "peer": f"trl {trl.__version__}",
        "method": args.method,
        "batch": args.batch,
        "length": args.length,
        "checkpointing": args.checkpointing,
        "step_ms": round(step * 1e3),
        "tok_s": round(args.batch * args.length / step),
        "peak_gib": round(peak / 2**30, 1),
    }
    print(json.dumps(line), flush=True)


def build(args: argparse.Namespace, cuda: bool, scratch: str) -> tuple[Any, Clock]:
    """TRL's trainer for what `args` say, and the clock that it tells of its steps."""
    four_bit = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        args.model,
        dtype=torch.bfloat16,
        device_map={"": 0 if cuda else "cpu"},
        attn_implementation="sdpa",
        quantization_config=four_bit if args.method == "qlora" else None,
    )
    config = trl.SFTConfig(
        output_dir=scratch,
        max_length=args.length,
        per_device_train_batch_size=args.batch,
        max_steps=args.steps,
        learning_rate=1e-4,
        bf16=True,
        use_cpu=not cuda,
        optim="paged_adamw_8bit" if args.method == "qlora" else "adamw_torch_fused",
        gradient_checkpointing=args.checkpointing,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
    )
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(1000, args.vocab, (args.length,), generator=generator).tolist() for _ in range(ROWS)]
    clock = Clock()
    trainer = trl.SFTTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        processing_class=AutoTokenizer.from_pretrained(args.tokenizer),
        callbacks=[clock],
    )
    return trainer, clock


if __name__ == "__main__":
    main()
