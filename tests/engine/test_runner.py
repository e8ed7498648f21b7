"""When a step is over, for the loop that gives what it reads to others then."""

from pathlib import Path

import pytest
import torch

from server.engine.messages import SamplingParams, StopParams
from server.engine.plan import Chunk, Plan
from server.engine.runner import Runner
from server.engine.sequence import Sequence
from tests.engine.inprocess import Driver
from tests.model.tiny import save_tiny


class Event:
    """A device's, which passes when it is waited for."""

    def __init__(self) -> None:
        self.is_recorded = False
        self.is_awaited = False

    def record(self) -> None:
        self.is_recorded = True

    def synchronize(self) -> None:
        assert self.is_recorded
        self.is_awaited = True


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    """One that believes in a GPU, and whose model computes nothing."""
    save_tiny("llama", tmp_path)
    runner = Driver(tmp_path).engine._runner
    monkeypatch.setattr(runner, "_device", torch.device("cuda"))
    monkeypatch.setattr(runner, "_batch", lambda plan: None)
    monkeypatch.setattr(runner._model, "forward", lambda batch, cache: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    return runner


def test_a_step_that_draws_nothing_is_awaited(runner: Runner) -> None:
    """Else the host is any number of steps ahead of a long prompt. Cancelled, that gives its adapter's rows to another
    while the device still reads them, for pages that later sequences find by the first one's digest."""
    seq = Sequence("r", [1] * 9, SamplingParams(seed=0), StopParams(max_tokens=1), submitted_at=0.0)
    handle = runner.execute(Plan((Chunk(seq, 0, 4, samples=False),), num_decodes=0, admitted=()))
    assert isinstance(handle.done, Event)
    assert not handle.done.is_awaited
    assert handle.result() == []
    assert handle.done.is_awaited
