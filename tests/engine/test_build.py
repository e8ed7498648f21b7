"""What an engine is built of."""

from pathlib import Path

import pytest
import torch

from tests.engine.inprocess import Driver
from tests.model.tiny import save_tiny


def test_a_gpu_that_is_not_the_first_is_current_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the events that a step's tokens are awaited by, and its graphs, would be the first one's."""

    class Chosen(Exception):
        pass

    def choose(device: torch.device) -> None:
        raise Chosen(f"{device}")

    save_tiny("llama", tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", choose)
    with pytest.raises(Chosen, match="cuda:1"):
        Driver(tmp_path, device="cuda:1")
