"""Streams that end before their time (cancelled, late, their client gone) leave no page, row or lease behind."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from tests.integration.conftest import World
from tests.support.client import Client, generation, read
from tests.support.server_process import REPOSITORY, ServerProcess
from tests.support.waiting import eventually

ENDLESS = 15_000
PROMPT = [40, 41, 42, 43, 44, 45, 46]


def check_nothing_is_left(server: ServerProcess, client: Client, world: World) -> None:
    """The engine says so, and a batch as wide as it takes then runs at once and exactly."""
    eventually(server.is_idle, "no sequence, page or lease is left")
    with ThreadPoolExecutor(64) as pool:
        answers = pool.map(client.stream, [generation(PROMPT, "rank-4", 8)] * 64)
    expected = world.oracle.greedy(PROMPT, 8, "rank-4")
    assert all(answer.token_ids == expected for answer in answers)
    eventually(server.is_idle, "no sequence, page or lease is left")


def test_two_hundred_cancelled_streams_leave_nothing(server: ServerProcess, client: Client, world: World) -> None:
    before = server.metrics().get("lorikeet_requests_total", 0)
    for _ in range(4):
        streams = [client.open(generation([3 + i, 5, 8], ["", "rank-8"][i % 2], ENDLESS)) for i in range(50)]
        for stream in streams:
            next(stream)
        for stream in streams:
            stream.cancel()
    eventually(lambda: server.metrics().get("lorikeet_requests_total", 0) == before + 200, "all 200 calls are counted")
    check_nothing_is_left(server, client, world)


def test_a_deadline_ends_a_stream(server: ServerProcess, client: Client, world: World) -> None:
    stream = client.open(generation(PROMPT, "rank-8", ENDLESS), timeout=0.4)
    with pytest.raises(grpc.RpcError) as caught:
        read(stream)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    with pytest.raises(grpc.RpcError) as caught:
        client.generate(generation(PROMPT, "rank-8", ENDLESS), timeout=0.4)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    check_nothing_is_left(server, client, world)


CLIENT_THAT_STAYS = """
import sys
from tests.support.client import Client, generation
streams = [Client(int(sys.argv[1])).open(generation([7, 8, 9], "rank-12", 15_000)) for _ in range(3)]
for stream in streams:
    next(stream)
print("streaming", flush=True)
sys.stdin.read()
"""


def test_a_client_that_is_killed_frees_what_it_held(server: ServerProcess, client: Client, world: World) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", CLIENT_THAT_STAYS, str(server.port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=REPOSITORY,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"streaming\n"
        eventually(lambda: server.metrics()["lorikeet_requests_running"] == 3, "its three streams run")
        process.kill()
    check_nothing_is_left(server, client, world)


def test_a_stop_string_ends_the_sequence_in_the_engine(server: ServerProcess, client: Client, world: World) -> None:
    """The front end finds it; the engine must not go on for the tokens that are left."""
    text = client.generate(generation(PROMPT, "", 60)).text
    stop = next(char for char in text if char.isascii() and char.isprintable())
    answer = client.generate(generation(PROMPT, "", ENDLESS, stop=[stop]))
    assert stop not in answer.text
    check_nothing_is_left(server, client, world)
