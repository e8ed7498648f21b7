"""Whole runs on a tiny base: they learn, repeat exactly, and publish what PEFT loads."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters.errors import InvalidAdapterId
from adapters.store import AdapterStore
from server.base.resolve import BaseModel
from tests.trainer.conftest import ANSWER, Fit
from trainer.errors import DataError, SettingsError, TrainingError
from trainer.fit import Job, choose_dtype, cpu_multiplies_bf16, read_end_ids, run
from trainer.settings import Settings


def answer(base: BaseModel, adapter: Path | None, question: str) -> str:
    """Greedy, through transformers and PEFT."""
    tokenizer: Any = AutoTokenizer.from_pretrained(base.path)
    model: Any = AutoModelForCausalLM.from_pretrained(base.path)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    output = model.generate(input_ids=ids, max_new_tokens=24, do_sample=False, eos_token_id=tokenizer.eos_token_id)
    said: str = tokenizer.decode(output[0, ids.shape[1] :])
    return said


@pytest.mark.parametrize(("method", "quantization"), [("lora", None), ("qlora", "nf4")])
def test_an_adapter_learns_and_peft_loads_what_is_published(
    method: str, quantization: str | None, fit: Fit, base: BaseModel
) -> None:
    report, steps = fit(method=method)
    assert report.result.final_loss < 0.2 < report.result.first_epoch_loss
    assert (report.result.num_steps, report.num_examples) == (24, 8)
    assert [step.index for step in steps] == list(range(24))
    for question in ("two", "the fox"):  # not in the data
        assert answer(base, report.version.path, question) == ANSWER + "<|end|>"
        assert ANSWER not in answer(base, None, question)
    manifest = report.version.manifest
    assert (manifest.base_digest, manifest.base_name, manifest.rank) == (base.digest, "tiny", 8)
    assert manifest.training is not None
    assert (manifest.training.method, manifest.training.base_quantization) == (method, quantization)
    assert manifest.training.metrics["loss"] == report.result.final_loss
    assert manifest.training.hyperparameters["learning_rate"] == 2e-2


def test_what_is_published_names_no_directory_of_this_machine(fit: Fit, base: BaseModel) -> None:
    report, _ = fit(epochs=1)
    files = {file.name: file.read_bytes() for file in report.version.path.iterdir()}
    assert not [name for name, content in files.items() if str(base.path).encode() in content]
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors", "manifest.json"}
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "tiny"


def test_a_seed_fixes_every_bit(fit: Fit) -> None:
    one, again, other = (fit(name=n, epochs=2, seed=s)[0].version for n, s in (("a", 3), ("b", 3), ("c", 4)))
    assert one.digest == again.digest
    assert one.digest != other.digest


def test_only_the_chosen_layers_are_trained(fit: Fit) -> None:
    report, _ = fit(epochs=1, rank=3, target_modules=("v_proj", "down_proj"))
    tensors = load_file(report.version.path / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in tensors} == {"v_proj", "down_proj"}
    assert all(3 in tensor.shape for tensor in tensors.values())
    assert all(tensor.dtype is torch.float32 and tensor.abs().sum() > 0 for tensor in tensors.values())


def test_a_loss_that_explodes_ends_the_run_and_publishes_nothing(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer import loop

    real = loop.Loop._step
    monkeypatch.setattr(loop.Loop, "_step", lambda self, batch: real(self, batch) * float("nan"))
    with pytest.raises(TrainingError, match="at step 1; try a smaller learning rate"):
        fit()
    assert AdapterStore(tmp_path / "store").names() == []


def test_what_is_wrong_is_refused_before_training(base: BaseModel, data: Path, tmp_path: Path, fit: Fit) -> None:
    with pytest.raises(InvalidAdapterId):
        fit(name="../up")
    with pytest.raises(SettingsError, match=r"'q_prj' is not in the base; known are down_proj, .*v_proj"):
        fit(target_modules=("q_prj",))
    with pytest.raises(DataError, match=r"rows.jsonl:\d: is \d+ tokens long; max-length is 12 "):
        fit(max_length=12)
    missing = Job(tmp_path / "none.jsonl", "dogs", "latest", "lora", Settings())
    with pytest.raises(DataError, match="no such file"):
        run(missing, base, AdapterStore(tmp_path / "store"), lambda _: None, lambda _: None)
    assert AdapterStore(tmp_path / "store").names() == []


@pytest.mark.parametrize(
    "change",
    [{"rank": 0}, {"epochs": 0}, {"learning_rate": 0.0}, {"learning_rate": float("nan")}, {"alpha": -1.0}],
)
def test_settings_out_of_range_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(SettingsError):
        Settings(**change)  # type: ignore[arg-type]


def test_bf16_is_chosen_where_the_processor_has_it(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    assert not cpu_multiplies_bf16(cpuinfo)
    cpuinfo.write_text("flags\t\t: fpu avx512f avx512_vnni\n")
    assert not cpu_multiplies_bf16(cpuinfo)
    cpuinfo.write_text("flags\t\t: fpu avx512_bf16 avx512_vnni\n")
    assert cpu_multiplies_bf16(cpuinfo)
    cpu = torch.device("cpu")
    assert choose_dtype("auto", "float32", cpu) is torch.float32
    assert choose_dtype("bfloat16", "float32", cpu) is torch.bfloat16


def test_end_tokens_come_from_every_file_that_names_them(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [8, 9]}')
    assert read_end_ids(tmp_path, 2) == {2, 7, 8, 9}
    assert read_end_ids(tmp_path / "none", None) == set()
