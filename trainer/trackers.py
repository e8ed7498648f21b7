"""Where a run's numbers go besides its own metrics.jsonl. No torch here until TensorBoard is asked for.

A tracker is named: `tensorboard`, or `package.module:function` for anyone's own. The function is called with the
run's directory and its settings, and returns a Tracker.
"""

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from trainer.errors import SettingsError


class Tracker(Protocol):
    """Takes a run's numbers as they come. Steps count from 1 and rise; after a resume some may come again."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


Factory = Callable[[Path, Mapping[str, Any]], Tracker]


class TensorBoard:
    """Event files in the run's directory `tensorboard`."""

    def __init__(self, run: Path, settings: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(run / "tensorboard"))
        rows = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
        self._writer.add_text("settings", f"| setting | value |\n|---|---|\n{rows}", 0)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One scalar for each value."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is not written yet."""
        self._writer.close()


class Trackers:
    """Several as one; none is fine."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = tuple(trackers)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """To every one of them."""
        for tracker in self._trackers:
            tracker.log(step, values)

    def close(self) -> None:
        """All of them."""
        for tracker in self._trackers:
            tracker.close()


def find_trackers(names: Sequence[str]) -> list[Factory]:
    """The factories that `names` mean. Raises SettingsError for one that is not there: before anything is trained."""
    return [_find(name) for name in names]


def open_trackers(names: Sequence[str], run: Path, settings: Mapping[str, Any]) -> Trackers:
    """Start tracking a run. Raises SettingsError as `find_trackers` does."""
    return Trackers([factory(run, settings) for factory in find_trackers(names)])


def _find(name: str) -> Factory:
    if name == "tensorboard":
        if importlib.util.find_spec("tensorboard") is None:
            raise SettingsError("tracker tensorboard: it is not installed; pip install 'lorikeet[tensorboard]'")
        return TensorBoard
    module, separator, attribute = name.partition(":")
    if not separator:
        raise SettingsError(f"tracker {name!r} is unknown; use tensorboard, or package.module:function")
    try:
        factory: Factory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise SettingsError(f"tracker {name}: {error}") from error
    return factory
