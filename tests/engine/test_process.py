"""The engine's process by itself."""

import contextlib
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import msgspec

from server.config import EngineConfig
from server.frontend.engine_client import ENGINE_COMMAND
from tests.engine.inprocess import BASE_DIGEST
from tests.model.tiny import save_tiny

# A front end that ends as soon as its engine has begun to load the base.
FRONT_END = """
import subprocess, sys
engine = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
engine.stdin.write(sys.stdin.buffer.readline())
engine.stdin.close()
next(line for line in engine.stderr if b"loading" in line)
print(engine.pid, flush=True)
"""


def test_an_engine_ends_whose_front_end_ended_while_the_base_was_loaded(tmp_path: Path) -> None:
    """It would hold the device's memory, and nobody could reach it."""
    save_tiny("llama", tmp_path)
    config = EngineConfig(
        base_path=str(tmp_path), base_digest=BASE_DIGEST, kv_cache_bytes=1 << 20, adapter_cache_bytes=8 << 20
    )
    command = [sys.executable, "-c", FRONT_END, *ENGINE_COMMAND, "--socket", f"ipc://{tmp_path}/engine"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as front_end:
        assert front_end.stdin is not None
        assert front_end.stdout is not None
        front_end.stdin.write(msgspec.json.encode(config) + b"\n")
        front_end.stdin.close()
        engine = int(front_end.stdout.readline())
        try:
            ended, _, _ = select.select([front_end.stdout], [], [], 200)
            assert ended, "the engine has the pipe open still"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(engine, signal.SIGKILL)
