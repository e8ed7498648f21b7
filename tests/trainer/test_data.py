"""Reading training rows: each fault is one line that names file and line."""

import json
from pathlib import Path

import datasets
import pytest

from trainer.data import Completion, Dialogue, Message, Row, SavedDataset, Text, check_rows, open_source
from trainer.errors import DataError

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "ho"}
GOOD = json.dumps({"messages": [USER, ANSWER]})


def load_rows(path: Path) -> list[Row]:
    check_rows(path)
    return list(open_source(path).rows())


def write(path: Path, *lines: str | bytes) -> Path:
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return path


def row(*messages: object) -> str:
    return json.dumps({"messages": list(messages)})


def test_rows_keep_their_order_words_and_line_numbers(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be kind — 漢字."}
    path = write(
        tmp_path / "d.jsonl", b"\xef\xbb\xbf" + GOOD.encode(), "", "  ", row(system, USER, ANSWER, USER, ANSWER)
    )
    first, second = load_rows(path)
    assert isinstance(first, Dialogue)
    assert isinstance(second, Dialogue)
    assert (first.place, first.messages) == (f"{path}:1", (Message("user", "hi"), Message("assistant", "ho")))
    assert second.place == f"{path}:4"
    assert [message.role for message in second.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert second.messages[0].content == "Be kind — 漢字."


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{'messages': []}", "not JSON"),
        ("[1]", "must be an object with messages"),
        ("{}", "needs messages, or prompt and completion, or text, and has none"),
        ('{"prompt": "x"}', "and has prompt"),
        ('{"text": "x", "prompt": "y", "completion": "z"}', "and has completion, prompt, text"),
        ('{"text": " "}', "text must be a string"),
        ('{"prompt": "x", "completion": ""}', "completion not empty"),
        ('{"prompt": "x", "completion": []}', "both lists of messages"),
        (json.dumps({"prompt": [USER], "completion": [USER]}), "no assistant message"),
        (json.dumps({"prompt": [USER], "completion": [ANSWER | {"role": "bot"}]}), "completion[1]: unknown role 'bot'"),
        ("[" * 100_000, "nested too deep"),
        ('{"messages": [], "weight": 1}', "'weight'"),
        ('{"messages": {}}', "must be a list"),
        (row(), "no assistant message"),
        (row(USER), "no assistant message"),
        (row(ANSWER), "cannot speak first"),
        (row(USER, "ho"), "messages[1]: must be an object"),
        (row({"role": "user"}, ANSWER), "messages[0]: 'content' is missing"),
        (row(USER | {"name": "x"}, ANSWER), "messages[0]: 'name' is not a field"),
        (row(USER, {"role": "bot", "content": "x"}), "messages[1]: unknown role 'bot'"),
        (row(USER, {"role": ["assistant"], "content": "x"}), "messages[1]: unknown role"),
        (row(USER, {"role": "assistant", "content": " "}), "messages[1]: content"),
        (row(USER, {"role": "assistant", "content": 3}), "messages[1]: content"),
        (row(USER, {"role": "system", "content": "x"}, ANSWER), "messages[1]: a system message can only come first"),
        (b"\xff\xfe", "not UTF-8"),
        ('{"text": "a \\ud83d"}', "text has half of a surrogate pair (character 3)"),
        ('{"prompt": "", "completion": "\\udc00"}', "completion has half of a surrogate pair"),
        (row(USER, {"role": "assistant", "content": "\ud83d"}), "messages[1]: content has half of a surrogate pair"),
    ],
)
def test_a_fault_names_file_and_line(line: str | bytes, words: str, tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", GOOD, line, GOOD)
    with pytest.raises(DataError) as caught:
        load_rows(path)
    assert caught.value.message.startswith(f"{path}:2: ")
    assert words in caught.value.message
    assert "\n" not in caught.value.message


def test_the_other_forms(tmp_path: Path) -> None:
    path = write(
        tmp_path / "d.jsonl",
        '{"prompt": "2+2=", "completion": "4"}',
        json.dumps({"prompt": [USER], "completion": [ANSWER]}),
        '{"text": "once"}',
    )
    assert load_rows(path) == [
        Completion("2+2=", "4", f"{path}:1"),
        Dialogue((Message("user", "hi"), Message("assistant", "ho")), f"{path}:2", start=1),
        Text("once", f"{path}:3"),
    ]
    assert list(open_source(path).rows(2)) == [Text("once", f"{path}:3")]


def test_a_saved_dataset_reads_as_its_rows_do(tmp_path: Path) -> None:
    rows = [{"messages": [USER, ANSWER], "id": 1}, {"messages": [ANSWER, USER], "id": 2}]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    source = open_source(tmp_path / "saved")
    assert isinstance(source, SavedDataset)
    assert next(source.rows()) == Dialogue((Message("user", "hi"), Message("assistant", "ho")), f"{tmp_path}/saved[0]")
    with pytest.raises(DataError, match=r"saved\[1\]: messages\[0\]: the assistant cannot speak first"):
        list(source.rows(1))
    (tmp_path / "files").mkdir()
    datasets.Dataset.from_list([{"prompt": "a", "completion": "b"}] * 3).to_parquet(tmp_path / "files" / "x.parquet")
    assert len(load_rows(tmp_path / "files")) == 3
    datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)}).save_to_disk(tmp_path / "split")
    with pytest.raises(DataError, match="has no split train; its splits are test"):
        load_rows(tmp_path / "split")


def test_no_file_no_rows_and_a_directory(tmp_path: Path) -> None:
    directory = tmp_path / "directory"
    directory.mkdir()
    for path, words in (
        (tmp_path / "none.jsonl", "no such file"),
        (write(tmp_path / "empty.jsonl", ""), "is empty"),
        (write(tmp_path / "blank.jsonl", "", " "), "is empty"),
        (directory, "is no dataset that `datasets` can load"),
    ):
        with pytest.raises(DataError, match=words) as caught:
            load_rows(path)
        assert str(path) in caught.value.message


@pytest.mark.parametrize("name", ["pirate.jsonl", "json_reply.jsonl"])
def test_the_examples_are_sound(name: str, examples: Path) -> None:
    dialogues = load_rows(examples / name)
    assert len(dialogues) >= 80
    prompts = [dialogue.messages for dialogue in dialogues if isinstance(dialogue, Dialogue)]
    assert len(prompts) == len(dialogues)
    assert len(set(prompts)) == len(prompts)
