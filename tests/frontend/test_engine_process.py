"""The life and death of the engine process, as the front end hears of it."""

import asyncio
import logging
import os
import signal
import stat
import tempfile
from pathlib import Path

import psutil
import pytest

from adapters.errors import LorikeetError
from server.errors import BaseModelError, ConfigError, EngineUnavailable
from server.frontend.supervisor import Backoff
from server.logs import PassedOn
from tests.frontend.fake_engine import CRASH, ECHO, HOLD, NO_MESSAGE
from tests.frontend.harness import Recorder, collect, ids, make_frontend, request, run, started, text


def engine_pid(recorder: Recorder) -> int:
    pid = recorder.named("engine_started")[-1]["pid"]
    assert isinstance(pid, int)
    return pid


@pytest.mark.parametrize("opcode", [CRASH, NO_MESSAGE])
def test_a_lost_engine_ends_its_streams_and_calls_and_is_started_again(tmp_path: Path, opcode: int) -> None:
    async def test() -> None:
        async with started(tmp_path, backoff=Backoff(first=0.5)) as (frontend, recorder):
            told: list[bool] = []
            frontend.on_ready_change(told.append)
            await frontend.load_adapter("pirate")
            first = engine_pid(recorder)
            others = [asyncio.create_task(collect(frontend, request([HOLD, *ids("hello")]))) for _ in range(3)]
            loading = asyncio.create_task(frontend.load_adapter("slow"))
            await recorder.until(lambda: recorder.stats is not None and recorder.stats.num_running == 3)
            with pytest.raises(EngineUnavailable, match="the engine was lost") as caught:
                await collect(frontend, request([opcode, *ids("bye")]))
            assert caught.value.retry_after is not None
            for task in (*others, loading):
                with pytest.raises(EngineUnavailable):
                    await task
            assert not frontend.ready
            assert frontend.residency("sha256:pirate").fastest == "disk"
            with pytest.raises(EngineUnavailable):
                await collect(frontend, request("hi"))
            await recorder.until(lambda: len(recorder.named("engine_started")) == 2)
            assert told == [False, True]
            assert len(recorder.named("engine_restarted")) == 1
            assert engine_pid(recorder) != first
            assert not psutil.pid_exists(first)
            assert text(await collect(frontend, request([ECHO, *ids("fine")]))) == "fine"

    run(test())


def test_stats_that_come_with_ready_are_heard_after_it(tmp_path: Path) -> None:
    """An engine that has nothing to do does not say the same again: they would be forgotten with what was before."""

    async def test() -> None:
        async with started(tmp_path, "--talkative") as (_, recorder):
            await recorder.until(lambda: recorder.stats is not None)
            assert [name for name, _ in recorder.calls] == ["engine_started", "engine_stats"]

    run(test())


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGKILL, "SIGKILL"), (signal.SIGRTMIN + 3, f"signal {signal.SIGRTMIN + 3}")]
)
def test_the_error_says_how_the_engine_ended(tmp_path: Path, number: int, name: str) -> None:
    async def test() -> None:
        async with started(tmp_path) as (frontend, recorder):
            asked = asyncio.create_task(collect(frontend, request([HOLD, *ids("hello")])))
            await recorder.until(lambda: recorder.stats is not None)
            os.kill(engine_pid(recorder), number)
            with pytest.raises(EngineUnavailable, match=rf"was killed by {name}\b"):
                await asked

    run(test())


@pytest.mark.parametrize(("status", "kind"), [("2", ConfigError), ("3", BaseModelError)])
def test_an_engine_that_refuses_its_base_or_a_setting_is_not_started_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, status: str, kind: type[LorikeetError]
) -> None:
    async def test() -> None:
        frontend, recorder = make_frontend(tmp_path, "--exit", status, "--say", "loading\nerror: this is refused")
        with pytest.raises(kind, match=r"^this is refused$"):
            await frontend.start()
        assert frontend.info is None
        await frontend.stop(0.0)
        assert recorder.calls == []

    run(test())
    assert "loading" in caplog.messages


def test_what_an_engine_writes_is_logged_as_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the level here: the engine has looked at its own lines."""

    async def test() -> None:
        frontend, _ = make_frontend(tmp_path, "--exit", "7", "--say", "a crash:\n  in C")
        with pytest.raises(EngineUnavailable):
            await frontend.start()
        await frontend.stop(0.0)

    monkeypatch.setattr(logging.getLogger("engine"), "level", logging.CRITICAL)
    run(test())
    passed_on = [record for record in caplog.records if record.name == "engine"]
    assert all(isinstance(record.msg, PassedOn) for record in passed_on)
    assert [record.getMessage() for record in passed_on] == ["a crash:", "  in C"]


def test_an_engine_that_dies_in_its_start_is_an_error(tmp_path: Path) -> None:
    async def test() -> None:
        frontend, _ = make_frontend(tmp_path, "--exit", "7")
        with pytest.raises(EngineUnavailable, match="ended with exit status 7"):
            await frontend.start()
        await frontend.stop(0.0)

    run(test())


def test_a_start_that_is_cancelled_leaves_no_process(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The engine is deaf to SIGTERM, and says so."""

    async def test() -> None:
        frontend, _ = make_frontend(tmp_path, "--deaf")
        starting = asyncio.create_task(frontend.start())
        said: list[str] = []
        while not said:
            await asyncio.sleep(0)
            said = [message for message in caplog.messages if message.startswith("pid ")]
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        await frontend.stop(0.0)
        assert not psutil.pid_exists(int(said[0].removeprefix("pid ")))

    run(test())


def test_stop_leaves_neither_process_nor_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private = tmp_path / "t"
    private.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(private))

    async def test() -> None:
        async with started(tmp_path) as (frontend, recorder):
            pid = engine_pid(recorder)
            (directory,) = private.iterdir()
            assert stat.S_IMODE(directory.stat().st_mode) == 0o700
            await frontend.stop(1.0)
            assert not psutil.pid_exists(pid)
            assert list(private.iterdir()) == []
            await frontend.stop(1.0)

    run(test())


def test_the_engine_does_not_get_the_terminals_signals(tmp_path: Path) -> None:
    async def test() -> None:
        async with started(tmp_path) as (_, recorder):
            assert os.getsid(engine_pid(recorder)) != os.getsid(0)

    run(test())


def test_a_temporary_directory_too_long_for_a_socket_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("d" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))

    async def test() -> None:
        frontend, _ = make_frontend(tmp_path)
        with pytest.raises(ConfigError, match="TMPDIR"):
            await frontend.start()
        assert list(long.iterdir()) == []

    run(test())


def test_backoff_doubles_up_to_its_bound_and_forgets() -> None:
    backoff = Backoff(first=1.0, longest=5.0, stable=60.0)
    waits = [backoff.after(None, 0.0)]
    for _ in range(4):
        waits.append(backoff.after(waits[-1], 10.0))
    assert waits == [1.0, 2.0, 4.0, 5.0, 5.0]
    assert backoff.after(5.0, 61.0) == 1.0


def test_a_stop_that_is_cancelled_may_be_asked_for_again(tmp_path: Path) -> None:
    """As by a second signal, while the engine takes its time."""

    async def test() -> None:
        async with started(tmp_path) as (frontend, recorder):
            pid = engine_pid(recorder)
            psutil.Process(pid).suspend()
            stopping = asyncio.create_task(frontend.stop(60.0))
            for _ in range(20):  # it has asked the engine to end
                await asyncio.sleep(0)
            stopping.cancel()
            await asyncio.wait((stopping,))
            await frontend.stop(0.0)
            assert not psutil.pid_exists(pid)

    run(test())
