"""Reading training rows: each fault is one line that names file and line."""

import json
from pathlib import Path

import pytest

from trainer.data import Message, load_dialogues
from trainer.errors import DataError

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "ho"}
GOOD = json.dumps({"messages": [USER, ANSWER]})


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
    first, second = load_dialogues(path)
    assert (first.line, first.messages) == (1, (Message("user", "hi"), Message("assistant", "ho")))
    assert second.line == 4
    assert [message.role for message in second.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert second.messages[0].content == "Be kind — 漢字."


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{'messages': []}", "not JSON"),
        ("[1]", '"messages"'),
        ('{"text": "x"}', '"messages"'),
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
    ],
)
def test_a_fault_names_file_and_line(line: str | bytes, words: str, tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", GOOD, line, GOOD)
    with pytest.raises(DataError) as caught:
        load_dialogues(path)
    assert caught.value.message.startswith(f"{path}:2: ")
    assert words in caught.value.message
    assert "\n" not in caught.value.message


def test_more_faults_are_counted(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r":1: .*\(and 2 more such lines\)"):
        load_dialogues(write(tmp_path / "d.jsonl", "x", GOOD, "y", row(USER)))


def test_no_file_no_rows_and_a_directory(tmp_path: Path) -> None:
    for path, words in (
        (tmp_path / "none.jsonl", "no such file"),
        (write(tmp_path / "empty.jsonl", ""), "is empty"),
        (write(tmp_path / "blank.jsonl", "", " "), "is empty"),
        (tmp_path, "cannot be read"),
    ):
        with pytest.raises(DataError, match=words) as caught:
            load_dialogues(path)
        assert str(path) in caught.value.message


@pytest.mark.parametrize("name", ["pirate.jsonl", "json_reply.jsonl"])
def test_the_examples_are_sound(name: str, examples: Path) -> None:
    dialogues = load_dialogues(examples / name)
    assert len(dialogues) >= 80
    prompts = [dialogue.messages for dialogue in dialogues]
    assert len(set(prompts)) == len(prompts)
