"""A listener that keeps what it hears."""

from typing import Any

from trainer.loop import Progress, Step


class Recorder:
    """Keeps the steps."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.notes: list[str] = []

    def stepped(self, step: Step) -> None:
        self.steps.append(step)

    def evaluated(self, evaluation: Any) -> None: ...

    def save(self, progress: Progress) -> None: ...

    def save_best(self, progress: Progress) -> None: ...

    def note(self, message: str) -> None:
        self.notes.append(message)

    def is_stopped(self) -> bool:
        return False
