"""Whole runs on a tiny base: they learn, repeat exactly, and leave what PEFT loads."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, BloomForCausalLM

from server.base.resolve import BaseModel
from tests.trainer.conftest import ANSWER, Train
from trainer.data import Text
from trainer.devices import choose_dtype, cpu_multiplies_bf16
from trainer.encoding import Counts
from trainer.errors import DataError, RunError, SettingsError, TrainingError
from trainer.fit import Watcher, fit
from trainer.methods.adapter import choose_targets
from trainer.prepare import make_encoder, read_end_ids
from trainer.settings import Settings


def answer(base: Path, adapter: Path | None, question: str) -> str:
    """Greedy, through transformers and PEFT."""
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    output = model.generate(input_ids=ids, max_new_tokens=24, do_sample=False, eos_token_id=tokenizer.eos_token_id)
    said: str = tokenizer.decode(output[0, ids.shape[1] :])
    return said


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"method": "qlora"},
        {"method": "qlora", "quantization": "fp4", "double_quantization": False, "optimizer": "paged_adamw_8bit"},
        {"rslora": True, "alpha": 8.0, "dropout": 0.05},
        {"init": "eva"},
        {"init": "olora"},
        {"init": "pissa"},
        {"packing": True, "max_length": 96, "batch_size": 1},
        {"dtype": "bfloat16"},
        {"gradient_checkpointing": "on"},
    ],
    ids=lambda settings: "-".join(f"{name}={value}" for name, value in settings.items()) or "lora",
)
def test_an_adapter_learns_and_peft_loads_it(settings: dict[str, Any], train: Train, base: BaseModel) -> None:
    report, steps = train(**settings)
    assert report.result.final_loss < 0.3 < report.result.first_epoch_loss
    assert [step.index for step in steps] == list(range(report.result.num_steps))
    for question in ("two", "the fox"):  # not in the data
        assert answer(base.path, report.run.adapter, question) == ANSWER + "<|end|>"
        assert ANSWER not in answer(base.path, None, question)


def test_every_weight_can_be_trained(train: Train) -> None:
    report, _ = train(method="full", learning_rate=5e-3)
    assert report.result.final_loss < 0.3 < report.result.first_epoch_loss
    assert answer(report.run.model, None, "two") == ANSWER + "<|end|>"


def test_a_converted_adapter_is_a_plain_lora_of_the_base_as_it_was(train: Train, base: BaseModel) -> None:
    report, _ = train(init="pissa", rank=4, alpha=4.0, epochs=1)
    config = json.loads((report.run.adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 8, True)
    again, _ = train(init="pissa", rank=4, alpha=4.0, epochs=1)
    assert load_file(report.run.adapter / "adapter_model.safetensors").keys() == (
        load_file(again.run.adapter / "adapter_model.safetensors").keys()
    )


@pytest.mark.parametrize("init", ["default", "eva", "olora", "pissa"])
def test_the_files_compute_what_was_trained(init: str, train: Train, base: BaseModel, data: Path) -> None:
    report, _ = train(init=init, epochs=2, eval_data=str(data))
    model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.path), report.run.adapter)
    tokenizer: Any = AutoTokenizer.from_pretrained(base.path)
    total = count = 0.0
    for line in data.read_text().splitlines():
        messages = json.loads(line)["messages"]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
        ids = torch.tensor([tokenizer.encode(text.rstrip("\n"))])
        labels = ids.clone()
        labels[:, : len(tokenizer.encode(prompt))] = -100
        with torch.no_grad():
            learned = int((labels != -100).sum())
            total += float(model(input_ids=ids, labels=labels).loss) * learned
            count += learned
    assert report.result.eval_loss == pytest.approx(total / count, rel=1e-4)


def test_the_adapter_names_no_directory_of_this_machine(train: Train, base: BaseModel) -> None:
    report, _ = train(epochs=1)
    files = {file.name: file.read_bytes() for file in report.run.adapter.iterdir()}
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors"}
    assert not [name for name, content in files.items() if str(base.path).encode() in content]
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "tiny"


def test_a_run_says_what_it_was_made_from_and_how_it_went(train: Train, base: BaseModel, data: Path) -> None:
    report, steps = train(epochs=3, eval_data=str(data), eval_every=2)
    assert report.run.settings() == report.settings
    assert report.settings.alpha == 16.0
    info = report.run.info()
    assert (info["base"], info["base_digest"]) == ("tiny", base.digest)
    assert info["counts"]["rows"] == 8
    assert info["data_digest"] == info["eval_data_digest"] != info["tokenizer_digest"]
    assert info["result"]["num_steps"] == 6
    lines = list(report.run.metrics())
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "eval_loss" in line] == [2, 4, 6]
    assert [line["loss"] for line in lines if "loss" in line] == [step.loss for step in steps]
    assert all(line["tokens_per_second"] > 0 < line["memory_bytes"] for line in lines if "loss" in line)


def test_a_seed_fixes_every_bit(train: Train) -> None:
    files = []
    for seed in (3, 3, 4):
        report, _ = train(epochs=2, seed=seed, dropout=0.1)
        files.append((report.run.adapter / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


def test_only_the_chosen_layers_are_trained_with_ranks_of_their_own(train: Train) -> None:
    report, _ = train(
        epochs=1, rank=3, target_modules=("v_proj", r".*\.1\.mlp\.down_proj"), rank_pattern={r".*\.1\.mlp.*": 5}
    )
    tensors = load_file(report.run.adapter / "adapter_model.safetensors")
    ranks = {name.split("layers.")[1].split(".lora")[0]: min(t.shape) for name, t in tensors.items()}
    assert ranks == {"0.self_attn.v_proj": 3, "1.self_attn.v_proj": 3, "1.mlp.down_proj": 5}
    assert all(tensor.dtype is torch.float32 and tensor.abs().sum() > 0 for tensor in tensors.values())


def test_targets_by_name_path_and_pattern() -> None:
    paths = ["l.0.q_proj", "l.0.v_proj", "l.1.q_proj", "l.1.v_proj"]
    assert choose_targets(paths, ["all-linear"]) == ["q_proj", "v_proj"]
    assert choose_targets(paths, ["v_proj"]) == ["v_proj"]
    assert choose_targets(paths, ["l.1.q_proj", r"l\.0\..*"]) == ["l.0.q_proj", "l.0.v_proj", "l.1.q_proj"]
    assert choose_targets(paths, [r".*q_proj"]) == ["q_proj"]
    with pytest.raises(SettingsError, match=r"'nose' is not in the base; known are q_proj, v_proj"):
        choose_targets(paths, ["nose"])
    with pytest.raises(SettingsError, match="neither a name nor an expression"):
        choose_targets(paths, ["("])
    with pytest.raises(SettingsError, match="no linear layer"):
        choose_targets([], ["all-linear"])


def test_the_best_weights_are_kept_and_a_run_without_progress_ends_early(train: Train, data: Path) -> None:
    report, steps = train(eval_data=str(data), eval_every=1, patience=2, learning_rate=0.9, schedule="constant")
    losses = [line["eval_loss"] for line in report.run.metrics() if "eval_loss" in line]
    assert report.result.eval_loss == min(losses)
    assert len(steps) == len(losses) < 24
    assert report.result.best_step == losses.index(min(losses)) + 1 == len(steps) - 2


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_base_that_is_in_4_bits_already_is_refused(
    method: Literal["lora", "qlora"], base: BaseModel, data: Path, tmp_path: Path
) -> None:
    shutil.copytree(base.path, tmp_path / "base")
    config = json.loads((tmp_path / "base/config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    settings = Settings(base=str(tmp_path / "base"), data=str(data), method=method, device="cpu")
    with pytest.raises(SettingsError, match=r"is in 4 bits \(nf4\) already"):
        fit(settings, tmp_path / "run")


def test_a_bloom_can_be_trained(base: BaseModel, data: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    torch.manual_seed(0)
    config = BloomConfig(
        vocab_size=len(tokenizer), hidden_size=64, n_layer=2, n_head=4, eos_token_id=1, initializer_range=0.15
    )
    BloomForCausalLM(config).save_pretrained(tmp_path / "bloom")
    tokenizer.save_pretrained(tmp_path / "bloom")
    settings = Settings(
        base=str(tmp_path / "bloom"),
        data=str(data),
        learning_rate=2e-2,
        epochs=20,
        batch_size=4,
        dtype="float32",
        device="cpu",
    )
    notes: list[str] = []
    report = fit(settings, tmp_path / "run", Watcher(notes.append))
    assert report.result.final_loss < 0.5
    assert any("can be trained, not served" in note for note in notes)
    tensors = load_file(report.run.adapter / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in tensors} >= {"query_key_value", "dense_h_to_4h"}
    assert answer(tmp_path / "bloom", report.run.adapter, "two") == ANSWER + "<|end|>"
    with pytest.raises(TrainingError, match="packing needs a model that takes position_ids"):
        fit(replace(settings, packing=True), tmp_path / "packed")


def test_a_loaded_base_serves_many_runs_and_is_left_as_it_was(train: Train, base: BaseModel, tmp_path: Path) -> None:
    alone, _ = train(epochs=2)
    model: Any = AutoModelForCausalLM.from_pretrained(base.path, attn_implementation="eager").requires_grad_(False)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    for number in range(2):
        again = fit(alone.settings, tmp_path / f"shared-{number}", base_model=model)
        one, other = (run.run.adapter / "adapter_model.safetensors" for run in (alone, again))
        assert one.read_bytes() == other.read_bytes()
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


def test_a_stream_may_begin_with_rows_that_are_dropped(train: Train, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(
        "\n".join(json.dumps({"text": text}) for text in ("dog " * 90, "a dog", "fox"))
    )
    stream = {"data": str(tmp_path / "rows.jsonl"), "streaming": True, "shuffle_buffer": 1, "max_steps": 3}
    report, _ = train(**stream, too_long="drop", max_length=40)
    assert report.result.num_steps == 3
    with pytest.raises(DataError, match="every row is longer than max-length"):
        train(**stream, too_long="drop", max_length=2)


def test_eva_takes_as_many_rows_at_once_as_it_needs_directions(train: Train) -> None:
    report, _ = train(init="eva", rank=16, epochs=1)  # four rows have fewer than 32 learned tokens
    assert report.result.num_steps == 2
    with pytest.raises(SettingsError, match=r"init eva needs data with 64 learned tokens for this rank, not \d\d"):
        train(init="eva", rank=32)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank_pattern": {"q_prj": 4}}, "rank-pattern 'q_prj' is of no layer that is trained"),
        ({"alpha_pattern": {"v_proj": 4.0}, "target_modules": ("q_proj",)}, "alpha-pattern 'v_proj' is of no layer"),
        ({"rank_pattern": {"(": 4}}, "neither a name nor an expression"),
        ({"init": "pissa", "rank": 33}, "init pissa can give model.layers.0.self_attn.k_proj a rank of 32 at most"),
        ({"init": "olora", "rank": 33}, "a rank of 32 at most, not 33"),
        ({"init": "eva", "rank": 33}, "a rank of 32 at most, not 33"),
        ({"seed": 1 << 32}, "seed must be at least 0 and below"),
    ],
    ids=str,
)
def test_a_rank_that_no_layer_can_have_is_refused(settings: dict[str, Any], words: str, train: Train) -> None:
    with pytest.raises(SettingsError, match=words):
        train(**settings)


def test_what_is_wrong_is_refused_before_training(train: Train, base: BaseModel, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"'q_prj' is not in the base; known are down_proj, .*v_proj"):
        train(target_modules=("q_prj",))
    with pytest.raises(DataError, match=r"rows.jsonl:\d: is \d+ tokens long; max-length is 12 "):
        train(max_length=12)
    with pytest.raises(DataError, match="every row is longer than max-length"):
        train(max_length=12, too_long="drop")
    with pytest.raises(DataError, match=r"none\.jsonl: no such file"):
        train(data=str(tmp_path / "none.jsonl"))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(RunError, match=r"taken: is not empty; resume it with `trainer resume"):
        train(run="taken")
    shutil.copytree(base.path, tmp_path / "other")
    for kind, words in (
        ("t5", r"is no causal language model \(model_type t5\)"),
        ("nosuch", "loads no causal language"),
    ):
        (tmp_path / "other" / "config.json").write_text(json.dumps({"model_type": kind}))
        with pytest.raises(SettingsError, match=f"other: .*{words}"):
            train(base=str(tmp_path / "other"), run=kind)


@pytest.mark.parametrize("name", ["max_position_embeddings", "n_positions"])
def test_no_row_is_longer_than_the_base_can_take(name: str, base: BaseModel) -> None:
    encoder = make_encoder(Settings(), AutoTokenizer.from_pretrained(base.path), base.path, {name: 12})
    with pytest.raises(DataError, match=r"x:1: is \d+ tokens long; max-length is 12"):
        list(encoder.encode_all([Text("dog " * 10, "x:1")], Counts()))


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
