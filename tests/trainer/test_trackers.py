"""What a run logs arrives where it was to go."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from trainer.errors import SettingsError
from trainer.trackers import find_trackers, open_trackers

VALUES = {1: {"loss": 2.5, "lr": 1e-3}, 2: {"loss": 1.25}}


class Notebook:
    """Anyone's tracker: one file with what came."""

    def __init__(self, run: Path, settings: Mapping[str, Any]) -> None:
        self._file = (run / "notes").open("w")
        print("rank", settings["rank"], file=self._file)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        print(step, dict(values), file=self._file)

    def close(self) -> None:
        self._file.close()


def test_tensorboard_reads_what_was_logged(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = open_trackers(["tensorboard"], tmp_path, {"rank": 8})
    for step, values in VALUES.items():
        tracker.log(step, values)
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.5), (2, 1.25)]
    assert [event.step for event in events.Scalars("lr")] == [1]
    assert "| rank | 8 |" in events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()


def test_a_tracker_of_ones_own_is_named_by_module_and_function(tmp_path: Path) -> None:
    tracker = open_trackers(["tests.trainer.test_trackers:Notebook"], tmp_path, {"rank": 8})
    tracker.log(1, {"loss": 2.0})
    tracker.close()
    assert (tmp_path / "notes").read_text() == "rank 8\n1 {'loss': 2.0}\n"


@pytest.mark.parametrize(
    ("name", "words"),
    [("wandbee", "unknown"), ("no.such.module:f", "no.such.module: |No module"), ("json:nothing", "nothing")],
)
def test_a_tracker_that_is_not_there_is_refused(name: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        find_trackers([name])
