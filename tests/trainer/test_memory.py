"""The estimate against the kernel's account of twelve configurations, and what follows from it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from server.base.resolve import BaseModel
from trainer.cli import main
from trainer.memory import estimate, needs_checkpointing
from trainer.settings import Settings

CPU = torch.device("cpu")
CASES = [
    {"settings": {"method": method}, "dtype": dtype, "rows": rows, "length": length, "checkpointing": checkpointing}
    for method in ("lora", "qlora", "full")
    for dtype in ("float32", "bfloat16")
    for rows, length, checkpointing in ((6, 256, False), (2, 1024, True))
]

SHARDED = [
    {"settings": {"method": method}, "dtype": "float32", "rows": rows, "length": 128, "checkpointing": ck, "devices": 2}
    for method, rows, ck in (("full", 8, False), ("full", 1, True), ("lora", 8, True))
]


@pytest.mark.timeout(900)
def test_the_estimate_is_within_a_tenth_of_what_is_taken(base: BaseModel, tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=16000,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=3,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    command = [sys.executable, "-m", "tests.trainer.measure_memory"]
    done = subprocess.run(
        [*command, str(base.path), str(tmp_path / "model"), json.dumps(CASES + SHARDED)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) == 12 + 3
    for line in found:
        assert line["estimated"] == pytest.approx(line["measured"], rel=0.1), line["case"]


def of(base: BaseModel, **options: Any) -> Any:
    given: dict[str, Any] = {"rows": 2, "length": 64, "learned": 100, "dtype": torch.float32, "checkpointing": False}
    settings = Settings(**options.pop("settings", {}))
    return estimate(base.path, settings, device=CPU, **(given | options))


def test_what_is_counted_exactly_is_exact(base: BaseModel) -> None:
    model: Any = LlamaForCausalLM.from_pretrained(base.path)
    size = sum(p.numel() for p in model.parameters()) * 4
    assert of(base, settings={"method": "full"}).weights == pytest.approx(size, rel=1e-3)
    found = of(base, settings={"rank": 4, "target_modules": ("q_proj",)})
    assert found.adapters == found.gradients == 2 * (4 * 64 + 64 * 4) * 4  # layers, A and B, fp32
    assert found.optimizer == 2 * found.adapters


def test_more_rows_take_more_and_checkpointing_takes_less(base: BaseModel) -> None:
    one, many, less = of(base), of(base, rows=8, learned=400), of(base, rows=8, learned=400, checkpointing=True)
    assert one.total < less.total < many.total
    assert one.weights == many.weights == less.weights


def test_checkpointing_is_on_when_a_step_would_not_fit(base: BaseModel) -> None:
    config = {"num_hidden_layers": 2, "hidden_size": 64}

    def on(available: int, **changes: Any) -> bool:
        return needs_checkpointing(base.path, Settings(**changes), config, 64, torch.float32, CPU, available)

    total = of(base, rows=8, learned=512).total
    assert on(total)
    assert not on(2 * total)
    assert not on(1 << 40)
    assert on(1 << 40, gradient_checkpointing="on")
    assert not on(1, gradient_checkpointing="off")


def test_the_command_counts_what_each_of_several_devices_holds(
    base: BaseModel, capsys: pytest.CaptureFixture[str]
) -> None:
    def parts(*options: str) -> dict[str, int]:
        common = [
            "--base",
            str(base.path),
            "--method",
            "full",
            "--device",
            "cpu",
            "--dtype",
            "float32",
            "--length",
            "32",
        ]
        assert main(["estimate", *common, *options, "--json"]) == 0
        off: dict[str, int] = json.loads(capsys.readouterr().out)["checkpointing"]["off"]
        return off

    one, half = parts("--batch-size", "2"), parts("--batch-size", "4", "--devices", "2")
    assert {name: one[name] / half[name] for name in ("weights", "optimizer")} == {"weights": 2, "optimizer": 2}
    assert (one["gathered"], half["gathered"] > 0) == (0, True)
    apart = parts("--batch-size", "4", "--devices", "2", "--shard", "off")
    assert (apart["weights"], apart["total"]) == (one["weights"], one["total"])
    assert main(["estimate", "--base", str(base.path), "--batch-size", "3", "--devices", "2"]) == 2
    assert "batch-size 3 cannot be split over 2 devices" in capsys.readouterr().err


def test_on_a_gpu_a_layer_keeps_what_the_fused_one_does(tmp_path: Path) -> None:
    """The residual stream twice, q, k, v, the attention's result and its sums, gate and up; not what is recomputed."""
    hidden, inner, heads, kv_heads, head_dim, tokens = 256, 1024, 4, 2, 64, 2 * 128

    def activations(layers: int) -> int:
        directory = tmp_path / str(layers)
        LlamaConfig(
            hidden_size=hidden,
            intermediate_size=inner,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            num_hidden_layers=layers,
            vocab_size=300,
        ).save_pretrained(directory)
        found = estimate(
            directory,
            Settings(rank=4, batch_size=2),
            rows=2,
            length=128,
            learned=tokens,
            dtype=torch.bfloat16,
            device=torch.device("cuda"),
            checkpointing=False,
        )
        return found.activations + found.logits + found.gradients

    numbers = 2 * hidden + (heads + 2 * kv_heads) * head_dim + heads * head_dim + 2 * inner
    kept = tokens * (2 * numbers + 4 * heads)
    lora = 4 * (7 * 4 * 2) * 2 * inner  # copies and gradients of LoRA's weights, at most
    grown = (activations(6) - activations(2)) / 4
    assert kept <= grown <= kept + lora
