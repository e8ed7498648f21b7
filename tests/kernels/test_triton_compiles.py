"""Every Triton kernel compiles as the engine launches it, without a GPU: the interpreter is less strict."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KIB = 1 << 10
SHARED_MEMORY = {90: 227 * KIB, 89: 99 * KIB}  # CUDA programming guide: the most that a block has, by capability


def launched_kernels() -> set[str]:
    """The functions of `server.kernels.triton` that are launched: name[grid](…)."""
    names = set()
    for file in (ROOT / "server/kernels/triton").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            match node:
                case ast.Call(func=ast.Subscript(value=ast.Name(id=name))):
                    names.add(name)
    return names


@pytest.mark.timeout(900)  # 20 s of computing, which took 150 on a machine with four times as much to do
@pytest.mark.parametrize("capability", list(SHARED_MEMORY))
def test_kernels_compile_and_fit(capability: int, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compile_kernels", str(capability)]
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    shared = json.loads(done.stdout.splitlines()[-1])
    assert set(shared) == launched_kernels()
    assert max(shared.values()) <= SHARED_MEMORY[capability], shared
