"""The loss against transformers' own; what must not change it; what ends a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from server.base.resolve import BaseModel
from tests.trainer.conftest import Train
from tests.trainer.recorder import Recorder
from trainer.batches import Feed, collate
from trainer.encoding import Example
from trainer.errors import TrainingError
from trainer.groups import Alone
from trainer.loop import Interrupted, Loop, Step
from trainer.loss import CausalLoss
from trainer.methods.adapter import add_adapter
from trainer.settings import Settings

CPU = torch.device("cpu")


def examples(count: int = 12) -> list[Example]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(count):
        length = int(torch.randint(3, 20, (), generator=generator))
        ids = torch.randint(2, 300, (length,), generator=generator).tolist()
        made.append(Example.of(ids, [*(torch.rand(length, generator=generator) < 0.6).tolist()[:-1], True]))
    return made


def optimise(base: BaseModel, rows: Sequence[Example], **changes: Any) -> tuple[list[Step], Any, Recorder]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base.path, attn_implementation=changes.pop("attention", "sdpa"))
    settings = Settings(**({"epochs": 2, "batch_size": 6, "learning_rate": 1e-2} | changes))
    add_adapter(model.requires_grad_(False), settings, ("q_proj", "down_proj"))
    recorder = Recorder()
    pack_to = settings.max_length if settings.packing else None
    feed = Feed(lambda first: [rows][first:], batch_size=settings.batch_size, pack_to=pack_to, seed=0)
    trainer = Loop(model, settings, pad_id=0, device=CPU)
    trainer.run(feed, feed.num_steps(rows) * settings.epochs, [], recorder)
    return recorder.steps, trainer, recorder


def test_the_loss_is_what_transformers_computes(base: BaseModel) -> None:
    rows = [[example] for example in examples(5)]
    model = AutoModelForCausalLM.from_pretrained(base.path)
    batch = collate(rows, 0)
    labels = torch.full_like(batch.ids, -100)
    attention = torch.zeros_like(batch.ids)
    for row, (example,) in enumerate(rows):
        attention[row, : len(example)] = 1
        for place, (token, learned) in enumerate(zip(example.ids, example.mask, strict=True)):
            if learned:
                labels[row, place] = int(token)
    with torch.no_grad():
        expected = model(input_ids=batch.ids, attention_mask=attention, labels=labels).loss
        ours = CausalLoss(model)(batch) / len(batch.targets)
    assert float(ours) == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_rows_give_the_loss_and_the_gradients_of_rows_apart(base: BaseModel, attention: str) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(base.path, attn_implementation=attention)
    loss = CausalLoss(model)
    rows = examples(9)

    def gradients(layout: list[list[Example]]) -> tuple[float, torch.Tensor]:
        model.zero_grad()
        total = loss(collate(layout, 0))
        total.backward()
        return float(total.detach()), model.model.layers[0].self_attn.k_proj.weight.grad.clone()

    packed, packed_gradient = gradients([rows[:3], rows[3:4], rows[4:]])
    apart, apart_gradient = gradients([[row] for row in rows])
    assert packed == pytest.approx(apart, rel=1e-5)
    torch.testing.assert_close(packed_gradient, apart_gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_adding_up_gradients_changes_nothing(base: BaseModel, micro_batch: int, packing: bool) -> None:
    options = {"packing": packing, "max_length": 40, "batch_size": 4}
    whole, _, _ = optimise(base, examples(), **options)
    parts, _, _ = optimise(base, examples(), micro_batch=micro_batch, **options)
    assert [step.loss for step in parts] == pytest.approx([step.loss for step in whole], rel=1e-5)
    assert [step.grad_norm for step in parts] == pytest.approx([step.grad_norm for step in whole], rel=1e-4)
    assert whole[-1].loss < whole[0].loss


def test_out_of_memory_halves_the_rows_at_once_and_changes_nothing_else(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _, _ = optimise(base, examples())
    sizes: list[int] = []
    real = CausalLoss.__call__

    def little_memory(self: CausalLoss, batch: Any) -> Any:
        sizes.append(len(batch.ids))
        if len(batch.ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, batch)

    monkeypatch.setattr(CausalLoss, "__call__", little_memory)
    steps, trainer, recorder = optimise(base, examples())
    assert sizes[:3] == [6, 3, 1]
    assert trainer.progress.micro_batch == 1
    assert [step.loss for step in steps] == pytest.approx([step.loss for step in expected], rel=1e-5)
    assert recorder.notes[0] == "out of memory: 3 rows at once from here on, not 6; steps stay as large"

    monkeypatch.setattr(CausalLoss, "__call__", lambda self, batch: torch.empty(1 << 60))
    with pytest.raises(TrainingError, match="out of memory with one row at a time"):
        optimise(base, examples())


def test_a_fault_that_is_not_memory_is_not_taken_for_it(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CausalLoss, "__call__", lambda self, batch: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        optimise(base, examples())


def test_an_interrupted_run_ends_when_the_first_process_has_saved(base: BaseModel) -> None:
    """Else torchrun sees the others end, and ends the first while it writes."""
    heard: list[str] = []

    class Pair(Alone):
        """Of two processes this one; the other is told to stop."""

        def any(self, flag: bool) -> bool:
            heard.append("waits")
            return len(heard) == 2  # of a step: whether memory ran out, whether to stop

    class Stopped(Recorder):
        def save(self, progress: Any) -> None:
            heard.append("saves")

    rows = examples()
    model = AutoModelForCausalLM.from_pretrained(base.path)
    feed = Feed(lambda first: [rows][first:], batch_size=6, pack_to=None, seed=0)
    with pytest.raises(Interrupted):
        Loop(model, Settings(batch_size=6), pad_id=0, device=CPU, group=Pair()).run(feed, 9, [], Stopped())
    assert heard == ["waits", "waits", "saves", "waits"]


def test_lora_plus_gives_b_its_own_rate(base: BaseModel) -> None:
    _, trainer, _ = optimise(base, examples(), lora_plus=4.0, schedule="constant", warmup=0.0)
    names = {p: name for name, p in trainer.named.items()}
    rates = {names[p].split(".")[-3]: g["lr"] for g in trainer.optimizer.param_groups for p in g["params"]}
    assert rates == {"lora_A": pytest.approx(1e-2), "lora_B": pytest.approx(4e-2)}


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
def test_every_optimizer_learns(base: BaseModel, optimizer: str) -> None:
    steps, _, _ = optimise(base, examples(), optimizer=optimizer, epochs=8)
    assert steps[-1].loss < steps[0].loss - 0.5


def test_a_head_that_is_more_than_linear_is_found_out(base: BaseModel) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(base.path)
    ids = torch.tensor(range(5, 15))
    CausalLoss(model).check(ids)
    model.register_forward_hook(lambda module, inputs, output: setattr(output, "logits", output.logits * 0.5))
    with pytest.raises(TrainingError, match="its head is more than a linear layer"):
        CausalLoss(model).check(ids)


@pytest.mark.parametrize("kind", ["llama", "falcon", "opt", "jamba"])
def test_a_model_that_does_not_keep_packed_rows_apart_is_found_out(kind: str) -> None:
    """Falcon takes positions and masks as if there were one row, OPT counts them its own way, Jamba has a state."""
    sizes = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
    more = {
        "jamba": {"num_key_value_heads": 2, "use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1}
    }
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **more.get(kind, {}))).eval()
    ids = torch.randint(3, 96, (12,))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    loss = CausalLoss(model)
    with torch.no_grad():
        positions = torch.cat([torch.arange(12), torch.arange(12)]).unsqueeze(0)
        apart, packed = loss.hidden(ids.unsqueeze(0)), loss.hidden(ids.repeat(2).unsqueeze(0), positions)[:, 12:]
    assert torch.allclose(packed, apart, atol=1e-4) == (kind == "llama")
    if kind == "llama":
        loss.check_packing(ids)
    else:
        with pytest.raises(TrainingError, match="keeps packed rows apart"):
            loss.check_packing(ids)


def test_a_model_without_a_body_of_its_own_is_refused() -> None:
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model: Any = LlamaForCausalLM(config)
    model.base_model_prefix = "language_model"  # as Llama 4's text model has it
    with pytest.raises(TrainingError, match="does not tell its body from its head"):
        CausalLoss(model)


def test_a_loss_that_explodes_ends_the_run_and_keeps_the_last_checkpoint(
    train: Train, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Loop._try_accumulate
    monkeypatch.setattr(
        Loop,
        "_try_accumulate",
        lambda self, rows, n, index: torch.tensor(torch.nan) if index == 5 else real(self, rows, n, index),
    )
    with pytest.raises(TrainingError, match="the loss became nan at step 6"):
        train(run="exploding", checkpoint_every=2)
    monkeypatch.setattr(Loop, "_try_accumulate", real)
    monkeypatch.setattr(Loop, "evaluate", lambda self, examples: (torch.nan, 1))
    with pytest.raises(TrainingError, match="the evaluation's loss became nan at step 1"):
        train(run="blind", eval_data=str(data), eval_every=1)
    assert not (tmp_path / "blind" / "checkpoints").exists()
    kept = sorted(path.name for path in (tmp_path / "exploding" / "checkpoints").iterdir())
    assert kept == ["step-00000002", "step-00000004"]
    assert not (tmp_path / "exploding" / "adapter").exists()
