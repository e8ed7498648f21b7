"""The systemd unit: systemd's own opinion, and what it says against the command line."""

import re
import shlex
import socket
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path
from uuid import uuid4

import pytest

from server.cli.exits import ExitCode
from tests.support.client import Client
from tests.support.deployment import DEPLOY, ENDING_SECONDS, is_below, options
from tests.support.server_process import ServerProcess
from tests.support.tiny_base import save_tiny_base

UNIT = DEPLOY / "systemd/lorikeet.service"
PROGRAM = "/opt/lorikeet/bin/lorikeet"
MOST_EXPOSED = 2.0  # of 10, as `systemd-analyze security` counts; what it leaves is the network and the GPUs


def service() -> dict[str, str]:
    """The settings of the service; of one that is there twice, the last."""
    parser = ConfigParser(strict=False, interpolation=None, delimiters="=", comment_prefixes="#")
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # names have capitals
    parser.read(UNIT)
    return dict(parser["Service"])


def environment() -> dict[str, str]:
    """The unit's own, and over it that of the file of options."""
    own = shlex.split(service()["Environment"])
    file = (DEPLOY / "systemd/lorikeet.env").read_text().splitlines()
    return dict(word.split("=", 1) for word in [*own, *(line for line in file if line and line[0] != "#")])


def words(setting: str) -> list[str]:
    """A command of the unit after the program, with variables as systemd takes them: divided at blanks."""
    command = re.sub(r"\$(\w+)", lambda match: environment()[match[1]], service()[setting])
    program, *rest = shlex.split(command)
    assert program == PROGRAM
    return rest


def test_the_commands_are_ones_that_the_command_line_takes() -> None:
    serving = options(words("ExecStart"))
    assert serving["base"] is not None, "from the file of options"


def test_only_what_is_its_own_is_written() -> None:
    said = service()
    state, cache = f"/var/lib/{said['StateDirectory']}", f"/var/cache/{said['CacheDirectory']}"
    assert is_below(options(words("ExecStart"))["store"], state)
    assert is_below(environment()["HOME"], cache)
    assert said["WorkingDirectory"] == state
    assert said["ProtectSystem"] == "strict"


def test_a_stop_is_the_front_ends_and_has_time() -> None:
    """SIGTERM to the engine, too, would end the requests that may finish."""
    assert service()["KillMode"] == "mixed"
    assert int(service()["TimeoutStopSec"]) >= options(words("ExecStart"))["grace"] + ENDING_SECONDS


def test_what_would_fail_again_is_not_started_again() -> None:
    assert service()["Restart"] == "on-failure"
    assert {int(code) for code in service()["RestartPreventExitStatus"].split()} == {ExitCode.USAGE, ExitCode.REFUSED}


def test_systemd_hears_when_it_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `Type=notify` asks, at a path and at an abstract address: when requests are taken, and not before."""
    assert service()["Type"] == "notify"
    save_tiny_base(tmp_path / "tiny")
    for address in (str(tmp_path / "notify"), f"@lorikeet-{uuid4()}"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.bind(address.replace("@", "\0"))
            manager.settimeout(60)
            monkeypatch.setenv("NOTIFY_SOCKET", address)
            server = ServerProcess.start(tmp_path, tmp_path / "tiny", tmp_path / "store")
            try:
                assert manager.recv(4096) == b"READY=1"
                client = Client(server.port)
                assert client.is_serving()
                client.close()
            finally:
                server.stop()


@pytest.mark.systemd
def test_systemd_takes_the_unit_and_finds_it_confined(tmp_path: Path) -> None:
    """With this Python in place of the program, which has to be there."""
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace(PROGRAM, sys.executable))
    exposed = f"--threshold={int(MOST_EXPOSED * 10)}"
    for arguments in (["verify", "--man=no", unit], ["security", "--offline=true", "--no-pager", exposed, unit]):
        command = ["systemd-analyze", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert (done.returncode, done.stderr) == (0, ""), done.stdout


@pytest.mark.systemd
def test_the_user_is_the_one_that_is_made(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    with (DEPLOY / "systemd/lorikeet.sysusers").open() as file:
        subprocess.run(
            ["systemd-sysusers", f"--root={tmp_path}", "-"], stdin=file, capture_output=True, check=True, timeout=60
        )
    name, _, uid, _, _, home, shell = (tmp_path / "etc/passwd").read_text().strip().split(":")
    assert name == service()["User"] == service()["Group"]
    assert int(uid) > 0
    assert home == service()["WorkingDirectory"]
    assert shell.endswith("nologin")
