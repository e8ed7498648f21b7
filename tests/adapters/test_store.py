import dataclasses
import json
import math
import random
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest

from adapters.errors import AdapterNotFound, BaseMismatch, InvalidAdapter, InvalidAdapterId, StoreUnavailable
from adapters.layout import read_layout
from adapters.manifest import Manifest, Scores, TrainingInfo, canonical_json, decode_json
from adapters.store import AdapterStore, default_store_root
from adapters.stores import open_store
from adapters.transfer import export_version, find_source
from tests.adapters.builders import BASE_DIGEST, LINEARS, PUBLISH, config, tensors, write_adapter


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "store")


def everything(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_publishes_and_resolves(store: AdapterStore, tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "source")
    training = TrainingInfo(
        method="qlora",
        base_quantization="nf4",
        hyperparameters={"lr": 2e-4, "epochs": 3, "packing": False, "scheduler": "cosine", "seed": None},
        metrics={"eval_loss": 1.25},
        notes="ahoy ☠",
    )
    version = store.publish(source, "pirate", training=training, **PUBLISH)

    assert store.resolve("pirate") == store.resolve("pirate@latest") == store.resolve(f"pirate@{version.digest}")
    assert store.resolve("pirate") == version
    assert store.names() == ["pirate"]
    assert store.record("pirate").labels == {"latest": version.digest}
    assert store.record("pirate").versions == (version.digest,)
    assert version.labels == ("latest",)
    manifest = version.manifest
    assert (manifest.rank, manifest.ranks, manifest.alpha, manifest.dtype) == (4, (4,), 8.0, "F32")
    assert (manifest.base_digest, manifest.base_name) == (BASE_DIGEST, "tiny")
    assert manifest.target_modules == ("q_proj", "v_proj")
    assert manifest.num_parameters == sum(value.size for value in tensors().values())
    assert manifest.training == training
    assert manifest.size_bytes == sum(
        (version.path / name).stat().st_size for name in ("adapter_config.json", "adapter_model.safetensors")
    )
    assert len(read_layout(version.path, LINEARS).modules) == 4
    assert {path.name for path in version.path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
    }
    assert (version.path / "adapter_model.safetensors").read_bytes() == (
        source / "adapter_model.safetensors"
    ).read_bytes()
    assert list((store.root / "staging").iterdir()) == []
    store.verify(version)


def test_published_files_are_read_only(store: AdapterStore, tmp_path: Path) -> None:
    version = store.publish(write_adapter(tmp_path / "source"), "a", **PUBLISH)
    for path in version.path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) & 0o333 == 0


def test_a_manifest_holds_scores_and_one_without_is_read(store: AdapterStore, tmp_path: Path) -> None:
    digest = "sha256:" + "a" * 64
    scores = Scores(
        rows_digest=digest, held_out=True, num_rows=64, num_tokens=900, loss=0.5, trainer_loss=0.5004, base_loss=3.0,
        exact_match=0.875,
    )  # fmt: skip
    training = TrainingInfo(method="lora", data_digest=digest, template_digest=digest, scores=scores)
    version = store.publish(write_adapter(tmp_path / "source"), "a", training=training, **PUBLISH)
    assert store.resolve("a").manifest.training == training
    values = json.loads((version.path / "manifest.json").read_bytes())
    for name in ("data_digest", "tokenizer_digest", "template_digest", "scores"):
        del values["training"][name]
    older = decode_json(json.dumps(values).encode(), Manifest)
    assert older.training == TrainingInfo(method="lora")
    nan = TrainingInfo(method="lora", scores=dataclasses.replace(scores, loss=math.nan))
    with pytest.raises(InvalidAdapter, match="loss must be finite"):
        store.publish(tmp_path / "source", "a", training=nan, **PUBLISH)


def test_manifest_is_canonical_json(store: AdapterStore, tmp_path: Path) -> None:
    version = store.publish(write_adapter(tmp_path / "source"), "a", **PUBLISH)
    raw = (version.path / "manifest.json").read_bytes()
    assert raw == json.dumps(json.loads(raw), sort_keys=True, separators=(",", ":")).encode()
    assert canonical_json(decode_json(raw, Manifest)) == raw


def test_same_content_is_the_same_version(store: AdapterStore, tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "source")
    first = store.publish(source, "a", training=TrainingInfo(method="lora"), **PUBLISH)
    before = everything(store.root)
    second = store.publish(source, "a", training=TrainingInfo(method="qlora"), **PUBLISH)
    assert second == first
    assert everything(store.root) == before


def test_same_content_whatever_the_order_of_its_names(store: AdapterStore, tmp_path: Path) -> None:
    """PEFT writes sets in an order that depends on PYTHONHASHSEED."""
    digests = set()
    for seed in range(4):
        settings = config(target_modules=["q_proj", "v_proj"], exclude_modules=["lm_head", "x"])
        shuffled = list(settings.items())
        random.Random(seed).shuffle(shuffled)
        for key in ("target_modules", "exclude_modules"):
            random.Random(seed).shuffle(settings[key])
        source = write_adapter(tmp_path / str(seed), settings={**dict(shuffled), **settings})
        digests.add(store.publish(source, "a", **PUBLISH).digest)
    assert len(digests) == 1


def test_order_that_has_a_meaning_is_kept(store: AdapterStore, tmp_path: Path) -> None:
    first = config(alpha_pattern={"q_proj": 1, ".*_proj": 2})
    second = config(alpha_pattern={".*_proj": 2, "q_proj": 1})
    versions = [
        store.publish(write_adapter(tmp_path / str(i), settings=settings), "a", **PUBLISH)
        for i, settings in enumerate((first, second))
    ]
    scalings = [
        read_layout(version.path, LINEARS).modules["model.layers.0.self_attn.q_proj"].scaling for version in versions
    ]
    assert scalings == [1 / 4, 2 / 4]
    assert versions[0].digest != versions[1].digest


def test_any_change_is_another_version(store: AdapterStore, tmp_path: Path) -> None:
    one_bit = tensors()
    next(iter(one_bit.values())).view(np.uint32)[0, 0] ^= 1
    sources = [
        write_adapter(tmp_path / "a"),
        write_adapter(tmp_path / "b", one_bit),
        write_adapter(tmp_path / "c", settings=config(lora_alpha=9)),
    ]
    digests = {store.publish(source, "a", **PUBLISH).digest for source in sources}
    digests.add(store.publish(sources[0], "a", **{**PUBLISH, "base_digest": "sha256:" + "00" * 32}).digest)
    assert len(digests) == 4


def test_labels_move_and_are_remembered(store: AdapterStore, tmp_path: Path) -> None:
    one, two = (write_adapter(tmp_path / str(seed), seed=seed) for seed in (1, 2))
    first = store.publish(one, "a", label="prod", **PUBLISH).digest
    assert store.record("a").labels == {"latest": first, "prod": first}
    second = store.publish(two, "a", **PUBLISH).digest
    assert store.record("a").labels == {"latest": second, "prod": first}
    assert store.resolve("a@prod").labels == ("prod",)
    store.publish(one, "a", **PUBLISH)
    assert store.record("a").labels == {"latest": first, "prod": first}
    assert store.record("a").versions == (first, second)
    assert [(move.label, move.previous, move.digest) for move in store.record("a").history] == [
        ("latest", None, first),
        ("prod", None, first),
        ("latest", first, second),
        ("latest", second, first),
    ]


def test_names_share_content_and_not_versions(store: AdapterStore, tmp_path: Path) -> None:
    one, two = (write_adapter(tmp_path / str(seed), seed=seed) for seed in (1, 2))
    shared = store.publish(one, "a", **PUBLISH)
    assert store.publish(one, "b", **PUBLISH).path == shared.path
    other = store.publish(two, "b", **PUBLISH)
    assert store.names() == ["a", "b"]
    with pytest.raises(AdapterNotFound, match="no version"):
        store.resolve(f"a@{other.digest}")


def test_what_is_not_there_is_not_found(store: AdapterStore, tmp_path: Path) -> None:
    assert store.names() == []
    with pytest.raises(AdapterNotFound, match="no adapter 'a'"):
        store.resolve("a")
    store.publish(write_adapter(tmp_path / "source"), "a", label="prod", **PUBLISH)
    with pytest.raises(AdapterNotFound, match="no label 'beta'; it has: latest, prod"):
        store.resolve("a@beta")
    with pytest.raises(AdapterNotFound, match="no version sha256:00"):
        store.resolve("a@sha256:" + "00" * 32)


def test_removed_names_are_not_found_and_can_come_back(store: AdapterStore, tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "source")
    version = store.publish(source, "a", **PUBLISH)
    store.remove("a")
    assert store.names() == []
    with pytest.raises(AdapterNotFound):
        store.remove("a")
    assert version.path.exists()
    assert store.publish(source, "a", **PUBLISH) == version


@pytest.mark.parametrize("name", ["../a", "a/b", "A", "", "a@b", "."])
def test_malformed_names_are_refused_before_anything_is_written(name: str, store: AdapterStore, tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "source")
    with pytest.raises(InvalidAdapterId):
        store.publish(source, name, **PUBLISH)
    with pytest.raises(InvalidAdapterId):
        store.publish(source, "a", label=name, **PUBLISH)
    assert not store.root.exists()


def test_a_broken_adapter_leaves_nothing_behind(store: AdapterStore, tmp_path: Path) -> None:
    store.publish(write_adapter(tmp_path / "good"), "a", **PUBLISH)
    before = everything(store.root)
    nan = {name: np.full_like(value, np.nan) for name, value in tensors(seed=9).items()}
    with pytest.raises(InvalidAdapter, match="NaN"):
        store.publish(write_adapter(tmp_path / "bad", nan), "a", **PUBLISH)
    with pytest.raises(InvalidAdapter, match="is not a directory"):
        store.publish(tmp_path / "nowhere", "a", **PUBLISH)
    assert everything(store.root) == before
    assert list((store.root / "staging").iterdir()) == []


@pytest.mark.parametrize("where", ["metrics", "hyperparameters"])
def test_numbers_that_json_cannot_hold_are_refused(where: str, store: AdapterStore, tmp_path: Path) -> None:
    training = TrainingInfo(method="lora", **{where: {"eval_loss": float("nan")}})
    with pytest.raises(InvalidAdapter, match="eval_loss must be finite"):
        store.publish(write_adapter(tmp_path / "source"), "a", training=training, **PUBLISH)


def test_a_manifest_is_never_too_long_to_say_what_it_was_made_for(store: AdapterStore, tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "source")
    with pytest.raises(InvalidAdapter, match=r"manifest\.json: \d{7} bytes; at most 1048576"):
        store.publish(source, "a", notes="n" * (1 << 20), **PUBLISH)
    version = store.publish(source, "a", notes="n" * 1_000_000, **PUBLISH)
    with pytest.raises(BaseMismatch):
        store.publish(version.path, "b", **{**PUBLISH, "base_digest": "sha256:" + "00" * 32})


@pytest.mark.parametrize("changes", [{"notes": "ahoy\udcff"}, {"base_name": "bas\udce9"}])
def test_text_that_utf_8_cannot_hold_is_refused(changes: dict[str, str], store: AdapterStore, tmp_path: Path) -> None:
    with pytest.raises(InvalidAdapter, match=r"manifest\.json: '(ahoy|bas)\\udc..' cannot be") as caught:
        store.publish(write_adapter(tmp_path / "source"), "a", **{**PUBLISH, **changes})
    assert caught.value.message.isascii()
    assert store.names() == []


@pytest.mark.parametrize(
    "raw",
    ['{"eva_config": {"x": 1e999}}', '{"eva_config": ' + "[" * 900 + "]" * 900 + "}", '{"revision": "\\ud800"}'],
)
def test_odd_but_valid_json_breaks_nothing(raw: str, store: AdapterStore, tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "source")
    text = json.dumps(config())[:-1] + "," + raw[1:]
    (source / "adapter_config.json").write_text(text)
    try:
        store.verify(store.publish(source, "a", **PUBLISH))
    except InvalidAdapter as error:
        assert "adapter_config.json" in error.message  # noqa: PT017  (some are taken, some refused; none may crash)


@pytest.mark.parametrize("raw", [b"{", b"\xff", b"[]", b'{"later":' + b"[" * 100_000, b'{"notes": "\\ud800"}'])
def test_a_manifest_beside_that_is_not_ours_is_passed_over(raw: bytes, store: AdapterStore, tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "source")
    (source / "manifest.json").write_bytes(raw)
    store.verify(store.publish(source, "a", **PUBLISH))


def test_links_inside_the_source_are_followed(store: AdapterStore, tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "source")
    (source / "adapter_config.json").rename(source / "real.json")
    (source / "adapter_config.json").symlink_to("real.json")
    version = store.publish(source, "a", **PUBLISH)
    assert not (version.path / "adapter_config.json").is_symlink()


def test_the_hugging_face_cache_is_followed_from_snapshots_to_blobs(store: AdapterStore, tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "models--x" / "snapshots" / "0123")
    blobs = tmp_path / "models--x" / "blobs"
    blobs.mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (source / file).rename(blobs / file)
        (source / file).symlink_to(f"../../blobs/{file}")
    store.publish(source, "a", **PUBLISH)


@pytest.mark.parametrize("target", ["/etc/passwd", "../outside.json", "nowhere"])
def test_links_that_lead_out_are_refused(target: str, store: AdapterStore, tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "source")
    (source / "adapter_config.json").rename(tmp_path / "outside.json")
    (source / "adapter_config.json").symlink_to(target)
    with pytest.raises(InvalidAdapter, match=r"symbolic link out of|not found"):
        store.publish(source, "a", **PUBLISH)
    assert not store.root.exists()


def test_verify_names_the_damaged_file(store: AdapterStore, tmp_path: Path) -> None:
    version = store.publish(write_adapter(tmp_path / "source"), "a", **PUBLISH)
    weights = version.path / "adapter_model.safetensors"
    weights.chmod(0o644)
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(InvalidAdapter, match=r"adapter_model\.safetensors: its sha256"):
        store.verify(version)
    weights.unlink()
    with pytest.raises(InvalidAdapter, match=r"adapter_model\.safetensors: No such file"):
        store.verify(version)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "manifest.json"])
def test_publishing_again_heals_a_damaged_version(file: str, store: AdapterStore, tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "source")
    version = store.publish(source, "a", **PUBLISH)
    (version.path / file).chmod(0o644)
    (version.path / file).write_bytes(b"rot")
    healed = store.publish(source, "a", **PUBLISH)
    assert healed.digest == version.digest
    store.verify(healed)


def test_a_home_of_nobody_is_a_directory_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert open_store("~/store").location == str(tmp_path / "home" / "store")
    assert open_store("~nobody-of-this-name/store").names() == []
    with pytest.raises(AdapterNotFound, match="no such directory"):
        find_source("~nobody-of-this-name/adapter", print)
    with pytest.raises(StoreUnavailable, match="--store is empty"):
        open_store("")


def test_an_export_takes_no_place_that_cannot_be_replaced(
    store: AdapterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = store.publish(write_adapter(tmp_path / "source"), "a", **PUBLISH)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for place in (".", "/", "../source", "../source/README.md"):
        with pytest.raises(FileExistsError):
            export_version(store, version, Path(place))
    assert list((tmp_path / "here").iterdir()) == []


def test_a_manifest_of_another_version_is_damage(store: AdapterStore, tmp_path: Path) -> None:
    """Its base is what requests are let through by."""
    source = write_adapter(tmp_path / "source")
    version = store.publish(source, "a", **PUBLISH)
    other = store.publish(source, "b", **{**PUBLISH, "base_digest": "sha256:" + "00" * 32})
    (version.path / "manifest.json").unlink()
    shutil.copyfile(other.path / "manifest.json", version.path / "manifest.json")
    with pytest.raises(StoreUnavailable, match=rf"manifest\.json is damaged: .*does not belong to {version.digest}"):
        store.resolve("a")
    with pytest.raises(InvalidAdapter, match=r"manifest\.json"):
        store.verify(version)
    store.verify(store.publish(source, "a", **PUBLISH))
    assert store.resolve("a").manifest.base_digest == BASE_DIGEST


RECORD = {"name": "a", "labels": {"latest": "sha256:" + "0" * 64}, "versions": ["sha256:" + "0" * 64], "history": []}


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b'{"name":"a"}',
        b'{"later":' + b"[" * 100_000,
        *(
            json.dumps({**RECORD, **change}).encode()
            for change in (
                {"name": "b"},
                {"name": "../b"},
                {"labels": {}},
                {"labels": {"latest": 1}},
                {"versions": []},
                {"versions": ["../../x"], "labels": {"latest": "../../x"}},
            )
        ),
    ],
)
def test_a_damaged_record_is_told_and_hurts_no_other(raw: bytes, store: AdapterStore, tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "source")
    store.publish(source, "a", **PUBLISH)
    store.publish(source, "b", **PUBLISH)
    (store.root / "names" / "a.json").unlink()
    (store.root / "names" / "a.json").write_bytes(raw)
    with pytest.raises(StoreUnavailable, match=r"names/a\.json is damaged"):
        store.resolve("a")
    assert store.resolve("b").name == "b"


def test_what_others_put_among_the_names_is_no_name(store: AdapterStore, tmp_path: Path) -> None:
    store.publish(write_adapter(tmp_path / "source"), "a", **PUBLISH)
    for stray in (".a.json.swp", "A.json", "..json", "b.json~", ".json"):
        (store.root / "names" / stray).write_text("")
    assert store.names() == ["a"]


def test_the_default_root_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_store_root() == tmp_path / "lorikeet" / "adapters"
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_store_root() == tmp_path / ".local/share/lorikeet/adapters"
