"""Machine code that is kept on disk: compiled once, and again for whatever changes it or is wrong with it."""

import dataclasses
from pathlib import Path

import pytest

from server.kernels.cuda.cubins import Cubins, Program
from server.kernels.cuda.module import compile_program, read_program

PROGRAM = Program("k.cu", b"kernel", (("a.cuh", b"one"), ("b.cuh", b"two")), ("-DN=4", "-DM=8"), (13, 0))


class Compiler:
    """Remembers what it was asked for."""

    def __init__(self) -> None:
        self.compiled: list[Program] = []

    def __call__(self, program: Program) -> bytes:
        self.compiled.append(program)
        return b"code of " + program.text


def test_another_start_does_not_compile(tmp_path: Path) -> None:
    first, second = Compiler(), Compiler()
    assert Cubins(tmp_path / "made", first).get(PROGRAM) == b"code of kernel"
    assert Cubins(tmp_path / "made", second).get(PROGRAM) == b"code of kernel"
    assert (first.compiled, second.compiled) == ([PROGRAM], [])
    assert [path.name for path in (tmp_path / "made").iterdir()] == [PROGRAM.key], "nothing else is left"


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other.cu"},
        {"text": b"kernel "},
        {"headers": (("a.cuh", b"one"), ("b.cuh", b"three"))},
        {"headers": (("a.cuh", b"one"), ("c.cuh", b"two"))},
        {"headers": (("a.cuh", b"onetwo"), ("b.cuh", b""))},
        {"options": ("-DN=4", "-DM=9")},
        {"options": ("-DN=4 -DM=8",)},
        {"compiler": (13, 1)},
    ],
    ids=str,
)
def test_whatever_changes_the_code_is_compiled(tmp_path: Path, changes: dict[str, object]) -> None:
    compiler = Compiler()
    cubins = Cubins(tmp_path, compiler)
    other = dataclasses.replace(PROGRAM, **changes)  # type: ignore[arg-type]
    cubins.get(PROGRAM)
    assert cubins.get(other) == b"code of " + other.text
    assert compiler.compiled == [PROGRAM, other]


@pytest.mark.parametrize("damage", [lambda entry: b"", lambda entry: entry[:-1], lambda entry: entry[:40] + b"?" * 6])
def test_a_damaged_entry_is_compiled_again(tmp_path: Path, damage: object) -> None:
    compiler = Compiler()
    cubins = Cubins(tmp_path, compiler)
    cubins.get(PROGRAM)
    entry = tmp_path / PROGRAM.key
    entry.write_bytes(damage(entry.read_bytes()))  # type: ignore[operator]
    for _ in range(2):
        assert cubins.get(PROGRAM) == b"code of kernel"
    assert len(compiler.compiled) == 2


def test_where_nothing_can_be_kept_kernels_are_compiled(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    assert Cubins(tmp_path / "file" / "folder", Compiler()).get(PROGRAM) == b"code of kernel"
    assert "compiled again at the next start" in caplog.text
    (tmp_path / PROGRAM.key).mkdir()
    assert Cubins(tmp_path, Compiler()).get(PROGRAM) == b"code of kernel"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == [], "no temporary file stays"


def test_nvrtc_s_code_comes_back_as_it_was(tmp_path: Path) -> None:
    program = dataclasses.replace(
        read_program("skinny.cu", {"N": 4}, "sm_90a"), text=b'extern "C" __global__ void nothing() {}'
    )
    made = Cubins(tmp_path, compile_program).get(program)
    assert made.startswith(b"\x7fELF")
    assert Cubins(tmp_path, Compiler()).get(program) == made
