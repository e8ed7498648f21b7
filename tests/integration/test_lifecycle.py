"""A server's life: full queue, little memory, lost engine, orderly stop, and starts that cannot succeed."""

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2

from lorikeet.v1 import server_pb2
from tests.integration.conftest import StartServer, World
from tests.support.client import Answer, Client, failure_of, generation, read
from tests.support.server_process import REPOSITORY, ServerProcess, command
from tests.support.tiny_base import KV_BYTES_PER_TOKEN
from tests.support.waiting import eventually

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
PROMPT = [50, 51, 52, 53]
KV_TOKENS = 640


@pytest.fixture(scope="module")
def narrow(start_server: StartServer) -> ServerProcess:
    """Two run, two wait, and the KV cache holds less than two long answers."""
    memory = str(KV_TOKENS * KV_BYTES_PER_TOKEN)
    return start_server(
        "--max-num-seqs", "2", "--max-waiting", "2", "--kv-cache-memory", memory, "--adapter-memory", "4MiB"
    )


@pytest.fixture
def narrow_client(narrow: ServerProcess) -> Iterator[Client]:
    client = Client(narrow.port)
    yield client
    client.close()


@contextmanager
def stopped(process: psutil.Process) -> Iterator[None]:
    """Stands still during the block."""
    process.suspend()
    try:
        yield
    finally:
        process.resume()


def test_a_full_queue_refuses_at_once_and_says_when_to_retry(narrow: ServerProcess, narrow_client: Client) -> None:
    client = narrow_client
    streams = [client.open(generation(PROMPT, "", 300)) for _ in range(2)]
    answers = [Answer(), Answer()]
    for stream, answer in zip(streams, answers, strict=True):
        answer.add(next(stream))
    with ThreadPoolExecutor(24) as pool, stopped(narrow.engine()):
        futures = [pool.submit(client.stream, generation(PROMPT, "", 2)) for _ in range(24)]  # four run or wait
        eventually(lambda: sum(future.done() for future in futures) >= 20, "all that are too many have ended")
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in errors:
        assert isinstance(error, grpc.RpcError)
        failure = failure_of(error)
        assert failure.code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert failure.reason == "SERVER_BUSY"
        assert failure.retry_delay is not None
        assert failure.retry_delay > 0
    for stream, answer in zip(streams, answers, strict=True):
        assert len(read(stream, answer).token_ids) == 300
    assert len(client.generate(generation(PROMPT, "", 2)).token_ids) == 2
    eventually(narrow.is_idle, "nothing is left")


def test_sequences_that_outgrow_the_cache_are_computed_again_exactly(
    narrow: ServerProcess, narrow_client: Client, world: World
) -> None:
    """Greedy ones as the oracle's, seeded ones as alone, though some are preempted on the way."""
    limits = narrow_client.server.GetServerInfo(server_pb2.GetServerInfoRequest()).limits
    assert limits.kv_cache_tokens == KV_TOKENS
    greedy = generation(PROMPT, "rank-8", 450)
    drawn = generation(PROMPT, "rank-4", 450, temperature=0.8, seed=5, frequency_penalty=0.1, logprobs=1)
    alone = narrow_client.generate(drawn)
    with ThreadPoolExecutor(4) as pool:
        requests = [greedy, drawn, greedy, drawn]
        answers = list(pool.map(narrow_client.stream, requests))
    expected = world.oracle.greedy(PROMPT, 450, "rank-8")
    assert answers[0].token_ids == answers[2].token_ids == expected
    assert answers[1].token_ids == answers[3].token_ids == list(alone.token_ids)
    eventually(lambda: narrow.metrics()["lorikeet_preemptions_total"] > 0, "some were preempted")
    eventually(narrow.is_idle, "nothing is left")


def watch_health(client: Client) -> list[int]:
    """A list that grows with every state that grpc.health.v1's Watch reports."""
    states: list[int] = []
    stream = client.health.Watch(health_pb2.HealthCheckRequest())

    def follow() -> None:
        try:
            for response in stream:
                states.append(response.status)
        except grpc.RpcError:
            pass

    threading.Thread(target=follow, daemon=True).start()
    return states


def test_sigterm_lets_running_calls_finish_and_refuses_new_ones(start_server: StartServer, world: World) -> None:
    server = start_server("--kv-cache-memory", "8MiB", "--adapter-memory", "4MiB", "--grace", "120")
    client, watcher = Client(server.port), Client(server.port)
    states = watch_health(watcher)
    eventually(lambda: states == [health_pb2.HealthCheckResponse.SERVING], "the health watcher hears SERVING")
    num_tokens = 3000
    stream, answer = client.open(generation(PROMPT, "rank-8", num_tokens)), Answer()
    answer.add(next(stream))
    engine = server.engine()
    with stopped(engine):  # so that the call runs on for as long as the rest takes
        server.terminate()
        eventually(lambda: states[-1] == health_pb2.HealthCheckResponse.NOT_SERVING, "the watcher hears NOT_SERVING")
        with pytest.raises(grpc.RpcError) as caught:
            client.generate(generation(PROMPT, "", 2))
        failure = failure_of(caught.value)
        assert failure.code == UNAVAILABLE
        assert failure.reason == "SHUTTING_DOWN"
        assert client.server.GetServerInfo(server_pb2.GetServerInfoRequest()).draining
        assert server.metrics()["lorikeet_draining"] == 1
    assert len(read(stream, answer).token_ids) == num_tokens
    assert answer.token_ids[:200] == world.oracle.greedy(PROMPT, 200, "rank-8")
    assert server.process.wait(timeout=30) == 0
    assert not psutil.pid_exists(engine.pid)
    client.close()
    watcher.close()


def test_the_grace_period_ends(start_server: StartServer) -> None:
    server = start_server("--kv-cache-memory", "16MiB", "--adapter-memory", "4MiB", "--grace", "0.5")
    client = Client(server.port)
    stream = client.open(generation(PROMPT, "", 15_000))
    next(stream)
    server.terminate()
    with pytest.raises(grpc.RpcError) as caught:
        read(stream)
    assert caught.value.code() == UNAVAILABLE
    assert server.process.wait(timeout=30) == 0
    client.close()


def test_a_killed_engine_is_started_again(start_server: StartServer, world: World) -> None:
    server = start_server("--kv-cache-memory", "16MiB", "--adapter-memory", "4MiB")
    client = Client(server.port)
    states = watch_health(client)
    streams = [client.open(generation(PROMPT, adapter, 15_000)) for adapter in ("", "rank-8", "rank-4")]
    for stream in streams:
        next(stream)
    eventually(lambda: states, "the health watcher hears SERVING")
    server.engine().kill()
    for stream in streams:
        with pytest.raises(grpc.RpcError) as caught:
            read(stream)
        failure = failure_of(caught.value)
        assert failure.code == UNAVAILABLE
        assert failure.reason == "ENGINE_UNAVAILABLE"
    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    eventually(lambda: states == [serving, not_serving, serving], "health goes down and comes up again")
    answer = client.generate(generation(PROMPT, "rank-8", 20))
    assert list(answer.token_ids) == world.oracle.greedy(PROMPT, 20, "rank-8")
    assert server.metrics()["lorikeet_engine_restarts_total"] == 1
    eventually(server.is_idle, "the streams of the lost engine are not counted")
    client.close()
    assert server.stop() == 0


def test_an_engine_does_not_outlive_its_server(start_server: StartServer) -> None:
    server = start_server("--kv-cache-memory", "4MiB", "--adapter-memory", "4MiB")
    engine = server.engine()
    server.process.kill()
    server.process.wait()
    engine.wait(timeout=30)


def refused_start(*arguments: str) -> str:
    """The one line on stderr of a `lorikeet serve` that must not start."""
    process = subprocess.run(
        command("serve", "--json", "--device", "cpu", "--log-level", "error", *arguments),
        capture_output=True,
        cwd=REPOSITORY,
        timeout=120,
        check=False,
    )
    lines = process.stderr.decode().splitlines()
    assert process.returncode not in (0, 1), lines
    assert process.stdout == b""
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, lines
    assert "Traceback" not in process.stderr.decode()
    return errors[0]


LATE_LOG = """
import sys, time
from server import logs
from server.cli.app import main
write = logs._write
logs._write = lambda *line: (time.sleep(0.2), write(*line))
sys.exit(main(sys.argv[1:]))
"""


def test_what_was_wrong_is_the_last_line_though_the_log_is_late(world: World) -> None:
    arguments = ("serve", "--base", str(world.base.path), "--store", str(world.store.root), "--device", "cpu")
    refused = ("--port", "0", "--metrics-port", "0", "--max-batch-tokens", "1")
    process = subprocess.run(
        [sys.executable, "-c", LATE_LOG, *arguments, *refused],
        capture_output=True,
        cwd=REPOSITORY,
        timeout=120,
        check=False,
    )
    *log, last = process.stderr.decode().splitlines()
    assert any("loading tiny" in line for line in log)
    assert last.startswith("error: ")


@pytest.mark.parametrize("option", ["--port", "--metrics-port"])
def test_a_port_in_use_is_named(world: World, option: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        other = "--metrics-port" if option == "--port" else "--port"
        message = refused_start(
            "--base", str(world.base.path), "--store", str(world.store.root), option, port, other, "0"
        )
    assert port in message
    assert "in use" in message


def base_with(directory: Path, config: dict[str, object], *files: tuple[str, bytes]) -> Path:
    (directory / "config.json").write_text(json.dumps(config))
    for name, data in files:
        (directory / name).write_bytes(data)
    return directory


def test_a_base_that_cannot_be_loaded_is_named(world: World, tmp_path: Path) -> None:
    config = json.loads((world.base.path / "config.json").read_text())
    ports = ("--port", "0", "--metrics-port", "0", "--store", str(world.store.root))
    without_weights = base_with(tmp_path, config)
    message = refused_start("--base", str(without_weights), *ports)
    assert str(without_weights) in message
    assert "model.safetensors" in message
    base_with(tmp_path, config | {"model_type": "gpt2"})
    assert "gpt2" in refused_start("--base", str(tmp_path), *ports)
    missing = str(tmp_path / "nowhere" / "at" / "all")
    assert missing in refused_start("--base", missing, *ports)
    shard = (world.base.path / "model.safetensors").read_bytes()
    base_with(tmp_path, config, ("model.safetensors", shard[:-100]))
    assert "model.safetensors" in refused_start("--base", str(tmp_path), *ports)
    base_with(tmp_path, config | {"num_hidden_layers": 3}, ("model.safetensors", shard))
    (tmp_path / "tokenizer.json").write_bytes((world.base.path / "tokenizer.json").read_bytes())
    assert "model.layers.2" in refused_start("--base", str(tmp_path), *ports)  # the engine finds this one
