"""What a run leaves on disk, and how it is read again.

RUN/
    config.yaml       every setting of the run
    run.json          what it was made from: digests, counts; when it is done, what came of it
    metrics.jsonl     a line for each step and each evaluation
    checkpoints/      see checkpoints.py
    initial/          of olora and pissa: the adapter as it began
    adapter/          the trained adapter in PEFT's format (of method full: model/, a whole model)
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.checkpoints import Checkpoints, sync, writing
from trainer.errors import RunError
from trainer.settings import CONFIG_FILE, Settings


class RunDirectory:
    """The directory of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, settings: Settings, info: Mapping[str, Any]) -> "RunDirectory":
        """A new run. Raises RunError if something is there already."""
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise RunError(f"{path}: is not empty; resume it with `trainer resume {path}`, or take another directory")
        run = cls(path)
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
        run._write(CONFIG_FILE, settings.to_yaml())
        run.write_info(info)
        return run

    @classmethod
    def open(cls, path: Path) -> "RunDirectory":
        """A run that is there. Raises RunError if it is not."""
        if not (path / CONFIG_FILE).is_file():
            raise RunError(f"{path}: is no run; it has no {CONFIG_FILE}")
        return cls(path)

    @property
    def adapter(self) -> Path:
        """Where the trained adapter is, once it is."""
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        """Where the trained model of method full is, once it is."""
        return self.path / "model"

    @property
    def initial(self) -> Path:
        """Where the adapter is that an OLoRA or PiSSA run began with."""
        return self.path / "initial"

    def settings(self) -> Settings:
        """The run's settings. Raises SettingsError if somebody broke them."""
        path = self.path / CONFIG_FILE
        return Settings.from_mapping(Settings.read(path), str(path))

    def checkpoints(self, keep: int = 2) -> Checkpoints:
        """The run's checkpoints."""
        return Checkpoints(self.path / "checkpoints", keep)

    def info(self) -> dict[str, Any]:
        """What run.json says. Raises RunError if it cannot be read."""
        try:
            value: dict[str, Any] = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunError(f"{self.path / 'run.json'}: cannot be read ({error})") from error
        return value

    def write_info(self, info: Mapping[str, Any]) -> None:
        """Replace run.json."""
        self._write("run.json", json.dumps(info, indent=2) + "\n")

    def metrics(self) -> Iterator[dict[str, Any]]:
        """The lines of metrics.jsonl; a last one that a crash cut short is left out."""
        path = self.path / "metrics.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            try:
                yield json.loads(line)
            except ValueError:
                return

    def seconds(self) -> float:
        """What the run's steps took, before and after it was resumed."""
        return float(sum(line.get("seconds", 0.0) for line in self.metrics()))

    def trim_metrics(self, step: int) -> None:
        """Forget what came after `step`."""
        kept = [json.dumps(line) + "\n" for line in self.metrics() if line["step"] <= step]
        self._write("metrics.jsonl", "".join(kept))

    def _write(self, name: str, text: str) -> None:
        path, partial = self.path / name, self.path / f".{name}.partial"
        with writing(path):
            partial.write_text(text, encoding="utf-8")
            sync(partial)
            partial.replace(path)


class MetricsFile:
    """metrics.jsonl, a line at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("a", encoding="utf-8")

    def write(self, values: Mapping[str, Any]) -> None:
        """Append a line; it is in the file when this returns. Raises DiskFull."""
        with writing(self._path):
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
