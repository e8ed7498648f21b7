"""The same rows through TRL's SFTTrainer: the same losses, step after step."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from server.base.resolve import BaseModel
from tests.trainer.recorder import Recorder
from trainer.batches import Position, StepData
from trainer.encoding import Example
from trainer.loop import Loop
from trainer.methods.adapter import add_adapter
from trainer.settings import Settings

STEPS, BATCH = 50, 4
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class InOrder:
    """The rows as they come, without mixing: what TRL does with `shuffle_dataset` off and a sequential sampler."""

    def __init__(self, rows: Sequence[Example]) -> None:
        self._rows = rows

    def steps(self, start: Position) -> Any:
        for index in range(0, len(self._rows), BATCH):
            rows = [[row] for row in self._rows[index : index + BATCH]]
            yield StepData(rows, 0, Position(0, 0, index), ends_epoch=False)


def make_rows() -> list[Example]:
    generator = torch.Generator().manual_seed(3)
    rows = []
    for _ in range(STEPS * BATCH):
        length = int(torch.randint(6, 24, (), generator=generator))
        start = int(torch.randint(2, 200, (), generator=generator))
        ids = [(start + 3 * n) % 290 + 2 for n in range(length)]  # a rule, so that there is something to learn
        rows.append(Example.of(ids, [n > 2 for n in range(length)]))
    return rows


def by_trl(
    base: BaseModel, rows: Sequence[Example], dtype: torch.dtype, directory: Path
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """TRL's losses, and the adapter's first weights."""
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=dtype)
    data = Dataset.from_list(
        [{"input_ids": row.ids.tolist(), "completion_mask": row.mask.astype(int).tolist()} for row in rows]
    )
    config = SFTConfig(
        output_dir=str(directory),
        per_device_train_batch_size=BATCH,
        max_steps=STEPS,
        learning_rate=5e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        bf16=dtype is torch.bfloat16,
        use_cpu=True,
        gradient_checkpointing=False,
        completion_only_loss=True,
        train_sampling_strategy="sequential",
        seed=0,
        disable_tqdm=True,
    )
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=data,
        peft_config=lora,
        processing_class=AutoTokenizer.from_pretrained(base.path, pad_token="<|end|>"),
    )
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], start


def by_us(base: BaseModel, rows: Sequence[Example], dtype: torch.dtype, start: dict[str, torch.Tensor]) -> list[float]:
    settings = Settings(
        rank=8, batch_size=BATCH, learning_rate=5e-3, schedule="constant", warmup=0.0, max_grad_norm=1.0
    )
    lm: Any = AutoModelForCausalLM.from_pretrained(base.path, dtype=dtype).requires_grad_(False)
    model = add_adapter(lm, settings, TARGETS)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(start[name])
    loop = Loop(lm, settings, pad_id=1, device=torch.device("cpu"), dtype=dtype)
    recorder = Recorder()
    loop.run(InOrder(rows), STEPS, [], recorder)  # type: ignore[arg-type]
    return [step.loss for step in recorder.steps]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_fifty_steps_have_trls_losses(dtype: torch.dtype, tolerance: float, base: BaseModel, tmp_path: Path) -> None:
    rows = make_rows()
    theirs, start = by_trl(base, rows, dtype, tmp_path)
    ours = by_us(base, rows, dtype, start)
    assert len(theirs) == len(ours) == STEPS
    assert ours[-1] < ours[0] - 1
    assert ours == pytest.approx(theirs, rel=tolerance)
