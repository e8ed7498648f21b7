"""An adapter on both forms of its base, against transformers, PEFT and bitsandbytes; and `lorikeet adapters check`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import PeftModel
from transformers import AutoModelForCausalLM

from adapters.manifest import TrainingInfo
from adapters.store import AdapterStore
from server.base.resolve import BaseModel
from server.cli import main
from server.cli.exits import ExitCode
from tests.engine.inprocess import make_adapter
from tests.trainer.test_served import expected_loss
from trainer.check import check
from trainer.evaluate import encode_questions
from trainer.served import Loss

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def adapter(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("adapter")
    make_adapter(AutoModelForCausalLM.from_pretrained(base.path), directory, seed=3, r=6, std=0.1)
    return directory


def peers(base: BaseModel, quantization: str) -> Any:
    """The base as transformers has it, its layers through NF4 and back by bitsandbytes."""
    model = AutoModelForCausalLM.from_pretrained(base.path).eval()
    if quantization == "nf4":
        for name in base.spec.linears():
            weight = model.get_submodule(name).weight
            codes, state = quantize_4bit(weight.data, blocksize=64, quant_type="nf4", compress_statistics=True)
            weight.data = dequantize_4bit(codes, state)
    return model


def test_losses_on_both_bases_are_those_of_transformers_peft_and_bitsandbytes(
    base: BaseModel, data: Path, adapter: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = encode_questions(data, 100, base).rows
    found = check(adapter, rows, base, CPU, lambda note: None)
    for quantization, losses in found.items():
        model = peers(base, quantization)
        want = Loss.sum([expected_loss(model, row) for row in rows]).mean
        assert losses.base == pytest.approx(want, rel=1e-4), quantization
        model = PeftModel.from_pretrained(model, str(adapter)).eval()
        want = Loss.sum([expected_loss(model, row) for row in rows]).mean
        assert losses.adapter == pytest.approx(want, rel=1e-4), quantization
    assert found["none"].adapter != pytest.approx(found["nf4"].adapter, rel=1e-3)

    store = AdapterStore(tmp_path / "store")
    training = TrainingInfo(method="qlora", base_quantization="nf4")
    store.publish(
        adapter, "mine", base_digest=base.digest, base_name=base.name, linears=base.spec.linears(), training=training
    )
    capfd.readouterr()
    options = ["--data", str(data), "--base", str(base.path), "--store", str(store.root), "--device", "cpu", "--json"]
    assert main(["adapters", "check", "mine", *options]) == ExitCode.OK
    told = json.loads(capfd.readouterr().out)
    assert told["trained_quantization"] == "nf4"
    for quantization, losses in found.items():
        assert told["loss"][quantization] == pytest.approx({"base": losses.base, "adapter": losses.adapter}, rel=1e-5)
    assert main(["adapters", "check", "other", *options]) == ExitCode.NOT_FOUND
