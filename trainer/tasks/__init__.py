"""Tasks with answers that a program can check, to tell methods and settings apart. No torch here."""

from collections.abc import Mapping
from types import MappingProxyType

from trainer.tasks.bookings import Bookings
from trainer.tasks.task import Row, Task, write_rows

TASKS: Mapping[str, Task] = MappingProxyType({"bookings": Bookings()})

__all__ = ["TASKS", "Row", "Task", "write_rows"]
