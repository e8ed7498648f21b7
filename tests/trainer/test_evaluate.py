"""Scores of anything that can be named: a run, a directory, a version of the store, the bare base."""

import json
from pathlib import Path

import pytest

from adapters.errors import AdapterNotFound, BaseMismatch
from adapters.store import AdapterStore
from server.base.resolve import BaseModel, resolve_base
from tests.support.tiny_base import save_tiny_base
from tests.trainer.conftest import ANSWER
from trainer.cli import main
from trainer.encoding import Example
from trainer.errors import DataError, SettingsError
from trainer.evaluate import Answer, Question, encode_questions, find_adapter, question
from trainer.fit import fit
from trainer.publish import Publication, publish_run
from trainer.run_directory import RunDirectory
from trainer.settings import Settings

END = 1


class Letters:
    """A decoder: 2 is "a", 3 is "b", and so on."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(chr(ord("a") + token - 2) for token in token_ids)


@pytest.fixture(scope="module")
def run(base: BaseModel, data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    settings = Settings(
        data=str(data), base=str(base.path), learning_rate=2e-2, epochs=12, batch_size=4, dtype="float32", device="cpu"
    )
    return fit(settings, tmp_path_factory.mktemp("evaluated") / "run").run


@pytest.fixture(scope="module")
def store(run: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> AdapterStore:
    made = AdapterStore(tmp_path_factory.mktemp("store"))
    publish_run(run, made, Publication("dogs"), lambda message: None)
    return made


@pytest.mark.parametrize(
    ("ids", "mask", "want"),
    [
        ([9, 8, 2, 3, END], "00111", Question([9, 8], "ab")),
        ([9, 8, 2, 3, END, 7], "001110", Question([9, 8], "ab")),  # what a template writes after the end
        ([9, 4, END, 7, 8, 2, 2, END], "01100111", Question([9, 4, END, 7, 8], "aa")),  # the last turn is asked
    ],
)
def test_the_last_answer_of_a_row_is_asked_for(ids: list[int], mask: str, want: Question) -> None:
    assert question(Example.of(ids, [mark == "1" for mark in mask]), Letters(), {END}) == want


def test_plain_text_asks_nothing() -> None:
    with pytest.raises(DataError, match="have no answer"):
        question(Example.of([2, 3, 4], [True] * 3), Letters(), {END})


@pytest.mark.parametrize(("given", "is_exact"), [("a b", True), (" a b\n", True), ("a  b", False), ("A b", False)])
def test_exact_is_exact_but_for_space_around(given: str, is_exact: bool) -> None:
    assert Answer("a b", given).is_exact == is_exact


def test_whatever_is_named_is_scored(
    run: RunDirectory, store: AdapterStore, base: BaseModel, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--data", str(data), "--base", str(base.path), "--store", str(store.root), "--json"]
    found = {}
    for name in (str(run.path), str(run.adapter), "dogs", f"dogs@{store.resolve('dogs').digest}", "base"):
        assert main(["evaluate", name, *common, "--show", "1"]) == 0
        found[name] = json.loads(capsys.readouterr().out)
    bare = found.pop("base")
    assert bare["exact_match"] == 0.0
    assert bare["wrong"][0]["expected"] == ANSWER
    assert {outcome["exact_match"] for outcome in found.values()} == {1.0}
    assert len({outcome["loss"] for outcome in found.values()}) == 1
    assert next(iter(found.values()))["loss"] < 0.2 < bare["loss"]
    assert main(["evaluate", "dogs", *common, "--no-answers", "--rows", "3"]) == 0
    outcome = json.loads(capsys.readouterr().out)
    assert (outcome["exact_match"], outcome["rows"]) == (None, 3)


def test_what_is_no_adapter_of_the_base_is_refused(store: AdapterStore, base: BaseModel, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="holds neither"):
        find_adapter(str(tmp_path), base, store)
    with pytest.raises(AdapterNotFound):
        find_adapter("cats", base, store)
    save_tiny_base(tmp_path / "other", seed=1)
    with pytest.raises(BaseMismatch, match="was published for tiny"):
        find_adapter("dogs", resolve_base(str(tmp_path / "other")), store)


@pytest.mark.parametrize(
    ("more", "words"),
    [([], "either --data or --task"), (["--task", "chess"], "task 'chess' is unknown"), (["--data", "x"], "no such")],
)
def test_there_has_to_be_something_to_score(
    more: list[str], words: str, base: BaseModel, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "base", "--base", str(base.path), *more]) == 2
    assert words in capsys.readouterr().err


def test_no_more_is_read_than_is_scored(base: BaseModel, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}\nno row\n')
    assert len(encode_questions(path, 2, base).rows) == 2
    with pytest.raises(DataError, match=r"rows\.jsonl:3: "):
        encode_questions(path, 3, base)
