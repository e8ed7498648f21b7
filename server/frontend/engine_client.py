"""One engine process and the socket to it, from start to end. Starting another one is `supervisor`'s."""

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import msgspec
import zmq

from adapters.errors import LorikeetError
from server import logs
from server.config import EngineConfig
from server.engine.messages import Ready, Shutdown, ToEngine, ToFrontend, decode_to_frontend, encode
from server.errors import BaseModelError, ConfigError, EngineUnavailable

ENGINE_COMMAND = (sys.executable, "-m", "server.engine.process")

# What the exit status of an engine means that has said why in an `error: …` line.
REFUSALS: Mapping[int, type[LorikeetError]] = MappingProxyType({2: ConfigError, 3: BaseModelError})

# Bytes of the longest path that a Unix socket can have, less what ZeroMQ and we add to the directory.
_MAX_DIRECTORY = 90
_TERMINATE_SECONDS = 2.0

_engine_log = logging.getLogger("engine")


class EngineClient:
    """Spawns `command` with `--socket ADDRESS`, the config as a line of JSON on its stdin.

    `receive` is called, on the event loop, with every message but Ready. What the engine writes is passed on to
    the log; the `error: …` line of its start is kept for the error that is raised instead.
    """

    def __init__(self, command: Sequence[str], config: EngineConfig, receive: Callable[[ToFrontend], None]) -> None:
        self._command = tuple(command)
        self._config = config
        self._receive = receive
        self._directory = _private_directory()
        self._loop = asyncio.get_running_loop()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        for option in (zmq.SNDHWM, zmq.RCVHWM, zmq.LINGER):
            self._socket.setsockopt(option, 0)
        self._file = int(self._socket.getsockopt(zmq.FD))  # readable when something may have come
        self._process: asyncio.subprocess.Process | None = None
        self._output: asyncio.Task[None] | None = None
        self._ready: asyncio.Future[Ready] = self._loop.create_future()
        self._garbled: asyncio.Future[str] = self._loop.create_future()  # what was wrong with a frame
        self._is_reading = False
        self._error_line: str | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    async def start(self) -> Ready:
        """Returns once the engine takes sequences, however long its base model takes to load.

        Raises BaseModelError when it refuses the model, ConfigError when a setting, EngineUnavailable when it ends
        otherwise; `close` it then.
        """
        address = f"ipc://{self._directory}/engine"
        self._socket.bind(address)
        self._start_reading()
        self._process = process = await asyncio.create_subprocess_exec(
            *self._command,
            "--socket",
            address,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=_engine_environment(),
            start_new_session=True,  # a terminal's Ctrl-C is for the front end, which then stops the engine in order
        )
        assert process.stdin is not None, "a pipe"
        assert process.stdout is not None, "a pipe"
        self._output = asyncio.create_task(self._pass_on(process.stdout), name="engine output")
        process.stdin.write(msgspec.json.encode(self._config) + b"\n")
        process.stdin.close()
        ended = asyncio.create_task(self.ended(), name="engine start")
        try:
            await asyncio.wait((self._ready, ended), return_when=asyncio.FIRST_COMPLETED)
            if not self._ready.done():
                raise ended.result()
            self._start_reading()
            return self._ready.result()
        finally:
            ended.cancel()

    def send(self, message: ToEngine) -> None:
        """Never waits: the queue to the engine has no bound, and the engine reads it every step. To an engine that
        is lost, or not yet connected, it sends nothing."""
        with contextlib.suppress(zmq.Again):
            self._socket.send(encode(message), zmq.NOBLOCK)
        self._loop.call_soon(self._read)  # sending may take the signal that something has come

    async def ended(self) -> LorikeetError:
        """Waits until the engine is lost (its process ended, or it sent what is no message) and says why."""
        assert self._process is not None, "not started"
        assert self._output is not None, "not started"
        exited = asyncio.create_task(self._process.wait(), name="engine exit")
        try:
            await asyncio.wait((exited, self._garbled), return_when=asyncio.FIRST_COMPLETED)
            if not exited.done():
                return EngineUnavailable(f"the engine sent what is no message: {self._garbled.result()}")
            await asyncio.wait((self._output,), timeout=1.0)  # its last words
            return self._death(exited.result())
        finally:
            exited.cancel()

    async def close(self, patience: float = 0.0) -> None:
        """Ends the engine: asked, given `patience` seconds, then terminated, at last killed (at once if this is
        cancelled). May be called again."""
        try:
            if self._process is not None and self._process.returncode is None:
                if self._is_reading:  # else the socket may be gone, by a call that was cancelled
                    self.send(Shutdown())
                await _end(self._process, patience)
        finally:
            self._release()

    def _release(self) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        if self._output is not None:
            self._output.cancel()
        self._stop_reading()
        self._context.destroy(linger=0)
        shutil.rmtree(self._directory, ignore_errors=True)

    def _read(self) -> None:
        """Takes all messages there are: ZeroMQ signals their coming only once. (Reading by callback halves what
        zmq.asyncio takes a message.)"""
        while self._is_reading:
            try:
                message = decode_to_frontend(self._socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                return
            except msgspec.DecodeError as error:
                self._stop_reading()
                self._garbled.set_result(str(error))
                return
            if isinstance(message, Ready):
                self._stop_reading()  # until `start` goes on: what comes next is for who knows that there is an engine
                self._ready.set_result(message)
            else:
                self._receive(message)

    def _start_reading(self) -> None:
        self._is_reading = True
        self._loop.add_reader(self._file, self._read)
        self._loop.call_soon(self._read)  # what came before gives no signal any more

    def _stop_reading(self) -> None:
        if self._is_reading:
            self._is_reading = False
            self._loop.remove_reader(self._file)

    async def _pass_on(self, output: asyncio.StreamReader) -> None:
        rest = b""
        while chunk := await output.read(1 << 16):
            lines = (rest + chunk).splitlines(keepends=True)
            rest = b"" if lines[-1].endswith((b"\n", b"\r")) else lines.pop()
            for line in lines:
                self._pass_on_line(line)
        if rest:
            self._pass_on_line(rest)

    def _pass_on_line(self, line: bytes) -> None:
        text = line.decode(errors="replace")
        if text.startswith("error: ") and not self._ready.done():
            self._error_line = text.removeprefix("error: ").strip()
            return
        logs.pass_on(text, _engine_log)

    def _death(self, status: int) -> LorikeetError:
        reason = self._error_line
        if reason is not None and (refusal := REFUSALS.get(status)):
            return refusal(reason)
        if status < 0:
            how = f"was killed by {_signal_name(-status)}"
            how += " (out of memory?)" if -status == signal.SIGKILL else ""
        else:
            how = f"ended with exit status {status}"
        return EngineUnavailable(f"the engine process {how}" + (f": {reason}" if reason else ""), retry_after=5.0)


def _signal_name(number: int) -> str:
    """Most real-time signals have none."""
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


def _private_directory() -> str:
    """A new directory that only this user can enter."""
    directory = tempfile.mkdtemp(prefix="lorikeet-")
    if len(directory.encode()) > _MAX_DIRECTORY:
        shutil.rmtree(directory)
        raise ConfigError(f"TMPDIR: {tempfile.gettempdir()} is too long a path for a Unix socket; set a shorter one")
    return directory


async def _end(process: asyncio.subprocess.Process, patience: float) -> None:
    """Returns when the process has ended: by itself within `patience` seconds, or made to."""
    await _exit_within(process, patience)
    if process.returncode is None:
        process.terminate()
        await _exit_within(process, _TERMINATE_SECONDS)
    if process.returncode is None:
        process.kill()
        await process.wait()


async def _exit_within(process: asyncio.subprocess.Process, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await process.wait()


def _engine_environment() -> dict[str, str]:
    """Ours, with torch's CPU threads told to wait for each other briefly and then to sleep. By default they spin for
    milliseconds, and the core that one spins on is the one that the front end, or the thread it waits for, needs."""
    environment = dict(os.environ)
    if not environment.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        environment["GOMP_SPINCOUNT"] = "5000"
    return environment
