"""Where things derived from base models are kept, and how they get there whole.

Holds only what can be made again: deleting the directory costs time, never data.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapters.files import expand_user


def cache_root() -> Path:
    """`$LORIKEET_CACHE`, else `$XDG_CACHE_HOME/lorikeet`, else `~/.cache/lorikeet`. Not created here."""
    if own := os.environ.get("LORIKEET_CACHE"):
        return expand_user(own)
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg) / "lorikeet"
    return Path.home() / ".cache" / "lorikeet"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock between processes on the file `path` (created if absent); waits for the holder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # the kernel lets go when the file closes, also when the process is killed
        yield


def write_whole(path: Path, text: str) -> None:
    """Write a small file so that no reader ever sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
