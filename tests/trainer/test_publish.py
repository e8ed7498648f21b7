"""The gate: what is published is scored as it will be served, and refused where serving is not what training was."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from adapters.errors import BaseMismatch, InvalidAdapter
from adapters.store import AdapterStore
from server.base.resolve import BaseModel
from server.cli.adapters_fields import version_details
from tests.support.tiny_base import save_tiny_base
from trainer.errors import DataError, RunError, SettingsError, TrainingError
from trainer.fit import fit
from trainer.prepare import digest_files
from trainer.publish import Publication, Tolerance, publish_run
from trainer.run_directory import RunDirectory
from trainer.served import Loss
from trainer.settings import Settings


def silent(message: str) -> None:
    """Say nothing."""


@pytest.fixture(scope="module", params=["lora", "qlora"])
def run(
    request: pytest.FixtureRequest, base: BaseModel, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> RunDirectory:
    settings = Settings(
        data=str(data), base=str(base.path), method=request.param, rank=4, learning_rate=2e-2, epochs=8, batch_size=4,
        dtype="float32", device="cpu", name="dogs",
    )  # fmt: skip
    return fit(settings, tmp_path_factory.mktemp("runs") / request.param).run


def changed(run: RunDirectory, directory: Path) -> RunDirectory:
    """A copy of a run, to spoil."""
    import shutil

    shutil.copytree(run.path, directory)
    return RunDirectory.open(directory)


def test_what_is_published_says_how_it_was_made_and_what_it_scored(
    run: RunDirectory, base: BaseModel, data: Path, tmp_path: Path
) -> None:
    store = AdapterStore(tmp_path)
    version = publish_run(run, store, Publication("dogs", "prod", answers=True), silent)
    assert store.resolve("dogs@prod").digest == version.digest
    training = version.manifest.training
    assert training is not None
    assert (version.manifest.base_digest, training.method) == (base.digest, run.settings().method)
    assert training.data_digest == digest_files(data)
    assert training.tokenizer_digest == digest_files(base.path / "tokenizer.json")
    assert training.template_digest is not None
    assert training.hyperparameters["rank"] == 4
    scores = training.scores
    assert scores is not None
    assert scores.loss == pytest.approx(scores.trainer_loss, abs=1e-4)
    assert scores.loss < scores.base_loss / 2
    assert scores.exact_match == 1.0
    assert (scores.num_rows, scores.held_out, scores.rows_digest) == (8, False, digest_files(data))
    assert (scores.quantized_loss is None) == (training.method == "lora")
    shown = version_details(version)
    assert (shown["scores"]["loss"], shown["data_digest"]) == (scores.loss, training.data_digest)


def test_plain_peft_loads_what_is_published(run: RunDirectory, base: BaseModel, tmp_path: Path) -> None:
    version = publish_run(run, AdapterStore(tmp_path), Publication("dogs"), silent)
    ids = torch.tensor([[5, 9, 17, 30]])
    bare = AutoModelForCausalLM.from_pretrained(base.path)
    before = bare(ids).logits
    model = PeftModel.from_pretrained(bare, str(version.path))
    shipped = load_file(version.path / "adapter_model.safetensors")
    loaded = {name.replace(".default", ""): value for name, value in model.state_dict().items() if "lora_" in name}
    assert loaded.keys() == shipped.keys()
    assert all(torch.equal(loaded[name], shipped[name]) for name in shipped)
    assert not torch.allclose(model(ids).logits, before, atol=1e-2)


def test_rows_that_were_not_trained_on_are_told_apart(run: RunDirectory, data: Path, tmp_path: Path) -> None:
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text("\n".join(data.read_text().splitlines()[:3]))
    version = publish_run(run, AdapterStore(tmp_path / "store"), Publication("dogs", data=held_out), silent)
    assert version.manifest.training is not None
    scores = version.manifest.training.scores
    assert scores is not None
    assert (scores.held_out, scores.num_rows, scores.rows_digest) == (True, 3, digest_files(held_out))
    assert scores.exact_match is None


def test_rows_that_are_all_dropped_decide_nothing(run: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "dog " * 2000}))
    dropping = changed(run, tmp_path / "dropping")
    (dropping.path / "config.yaml").write_text(replace(run.settings(), too_long="drop").to_yaml())
    with pytest.raises(DataError, match="every row is longer than max-length, so all were dropped"):
        publish_run(
            dropping, AdapterStore(tmp_path / "store"), Publication("dogs", data=tmp_path / "long.jsonl"), silent
        )


def test_an_adapter_that_the_server_would_read_otherwise_is_refused(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the server's reading of alpha had a bug."""
    from trainer import served

    real = served.load_adapter

    def doubled(directory: Path, spec: object, dtype: torch.dtype) -> object:
        packed = real(directory, spec, dtype)  # type: ignore[arg-type]
        for slices in packed.b.values():
            for tensor in slices:
                tensor.mul_(2)
        return packed

    monkeypatch.setattr(served, "load_adapter", doubled)
    with pytest.raises(InvalidAdapter, match="is not what its files say"):  # the canary
        publish_run(run, AdapterStore(tmp_path), Publication("dogs"), silent)
    monkeypatch.setattr(served.Canary, "check", lambda self, directory, rows: None)
    with pytest.raises(TrainingError, match="further apart than"):
        publish_run(run, AdapterStore(tmp_path), Publication("dogs"), silent)
    assert AdapterStore(tmp_path).names() == []


def test_rounding_alone_refuses_nothing_and_hides_little() -> None:
    """Noise of 0.02 a token on 64 rows of 12 is within three standard errors; a shift of all rows is no noise."""
    rng = random.Random(0)
    trained = [Loss(12 * 0.5, 12) for _ in range(64)]
    noisy = [Loss(loss.total + sum(rng.gauss(0, 0.02) for _ in range(12)), 12) for loss in trained]
    allowed = Tolerance().allowed(noisy, trained)
    assert abs(Loss.sum(noisy).mean - 0.5) < allowed < 0.004
    shifted = [Loss(loss.total + 12 * 0.002, 12) for loss in trained]
    assert Tolerance().allowed(shifted, trained) == pytest.approx(1e-3)
    wild = [Loss(loss.total + rng.gauss(0, 9), 12) for loss in trained]
    assert Tolerance().allowed(wild, trained) == pytest.approx(1e-2)
    assert Tolerance().allowed([Loss(8.0, 2)], [Loss(8.0, 2)]) == pytest.approx(4e-3)


def test_a_base_that_suffered_from_quantization_is_told(run: RunDirectory, tmp_path: Path) -> None:
    publication = Publication("dogs", tolerance=Tolerance(quantization=-100.0))
    if run.settings().method == "lora":
        publish_run(run, AdapterStore(tmp_path), publication, silent)
        return
    with pytest.raises(TrainingError, match="on the quantized one that it was trained on"):
        publish_run(run, AdapterStore(tmp_path), publication, silent)
    assert AdapterStore(tmp_path).names() == []


def test_broken_files_are_refused_as_the_server_refuses_them(run: RunDirectory, tmp_path: Path) -> None:
    spoiled = changed(run, tmp_path / "spoiled")
    path = spoiled.adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(InvalidAdapter, match="NaN"):
        publish_run(spoiled, AdapterStore(tmp_path / "store"), Publication("dogs"), silent)
    assert AdapterStore(tmp_path / "store").names() == []


def test_runs_that_cannot_be_published_say_why(run: RunDirectory, tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "store")
    unfinished = changed(run, tmp_path / "unfinished")
    unfinished.write_info({name: value for name, value in run.info().items() if name != "result"})
    with pytest.raises(RunError, match=r"is not finished; `trainer resume"):
        publish_run(unfinished, store, Publication("dogs"), silent)
    save_tiny_base(tmp_path / "other", seed=1)
    other = changed(run, tmp_path / "other-base")
    settings = replace(run.settings(), base=str(tmp_path / "other"))
    (other.path / "config.yaml").write_text(settings.to_yaml())
    with pytest.raises(BaseMismatch, match="was trained on base sha256:"):
        publish_run(other, store, Publication("dogs"), silent)
    full = changed(run, tmp_path / "full")
    (full.path / "config.yaml").write_text(replace(run.settings(), method="full").to_yaml())
    with pytest.raises(SettingsError, match="not an adapter"):
        publish_run(full, store, Publication("dogs"), silent)
    assert store.names() == []


def test_the_manifest_of_an_older_trainer_is_still_read(run: RunDirectory, tmp_path: Path) -> None:
    from adapters.manifest import Manifest, canonical_json, decode_json

    version = publish_run(run, AdapterStore(tmp_path), Publication("dogs"), silent)
    raw = (version.path / "manifest.json").read_bytes()
    assert canonical_json(decode_json(raw, Manifest)) == raw
    values = json.loads(raw)
    for name in ("data_digest", "tokenizer_digest", "template_digest", "scores"):
        del values["training"][name]
    older = decode_json(json.dumps(values).encode(), Manifest)
    assert older.training is not None
    assert older.training.scores is None
