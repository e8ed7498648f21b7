"""The commands on an adapter store: on a real one, on disk or in a bucket on a real server."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from adapters.remote import RemoteStore
from adapters.store import AdapterStore
from server.cli import main
from server.cli.exits import ExitCode
from tests.adapters.s3_server import S3Server
from tests.support.base_files import write_adapter, write_base

ROOT = Path(__file__).parents[1]
WEIGHTS = "adapter_model.safetensors"
Run = Callable[..., Any]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base")


@pytest.fixture
def peft_adapter(tmp_path: Path) -> Callable[[float], Path]:
    """Makes the directory of an adapter whose every weight is `value`."""
    return lambda value: write_adapter(tmp_path / f"peft-{value}", value)


@pytest.fixture(scope="module")
def s3_server() -> Iterator[S3Server]:
    server = S3Server()
    yield server
    server.stop()


@pytest.fixture(params=["disk", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The location of an empty store."""
    if request.param == "disk":
        return str(tmp_path / "store")
    server: S3Server = request.getfixturevalue("s3_server")
    server.tell(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bucket = f"cli-{abs(hash(tmp_path))}"
    server.make_bucket(bucket)
    return f"s3://{bucket}/adapters"


@pytest.fixture
def run(store: str, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `lorikeet adapters … --store --json`, which has to do well; its answer."""

    def call(*arguments: str | Path, code: ExitCode = ExitCode.OK) -> Any:
        assert main(["adapters", *map(str, arguments), "--store", store, "--json"]) == code, capsys.readouterr().err
        captured = capsys.readouterr()
        return json.loads(captured.out) if captured.out else captured.err

    return call


@pytest.fixture
def digests(run: Run, base: Path, peft_adapter: Callable[[float], Path]) -> list[str]:
    """Of three versions of the adapter `pirate`."""
    command = ("--name", "pirate", "--base", base)
    return [run("import", peft_adapter(value), *command)["digest"] for value in (1.0, 2.0, 3.0)]


def _error(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr."""
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("error: ").rstrip()


def test_import_list_and_show(run: Run, base: Path, peft_adapter: Callable[[float], Path]) -> None:
    published = [
        run("import", peft_adapter(value), "--name", "pirate", "--label", label, "--base", base, "--note", "ahoy")
        for value, label in ((1.0, "latest"), (2.0, "next"))
    ]
    assert published[0]["digest"] != published[1]["digest"]
    assert run("list") == {"adapters": [published[0]]}
    shown = run("show", "pirate@next")
    assert shown.items() >= published[1].items()
    assert (shown["rank"], shown["alpha"], shown["target_modules"]) == (2, 4, ["q_proj"])
    assert (shown["notes"], shown["metrics"], shown["base_name"]) == ("ahoy", {}, "base")
    assert shown["residency"] is None
    assert "nobody" in run("show", "nobody", code=ExitCode.NOT_FOUND)


def test_what_is_removed_while_a_list_is_made_is_not_in_it(
    run: Run, digests: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in (AdapterStore, RemoteStore):
        monkeypatch.setattr(kind, "names", lambda store: ["gone", "pirate"])
    assert [entry["digest"] for entry in run("list")["adapters"]] == [digests[-1]]


def test_labels_move_go_back_and_go_away(run: Run, digests: list[str]) -> None:
    first, second, third = digests
    assert run("label", "pirate", "prod", first.removeprefix("sha256:")[:12])["labels"] == ["prod"]
    assert run("label", "pirate", "prod", second, "--expect", first)["digest"] == second
    refused = run("label", "pirate", "prod", third, "--expect", first, code=ExitCode.REFUSED)
    assert f"'prod' of adapter 'pirate' is {second}, not {first}" in refused
    assert run("show", "pirate@prod")["digest"] == second
    assert run("label", "pirate", "beta", "latest", "--expect", "absent")["labels"] == ["beta", "latest"]
    run("rollback", "pirate", "prod", "--expect", "", code=ExitCode.NOT_FOUND)  # as of a variable that is not set
    assert run("rollback", "pirate", "prod", "--expect", second)["digest"] == first
    assert run("rollback", "pirate")["digest"] == second
    assert "no earlier version" in run("rollback", "pirate", "beta", code=ExitCode.NOT_FOUND)
    assert "no label or version 'nowhere'" in run("label", "pirate", "x", "nowhere", code=ExitCode.NOT_FOUND)
    assert run("remove", "pirate@beta") == {"removed": "pirate@beta"}
    assert "no label 'beta'" in run("show", "pirate@beta", code=ExitCode.NOT_FOUND)


def test_removed_versions_are_collected(run: Run, digests: list[str], store: str) -> None:
    first, _, third = digests
    assert "labelled latest" in run("remove", f"pirate@{third}", code=ExitCode.REFUSED)
    assert run("remove", f"pirate@{first}")["removed"] == f"pirate@{first}"
    done = run("gc")
    where = "recent" if store.startswith("s3:") else "removed"  # in a bucket it may be a publication under way
    assert done[where] == [first]
    assert [entry["digest"] for entry in run("verify")["versions"]] == digests[1:]
    run("remove", "pirate")
    assert run("list") == {"adapters": []}
    assert "no adapter 'pirate'" in run("remove", "pirate", code=ExitCode.NOT_FOUND)


def test_export_and_import_keep_everything(
    run: Run, digests: list[str], base: Path, peft_adapter: Callable[[float], Path], tmp_path: Path
) -> None:
    out = tmp_path / "new" / "out"
    fields = run("export", f"pirate@{digests[1]}", out)
    assert (fields["digest"], fields["path"]) == (digests[1], str(out))
    exported, given = load_file(out / WEIGHTS), load_file(tmp_path / "peft-2.0" / WEIGHTS)
    assert {name: array.tolist() for name, array in exported.items()} == {n: a.tolist() for n, a in given.items()}
    assert json.loads((out / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert os.access(out / WEIGHTS, os.W_OK)
    assert run("import", out, "--name", "again", "--base", base)["digest"] == digests[1]
    assert "not an empty directory" in run("export", "pirate", out, code=ExitCode.FAILURE)
    assert list(out.parent.iterdir()) == [out]


def test_another_base_is_refused_unless_insisted_on(run: Run, digests: list[str], tmp_path: Path) -> None:
    other = write_base(tmp_path / "other", seed=1)
    out = tmp_path / "out"
    trained_on = run("show", "pirate")["base_digest"]
    run("export", "pirate", out)
    command = ("import", out, "--name", "moved", "--base", other)
    assert f"was made for base ({trained_on})" in run(*command, code=ExitCode.REFUSED)
    moved = run(*command, "--allow-base-mismatch")
    assert moved["digest"] not in digests
    shown = run("show", "moved")
    assert shown["base_digest"] != trained_on
    assert shown["trained_base"] == {"name": "base", "digest": trained_on}
    again = tmp_path / "again"
    run("export", "moved", again)
    run("import", again, "--name", "again", "--base", other)
    assert run("show", "again")["trained_base"]["digest"] == trained_on


def test_verify_lists_every_fault(
    digests: list[str], run: Run, store: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [entry["faults"] for entry in run("verify")["versions"]] == [[]] * 3
    assert {entry["checked_against_base"] for entry in run("verify", "--base", base)["versions"]} == {True}
    other = write_base(tmp_path / "other", seed=1)
    assert {entry["checked_against_base"] for entry in run("verify", "--base", other)["versions"]} == {False}
    assert "no adapter 'nobody'" in run("verify", "nobody", code=ExitCode.NOT_FOUND)
    if store.startswith("s3:"):
        return
    on_disk = AdapterStore(Path(store))
    weights, manifest = (on_disk.fetch(digest) for digest in digests[:2])
    raw = bytearray((weights / WEIGHTS).read_bytes())
    raw[-4:] = np.array([np.nan], np.float32).tobytes()
    _rewrite(weights / WEIGHTS, bytes(raw))
    _rewrite(manifest / "manifest.json", (manifest / "manifest.json").read_bytes().replace(b'"rank":2', b'"rank":"x"'))
    _rewrite(Path(store) / "names" / "lost.json", b"{")
    assert main(["adapters", "verify", "--store", store, "--json"]) == ExitCode.REFUSED
    entries = json.loads(capsys.readouterr().out)["versions"]
    faults = {entry["digest"]: entry["faults"] for entry in entries}
    assert len(faults[digests[0]]) == 2
    assert f"{WEIGHTS}: its sha256" in faults[digests[0]][0]
    assert "holds NaN or infinity" in faults[digests[0]][1]
    assert "is damaged" in faults[digests[1]][0]
    assert faults[digests[2]] == []
    assert "lost.json is damaged" in faults[None][0]
    assert main(["adapters", "verify", "--store", store]) == ExitCode.REFUSED
    captured = capsys.readouterr()
    assert captured.err == "error: 3 of 4 versions are bad\n"
    assert f"pirate {digests[2][7:19]}: good" in captured.out
    assert main(["adapters", "verify", "pirate", "--store", store]) == ExitCode.REFUSED


def _rewrite(path: Path, data: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def test_what_is_said_to_people(
    store: str, base: Path, peft_adapter: Callable[[float], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command, said in (
        (["import", str(peft_adapter(1.0)), "--name", "a", "--base", str(base)], "published a@latest (sha256:"),
        (["import", str(peft_adapter(2.0)), "--name", "a", "--label", "b", "--base", str(base)], "published a@b ("),
        (["label", "a", "latest", "b"], "a@latest is sha256:"),
        (["rollback", "a"], "a@latest is sha256:"),
        (["export", "a", str(tmp_path / "out")], "wrote a (sha256:"),
        (["verify", "a"], "a "),
        (["remove", "a@b"], "removed a@b\n"),
        (["gc"], "deleted 0 versions (0 B)\n"),
    ):
        assert main(["adapters", *command, "--store", store]) == ExitCode.OK
        assert capsys.readouterr().out.startswith(said)


def test_import_takes_an_adapter_without_effect_only_when_told(
    run: Run, base: Path, peft_adapter: Callable[[float], Path]
) -> None:
    command = ("import", peft_adapter(0.0), "--name", "blank", "--base", base)
    assert "changes nothing" in run(*command, code=ExitCode.REFUSED)
    run(*command, "--allow-zero")


def test_import_refuses_an_adapter_that_does_not_fit(
    run: Run, base: Path, peft_adapter: Callable[[float], Path]
) -> None:
    refused = run("import", peft_adapter(float("nan")), "--name", "pirate", "--base", base, code=ExitCode.REFUSED)
    assert "lora_A" in refused
    assert run("verify") == {"versions": []}


def test_import_can_expect(run: Run, digests: list[str], base: Path, peft_adapter: Callable[[float], Path]) -> None:
    command = ("import", peft_adapter(4.0), "--name", "pirate", "--base", base, "--expect")
    assert "not absent as expected" in run(*command, "absent", code=ExitCode.REFUSED)
    assert "not valid" in run(*command, "sha256:1", code=ExitCode.USAGE)
    assert run(*command, digests[2])["labels"] == ["latest"]


def test_a_store_that_is_not_there_is_not_an_empty_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (
        ["list"],
        ["show", "x"],
        ["verify"],
        ["gc"],
        ["rollback", "x"],
        ["remove", "x"],
        ["export", "x", "y"],
    ):
        assert main(["adapters", *command, "--store", str(tmp_path / "stroe")]) == ExitCode.USAGE
        assert "stroe" in _error(capsys)
    assert main(["adapters", "list", "--store", "ftp://x/y"]) == ExitCode.UNAVAILABLE
    assert "ftp:// is not supported" in _error(capsys)


def test_a_bucket_that_is_away(
    s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    s3_server.tell(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    s3_server.stop()
    try:
        assert main(["adapters", "list", "--store", "s3://bucket/x"]) == ExitCode.UNAVAILABLE
    finally:
        s3_server.start()
    assert "the adapter store at s3://bucket/x cannot be used" in _error(capsys)


def hub_cache(home: Path, source: Path, repository: str) -> None:
    """A Hugging Face cache that has the files of `source`, as a download leaves it."""
    folder = home / "hub" / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (folder / "blobs").mkdir()
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    for file in source.iterdir():
        shutil.copyfile(file, folder / "blobs" / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")


def test_import_from_the_hub(base: Path, peft_adapter: Callable[[float], Path], tmp_path: Path) -> None:
    """Offline: what the cache has is taken, what it lacks is said in one line."""
    hub_cache(tmp_path, peft_adapter(1.0), "someone/pirate")
    pickled = peft_adapter(2.0)
    (pickled / WEIGHTS).rename(pickled / "adapter_model.bin")
    hub_cache(tmp_path, pickled, "someone/pickled")
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_XET": "1"}

    def run_import(repository: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "server.cli", "adapters", "import", repository, "--name", "pirate", "--json"]
        command += ["--base", str(base), "--store", str(tmp_path / "store")]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    taken = run_import("someone/pirate")
    assert taken.returncode == ExitCode.OK, taken.stderr
    assert json.loads(taken.stdout)["name"] == "pirate"
    for repository, code, said in (
        ("someone/else", ExitCode.UNAVAILABLE, "try again with network, or pass a directory"),
        ("someone/pickled", ExitCode.REFUSED, f"has no {WEIGHTS} on the hub"),
        ("no-such-directory", ExitCode.NOT_FOUND, "no such directory, and not a hub id"),
        ("../x/../y", ExitCode.NOT_FOUND, "no such directory, and not a hub id"),
    ):
        refused = run_import(repository)
        assert refused.returncode == code, refused.stderr
        assert said in refused.stderr.splitlines()[-1]
        assert refused.stdout == ""
