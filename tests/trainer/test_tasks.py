"""The tasks' answers are right, as a reader of our own finds, and their test rows are never trained on."""

import json
import re
from pathlib import Path

import pytest

from trainer.tasks import TASKS, Row, write_rows

NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
MINUTES = {"": 0, "a quarter past": 15, "half past": 30, "forty-five": 45}
DIGITS = re.compile(r"at (\d+:\d\d) pm")
WORDS = re.compile(r"at (a quarter past|half past|) ?([a-z]+) ?(forty-five|) in the (?:afternoon|evening)")


def clock(sentence: str) -> str:
    """The time that a sentence tells."""
    if found := DIGITS.search(sentence):
        return found[1]
    told = WORDS.search(sentence)
    assert told, sentence
    return f"{NUMBERS.index(told[2]) + 1}:{MINUTES[told[1] or told[3]]:02}"


def answers(rows: list[Row]) -> list[str]:
    return [row["messages"][-1]["content"] for row in rows]


def test_bookings_are_told_as_they_are_asked() -> None:
    for row in TASKS["bookings"].train(2000, 0):
        _, sentence, answer = (message["content"] for message in row["messages"])
        day, time, people, name = answer.split()
        assert name in sentence
        assert re.search(rf"\b{day}", sentence, re.IGNORECASE)
        assert time == clock(sentence), sentence
        count = NUMBERS[int(people) - 1]
        others = NUMBERS[int(people) - 2]
        assert re.search(rf"\b{count}\b|\b{others} friends? and me", sentence, re.IGNORECASE), sentence


@pytest.mark.parametrize("name", TASKS)
def test_test_rows_are_not_trained_on_and_repeat(name: str) -> None:
    task = TASKS[name]
    train, test = task.train(3000, 1), task.test(500, 1)
    assert not set(answers(train)) & set(answers(test))
    assert (train, test) == (task.train(3000, 1), task.test(500, 1))
    assert task.train(50, 1) != task.train(50, 2)
    assert task.train(50, 1) == train[:50]


def test_rows_are_written_as_the_trainer_reads_them(tmp_path: Path) -> None:
    from trainer.data import open_source

    rows = TASKS["bookings"].test(5, 0)
    write_rows(tmp_path / "rows.jsonl", rows)
    assert [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == rows
    assert len(list(open_source(tmp_path / "rows.jsonl").rows())) == 5
