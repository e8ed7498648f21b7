"""Finding a base model: what is refused and how, and that its digest is its content."""

import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import save_file

from server.base.cache import cache_root, locked
from server.base.checkpoint import weight_files
from server.base.resolve import resolve_base
from server.errors import BaseModelError, UnsupportedModel

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 32,
    "max_position_embeddings": 64,
    "dtype": "float32",
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORIKEET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "tiny")


def make_base(directory: Path, fill: float = 1.0) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    save_file({"w": torch.full((4, 4), fill)}, directory / "model.safetensors")
    return directory


def refusal(base: str | Path) -> str:
    with pytest.raises(BaseModelError) as caught:
        resolve_base(str(base))
    assert "\n" not in caught.value.message
    return caught.value.message


def test_a_directory_resolves_to_its_name_path_and_spec(base: Path) -> None:
    found = resolve_base(str(base))
    assert (found.name, found.path, found.spec.hidden_size) == ("tiny", base.resolve(), 8)
    assert found.digest.startswith("sha256:")
    assert len(found.digest) == len("sha256:") + 64


def test_the_digest_follows_the_content_and_nothing_else(base: Path, tmp_path: Path) -> None:
    digest = resolve_base(str(base)).digest
    copy = tmp_path / "elsewhere"
    shutil.copytree(base, copy)
    config = {"transformers_version": "9.9", "_name_or_path": "x", **CONFIG}
    (copy / "config.json").write_text(json.dumps(config, indent=3))
    assert resolve_base(str(copy)).digest == digest
    (copy / "config.json").write_text(json.dumps(CONFIG | {"rms_norm_eps": 1e-5}))
    assert resolve_base(str(copy)).digest != digest
    assert resolve_base(str(make_base(tmp_path / "other", fill=2.0))).digest != digest


def test_files_are_hashed_once_until_they_change(base: Path) -> None:
    said: list[str] = []
    first = resolve_base(str(base), said.append).digest
    assert len(said) == 1
    assert resolve_base(str(base), said.append).digest == first
    assert len(said) == 1, "the second time takes the kept hash"
    weights = base / "model.safetensors"
    save_file({"w": torch.full((4, 4), 3.0)}, weights)
    os.utime(weights, ns=(time.time_ns(), weights.stat().st_mtime_ns + 1))
    assert resolve_base(str(base), said.append).digest != first


def test_a_damaged_or_unwritable_cache_only_costs_time(base: Path, cache: Path) -> None:
    first = resolve_base(str(base)).digest
    for note in (cache / "digests").iterdir():
        note.write_text("{")
    assert resolve_base(str(base)).digest == first
    shutil.rmtree(cache)
    cache.write_text("a file where the directory should be")
    assert resolve_base(str(base)).digest == first


def test_shards_are_found_through_the_index(base: Path) -> None:
    (base / "model.safetensors").rename(base / "model-2-of-2.safetensors")
    save_file({"v": torch.zeros(2)}, base / "model-1-of-2.safetensors")
    index = {"weight_map": {"v": "model-1-of-2.safetensors", "w": "model-2-of-2.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [file.name for file in weight_files(base)] == ["model-1-of-2.safetensors", "model-2-of-2.safetensors"]
    (base / "model-2-of-2.safetensors").unlink()
    assert "model-2-of-2.safetensors" in refusal(base)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors"])
def test_an_index_cannot_point_outside(base: Path, name: str) -> None:
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    assert "not a file name" in refusal(base)


def test_what_is_missing_is_named(base: Path, tmp_path: Path) -> None:
    (base / "model.safetensors").unlink()
    assert "model.safetensors" in refusal(base)
    (base / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert "pytorch_model.bin is a pickle" in refusal(base)
    (base / "config.json").unlink()
    assert "config.json" in refusal(base)
    assert "no such directory" in refusal(tmp_path / "nowhere")
    assert "is a file" in refusal(__file__)
    assert "no such directory" in refusal("../a/b")
    assert "no such directory" in refusal("~nobody-of-this-name/model")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        (json.dumps({key: value for key, value in CONFIG.items() if key != "hidden_size"}), "hidden_size is missing"),
        (json.dumps(CONFIG | {"num_attention_heads": "two"}), "wrong kind"),
        (json.dumps(CONFIG | {"num_attention_heads": 0}), "wrong kind"),
        (json.dumps(CONFIG | {"hidden_size": "8", "head_dim": 4}), "hidden_size is '8'"),
        (json.dumps(CONFIG | {"num_hidden_layers": -1}), "num_hidden_layers is -1"),
        (json.dumps(CONFIG | {"vocab_size": None}), "vocab_size is None"),
    ],
)
def test_a_broken_config_is_refused_in_one_line(base: Path, text: str, words: str) -> None:
    (base / "config.json").write_text(text)
    message = refusal(base)
    assert "config.json" in message
    assert words in message


def test_an_unsupported_family_keeps_its_own_error(base: Path) -> None:
    (base / "config.json").write_text(json.dumps(CONFIG | {"model_type": "mamba"}))
    with pytest.raises(UnsupportedModel, match="mamba"):
        resolve_base(str(base))


def test_weights_cut_short_or_not_weights_are_refused(base: Path) -> None:
    weights = base / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-3])
    assert "cut short" in refusal(base)
    weights.write_bytes(whole + b"x")
    assert "extra bytes" in refusal(base)
    for junk in (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", b"", b"\0" * 8, whole[:4]):
        weights.write_bytes(junk)
        assert "safetensors" in refusal(base)


@pytest.mark.parametrize(
    "entry",
    [
        {"shape": [0], "data_offsets": [0, 0]},
        {"dtype": "F32", "shape": 0, "data_offsets": [0, 0]},
        {"dtype": "F32", "shape": [0], "data_offsets": ["a", "b"]},
        {"dtype": "F32", "shape": [0]},
    ],
    ids=str,
)
def test_a_header_that_does_not_describe_tensors_is_refused(base: Path, entry: dict[str, Any]) -> None:
    header = json.dumps({"w": entry}).encode()
    (base / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert "not a safetensors file" in refusal(base)


def test_weights_that_cannot_be_read_are_named(base: Path) -> None:
    weights = base / "model.safetensors"
    weights.unlink()
    weights.symlink_to("/proc/self/mem")  # opens, and cannot be read from its beginning
    assert "model.safetensors: cannot be read" in refusal(base)


def test_a_hub_id_without_network_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    message = refusal("nobody/no-such-model-here")
    assert "nobody/no-such-model-here" in message
    assert "pass a local directory" in message


def test_of_a_hub_model_what_serving_reads_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the files of mistralai/Mistral-7B-Instruct-v0.3."""
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    wanted = [*shards, "config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json"]
    wanted += ["tokenizer.model", "tokenizer.model.v3", "tokenizer_config.json", "special_tokens_map.json"]
    others = ["consolidated.safetensors", "README.md", ".gitattributes"]

    def fetch(repo_id: str, **patterns: Any) -> str:
        assert sorted(filter_repo_objects([*wanted, *others], **patterns)) == sorted(wanted)
        return str(make_base(tmp_path / "fetched"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert resolve_base("mistralai/Mistral-7B-Instruct-v0.3").path == tmp_path / "fetched"


def test_the_cache_lies_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORIKEET_CACHE", "/a/b")
    assert cache_root() == Path("/a/b")
    monkeypatch.delenv("LORIKEET_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_root() == Path("/x/lorikeet")


def test_the_lock_lets_one_in_at_a_time(tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    counter.write_text("0")

    def count() -> None:
        for _ in range(25):
            with locked(tmp_path / "lock"):
                counter.write_text(str(int(counter.read_text()) + 1))

    threads = [threading.Thread(target=count) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counter.read_text() == "150"
