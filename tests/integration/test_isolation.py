"""What others do does not change a stream's tokens."""

from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from tests.integration.conftest import World
from tests.support.client import Client, generation, read
from tests.support.peft_model import ADAPTERS

ENDLESS = 15_000


@pytest.mark.usefixtures("neighbour")
def test_two_hundred_cancelled_streams_do_not_disturb_a_neighbour(client: Client) -> None:
    names = ["", *ADAPTERS]
    streams = [client.open(generation([2 + i, 3, 4], names[i % 9], ENDLESS)) for i in range(200)]
    for i, stream in enumerate(streams):
        if i % 3 == 0:  # some run, some wait in the queue
            stream.cancel()
    for i, stream in enumerate(streams):
        if i % 3 == 1 and i < 60:
            next(stream)
        stream.cancel()
    for stream in streams:
        with pytest.raises(grpc.RpcError):
            read(stream)
        assert stream.code() == grpc.StatusCode.CANCELLED


@pytest.mark.usefixtures("neighbour")
def test_streams_that_come_and_go_do_not_change_each_other(client: Client, world: World) -> None:
    """Three times as many requests as run at once, of many lengths, over every adapter and the base."""
    names = [None, *ADAPTERS]
    requests = [([60 + i % 5, 7, 8], names[i % 9], 1 + (i * 17) % 90) for i in range(192)]
    with ThreadPoolExecutor(len(requests)) as pool:
        answers = list(pool.map(lambda r: client.stream(generation(r[0], r[1] or "", r[2])), requests))
    longest = {(tuple(prompt), name): [] for prompt, name, _ in requests}
    for prompt, name in longest:
        longest[prompt, name] = world.oracle.greedy(prompt, 90, name)
    for (prompt, name, length), answer in zip(requests, answers, strict=True):
        assert answer.token_ids == longest[tuple(prompt), name][:length]
