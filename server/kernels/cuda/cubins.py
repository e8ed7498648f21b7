"""Machine code that NVRTC has made, kept on disk: another start compiles only what has changed.

An entry is the SHA-256 of the code, then the code. Whatever is wrong with one, it is compiled again; where none can be
written, a start takes longer and nothing else.
"""

import contextlib
import hashlib
import json
import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_DIGEST_BYTES = hashlib.sha256().digest_size

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Program:
    """What a compilation depends on. `headers` are name and text of each file that `text` may include; `compiler` is
    NVRTC's version."""

    name: str
    text: bytes
    headers: tuple[tuple[str, bytes], ...]
    options: tuple[str, ...]
    compiler: tuple[int, int]

    @property
    def key(self) -> str:
        """The same for the same machine code, and a file's name."""
        headers = [(name, _hex(text)) for name, text in self.headers]
        parts = (self.name, _hex(self.text), headers, self.options, self.compiler)
        return f"{Path(self.name).stem}-{_hex(json.dumps(parts).encode())[:32]}.cubin"


class Cubins:
    """The entries in `folder`, which is made when it is needed. Processes may share it."""

    def __init__(self, folder: Path, compiler: Callable[[Program], bytes]) -> None:
        self._folder = folder
        self._compiler = compiler

    def get(self, program: Program) -> bytes:
        """Its machine code, of an earlier start or made now. Raises what the compiler raises."""
        path = self._folder / program.key
        kept = _read(path)
        if kept is not None:
            return kept
        made = self._compiler(program)
        try:
            _write(path, made)
        except OSError as error:
            _logger.warning("a kernel will be compiled again at the next start: %s", error)
        return made


def _read(path: Path) -> bytes | None:
    try:
        entry = path.read_bytes()
    except OSError:
        return None
    digest, code = entry[:_DIGEST_BYTES], entry[_DIGEST_BYTES:]
    return code if hashlib.sha256(code).digest() == digest else None


def _write(path: Path, code: bytes) -> None:
    """No reader ever sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
        try:
            file.write(hashlib.sha256(code).digest() + code)
            file.close()
            Path(file.name).replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(file.name).unlink()
            raise


def _hex(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
