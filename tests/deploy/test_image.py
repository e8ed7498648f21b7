"""The Dockerfile: a linter's opinion, what it says of the server against what the server is, and its commands run."""

import json
import re
import shlex
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from server.cli.exits import ExitCode
from tests.support.client import Answer, Client, generation, read
from tests.support.deployment import DEPLOY, ENDING_SECONDS, is_below, options, stages
from tests.support.image import PACKAGES, Image, context, packaged, tracked
from tests.support.server_process import ServerProcess
from tests.support.tiny_base import save_tiny_base
from tests.support.waiting import eventually

HEALTHCHECK = re.compile(r"(?P<options>.*) CMD (?P<command>\[.*\])")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    return Image.build(tmp_path_factory.mktemp("image"))


def healthcheck() -> tuple[str, list[str]]:
    (value,) = stages()[-1].values("HEALTHCHECK")
    match = HEALTHCHECK.fullmatch(value)
    assert match is not None
    return match["options"], json.loads(match["command"])


# As it is written


def test_the_linter_has_nothing_to_say() -> None:
    hadolint = Path(sysconfig.get_path("scripts")) / "hadolint"
    done = subprocess.run([hadolint, DEPLOY / "Dockerfile"], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_last_stage_has_no_tools_to_build_with_and_no_root() -> None:
    build, final = stages()
    assert "-devel-" in build.base
    assert "-base-" in final.base, "CUDA's runtime library alone"
    (install, *others) = final.values("RUN")
    assert not others
    packages = re.search(r"apt-get install -y --no-install-recommends ([^&]*)", install)
    assert packages is not None
    assert set(packages[1].split()) == {"ca-certificates", "python3", "tini"}
    (user,) = final.values("USER")
    uid, gid = map(int, user.split(":"))
    assert min(uid, gid) > 0
    assert f"--uid {uid} --user-group" in install


def test_the_command_is_one_that_the_command_line_takes() -> None:
    final = stages()[-1]
    settings = options(final.command("CMD"))
    assert settings["host"] == settings["metrics_host"] == "0.0.0.0"
    assert final.values("EXPOSE") == [f"{settings['port']} {settings['metrics_port']}"]
    (state,) = final.values("WORKDIR")
    assert is_below(settings["store"], state)
    assert state in final.values("RUN")[0].partition("install -d")[2].split(), "made for the user"


def test_the_first_process_passes_signals_on() -> None:
    assert stages()[-1].command("ENTRYPOINT")[:2] == ["tini", "--"]
    assert (DEPLOY / "docker/entrypoint.sh").read_text().splitlines()[-1] == 'exec lorikeet "$@"'


def test_the_check_of_health_ends_before_docker_ends_it() -> None:
    said, command = healthcheck()
    seconds = re.search(r"--timeout=(\d+)s", said)
    assert seconds is not None
    settings = options(command[1:])
    assert settings["timeout"] < int(seconds[1])
    assert settings["server"] == f"127.0.0.1:{options(stages()[-1].command('CMD'))['port']}"


def test_only_what_the_image_is_built_of_is_sent() -> None:
    sent = set(context())
    assert {path for path in tracked(*PACKAGES) if path.parts[:2] != ("benchmarks", "results")} <= sent
    rest = {str(path) for path in sent if path.parts[0] not in PACKAGES}
    named = {word for stage in stages() for copy in stage.values("COPY") for word in copy.split()}
    assert rest - {"README.md", "LICENSE"} <= named, "all of it is copied by name; these two are in the wheel"


# As it is built


def test_the_requirements_are_those_of_the_project(image: Image) -> None:
    """Of the extras, too; and every version that is asked for is there, at the one that constraints.txt names."""
    satisfied = re.findall(r"^Requirement already satisfied: (\S+)", image.log, re.MULTILINE)
    listed = (image.root.parent / "source/requirements.txt").read_text().splitlines()
    assert {"cuda-bindings", "flashinfer-python", "obstore", "torch"} <= {Requirement(line).name for line in listed}
    assert set(listed) <= set(satisfied)


def test_all_files_of_the_packages_are_installed(image: Image) -> None:
    """The way from the repository through .dockerignore, the wheel and pip loses nothing."""
    (site,) = image.prefix.glob("lib/python*/site-packages")
    missing = [str(path) for path in packaged() if not (site / path).is_file()]
    assert missing == []


@pytest.mark.parametrize("command", ["lorikeet", "trainer"])
def test_the_commands_run_where_no_source_is(image: Image, command: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [image.prefix / "bin" / command, "--help"],
        cwd=tmp_path,
        env=image.environment(tmp_path),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"Usage: {command}" in done.stdout


def test_no_tool_of_the_build_is_left(image: Image) -> None:
    (site,) = image.prefix.glob("lib/python*/site-packages")
    assert not [name for name in ("pip", "ninja") if (site / name).exists()]
    assert not list((image.prefix / "bin").glob("pip*"))


def test_a_container_begins_with_what_the_image_has_prepared(image: Image, tmp_path: Path) -> None:
    """Also where its volume holds what an older image has left there."""
    (tmp_path / ".triton/cache/ABC").mkdir(parents=True)
    (tmp_path / ".triton/cache/ABC/launcher.so").symlink_to("/gone")
    (tmp_path / ".triton/cache/own.so").write_text("own")
    for _ in range(2):
        entry = [image.prefix / "bin/lorikeet-container", "--version"]
        done = subprocess.run(
            entry, env=image.environment(tmp_path), capture_output=True, text=True, check=False, timeout=60
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("lorikeet ")
    assert (tmp_path / ".triton/cache/ABC/launcher.so").read_text() == "compiled"
    assert (tmp_path / ".triton/cache/own.so").read_text() == "own"


@pytest.fixture(scope="module")
def container(image: Image, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """ENTRYPOINT and CMD, with a tiny base and on free ports."""
    directory = tmp_path_factory.mktemp("container")
    save_tiny_base(directory / "tiny")
    command = [
        *stages()[-1].command("ENTRYPOINT")[2:],
        *stages()[-1].command("CMD"),
        "--json",
        "--threads",
        "1",
        "--grace",
        "120",
    ]
    command += ["--host", "127.0.0.1", "--metrics-host", "127.0.0.1", "--port", "0", "--metrics-port", "0"]
    command += ["--base", str(directory / "tiny"), "--store", str(directory / "adapters"), "--device", "cpu"]
    environment = image.environment(directory / "home")
    (directory / "home").mkdir()
    server = ServerProcess.launch(command, directory, environment)
    yield server
    server.stop()


def check_health(image: Image, server: ServerProcess, home: Path) -> int:
    _, command = healthcheck()
    environment = image.environment(home, LORIKEET_SERVER=f"127.0.0.1:{server.port}")
    return subprocess.run(command, env=environment, capture_output=True, check=False, timeout=60).returncode


def test_a_container_serves_is_healthy_and_stops_in_order(
    image: Image, container: ServerProcess, tmp_path: Path
) -> None:
    """What runs when `docker stop` sends SIGTERM is finished; HEALTHCHECK fails when nobody is there."""
    assert check_health(image, container, tmp_path) == ExitCode.OK
    client = Client(container.port)
    stream, answer = client.open(generation([50, 51, 52], max_tokens=800)), Answer()
    answer.add(next(stream))
    container.terminate()
    eventually(lambda: not client.is_serving(), "health says that it stops")
    assert len(read(stream, answer).token_ids) == 800
    assert container.stop() == 0
    assert check_health(image, container, tmp_path) == ExitCode.UNAVAILABLE
    client.close()


def test_the_documented_run_is_one_that_the_command_line_takes() -> None:
    text = (DEPLOY.parent / "docs/deploy.md").read_text().replace("\\\n", " ")
    (run,) = re.findall(r"^docker run (.*)$", text, re.MULTILINE)
    words = shlex.split(run)
    start = words.index("lorikeet")  # the image's name
    said, of_image = options(words[start + 1 :]), options(stages()[-1].command("CMD"))
    assert [said[name] for name in ("host", "metrics_host", "store")] == [
        of_image[name] for name in ("host", "metrics_host", "store")
    ]
    assert int(words[words.index("--stop-timeout") + 1]) >= said["grace"] + ENDING_SECONDS
