"""The source distribution: a wheel that is built of it has all that the packages have."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from tests.support.image import context, packaged
from tests.support.server_process import REPOSITORY

BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def build(kind: str, source: Path, target: Path) -> Path:
    """The sdist or wheel of a source tree, by the build backend that pyproject.toml names."""
    command = [sys.executable, "-c", BUILD, f"build_{kind}", str(target)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=True, timeout=120)
    return target / done.stdout.splitlines()[-1]


def test_a_wheel_of_the_sdist_is_whole(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for path in context():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / path, source / path)
    sdist = build("sdist", source, tmp_path)
    shutil.unpack_archive(sdist, tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    wheel = build("wheel", unpacked, tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {str(path) for path in packaged()} <= names
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests/", "deploy/", "examples/"))]
