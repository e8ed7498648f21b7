"""The image's /opt/lorikeet, made in a directory by the Dockerfile's own commands: those that need neither the network,
root nor nvcc. The dependencies are the ones that run this test, and pip has to find that they are all there."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from server.base.cache import cache_root
from server.base.resolve import locate_base
from tests.support.deployment import Stage, stages
from tests.support.server_process import REPOSITORY

LEFT_OUT = ("apt-get ", "FLASHINFER_CUDA_ARCH_LIST=")  # a root's, and nvcc's
PREFIX = "/opt/lorikeet"
PACKAGES = ("adapters", "server", "trainer", "loadtest", "benchmarks", "protos")


def context() -> list[Path]:
    """What `docker build` is sent of the files in the repository, by .dockerignore: its last line that matches a path,
    or a folder that it is in, decides."""
    lines = [line for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    rules = [(_pattern(line.removeprefix("!")), line.startswith("!")) for line in lines]
    sent = []
    for path in tracked():
        names = [str(path), *map(str, path.parents)]
        verdicts = [is_sent for pattern, is_sent in rules if any(map(pattern.fullmatch, names))]
        if not verdicts or verdicts[-1]:
            sent.append(path)
    return sent


def packaged() -> list[Path]:
    """The repository's files that belong into a wheel, by their paths in it."""
    files = [path for path in tracked(*PACKAGES) if path.parts[:2] != ("benchmarks", "results")]
    return [path.relative_to("protos") if path.parts[0] == "protos" else path for path in files]


def _pattern(line: str) -> re.Pattern[str]:
    """In .dockerignore, `*` stays within a name and `**/` stands for any folders; all else here is plain."""
    return re.compile(re.escape(line).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*"))


def tracked(*below: str) -> list[Path]:
    """The repository's files, relative to it; those that are new too, unless git ignores them."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *below]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    paths = [Path(name) for name in listed.split("\0") if name]
    return [path for path in paths if (REPOSITORY / path).is_file()]


@dataclass(frozen=True, slots=True)
class Image:
    """One that has been built: `root` stands for /, and `log` is what the commands printed."""

    root: Path
    log: str

    @classmethod
    def build(cls, directory: Path) -> "Image":
        root, source = directory / "root", directory / "source"
        source.mkdir()
        build, final = stages()
        log = ""
        for step in build.steps:
            command = step.value.removeprefix("--mount=type=cache,target=/root/.cache/pip ")
            if step.instruction == "COPY":
                _copy(step.value, source)
            elif step.instruction == "RUN" and not command.startswith(LEFT_OUT):
                log += _run(command, root, source)
                if not (home := root / "opt/lorikeet/home").exists():
                    _stand_in(root, home)
        _copy_entrypoint(final, root)
        return cls(root, log)

    @property
    def prefix(self) -> Path:
        return self.root / PREFIX.lstrip("/")

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """As in a container, with `home` as its HOME."""
        kept = {name: os.environ[name] for name in ("PATH", "OMP_NUM_THREADS") if name in os.environ}
        return kept | {"PATH": f"{self.prefix}/bin:{kept['PATH']}", "HOME": str(home)} | more


def _copy(value: str, source: Path) -> None:
    """A COPY from the context: of everything, or of files by name into the source tree itself."""
    *names, target = value.split()
    assert target in (".", "./")
    for path in context():
        if names == ["."] or str(path) in names:
            place = source / (path if names == ["."] else path.name)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / path, place)


def _stand_in(root: Path, home: Path) -> None:
    """After the virtual environment has been made: the packages that run this test, names of those that need a GPU,
    and something that was compiled; the embedded model is the user's, fetched first if it has not been."""
    locate_base(None)
    (site,) = root.glob("opt/lorikeet/lib/python*/site-packages")
    for old in site.glob("*setuptools*"):  # which Python 3.12's environments do not have
        shutil.rmtree(old)
    (site / "of_this_test.pth").write_text(sysconfig.get_path("purelib") + "\n")
    for name, version in (("cuda_bindings", "13.5.0"), ("flashinfer_python", "0.6.14")):
        metadata = site / f"{name}-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (home / ".triton/cache/ABC").mkdir(parents=True)
    (home / ".triton/cache/ABC/launcher.so").write_text("compiled")
    (home / ".cache").mkdir()
    (home / ".cache/lorikeet").symlink_to(cache_root())


def _run(command: str, root: Path, source: Path) -> str:
    """One command of a RUN in the source tree, with /opt/lorikeet in `root`."""
    prefix = f"{root}{PREFIX}"
    variables: Mapping[str, str] = {
        "PATH": f"{prefix}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(root),
        "EMBEDDED_MODEL": "1",
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # the way to say --no-build-isolation by a variable
    }
    command = command.replace(PREFIX, prefix)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=source,
        env=dict(variables),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}"
    return done.stdout


def _copy_entrypoint(final: Stage, root: Path) -> None:
    (copy,) = [value for value in final.values("COPY") if value.startswith("--chmod=755 ")]
    _, source, target = copy.split()
    shutil.copy(REPOSITORY / source, root / target.lstrip("/"))
    (root / target.lstrip("/")).chmod(0o755)
