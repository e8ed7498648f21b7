"""More adapters and tokens than memory holds: all are served, exactly, in turn; nothing waits for ever or is lost."""

import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from tests.integration.conftest import StartServer, World
from tests.support.client import Answer, Client, generation
from tests.support.peft_model import ADAPTERS
from tests.support.server_process import ServerProcess
from tests.support.tiny_base import KV_BYTES_PER_TOKEN
from tests.support.waiting import eventually

LARGEST = max(ADAPTERS, key=lambda name: ADAPTERS[name].r)
PROMPTS = [[60 + i] * (1 + 40 * i) for i in range(4)]
NUM_TOKENS = 100

Key = tuple[int, str | None]


@pytest.fixture(scope="module")
def cramped(start_server: StartServer) -> ServerProcess:
    """Room for 72 ranks of the 208 of all adapters, and for 400 tokens of the six sequences that may run."""
    kv_bytes = str(400 * KV_BYTES_PER_TOKEN)
    return start_server(
        "--kv-cache-memory", kv_bytes, "--adapter-memory", "600KiB", "--max-num-seqs", "6", "--max-waiting", "400"
    )


@pytest.fixture
def cramped_client(cramped: ServerProcess) -> Iterator[Client]:
    client = Client(cramped.port)
    yield client
    client.close()


@pytest.fixture(scope="module")
def expected(world: World) -> dict[Key, list[int]]:
    keys = [(i, name) for i in range(len(PROMPTS)) for name in (None, *ADAPTERS)]
    return {(i, name): world.oracle.greedy(PROMPTS[i], NUM_TOKENS, name) for i, name in keys}


def test_streams_of_every_kind(cramped: ServerProcess, cramped_client: Client, expected: dict[Key, list[int]]) -> None:
    """A third is cancelled, some before their adapter is there; the rest end, with the tokens they have alone."""

    def run(seed: int) -> bool:
        rng = random.Random(seed)
        key = rng.choice(list(expected))
        length, cancel_after = rng.randrange(1, NUM_TOKENS + 1), rng.choice([None, None, None, 0, 1, 30])
        stream, answer = cramped_client.open(generation(PROMPTS[key[0]], key[1] or "", length)), Answer()
        try:
            if cancel_after == 0:
                stream.cancel()
            for piece in stream:
                answer.add(piece)
                if cancel_after is not None and len(answer.token_ids) >= cancel_after:
                    stream.cancel()
        except grpc.RpcError:
            if cancel_after is None:
                raise
        else:
            assert len(answer.token_ids) == length
        assert answer.token_ids == expected[key][: len(answer.token_ids)]
        return answer.last is not None

    with ThreadPoolExecutor(50) as pool:
        ended = list(pool.map(run, range(200)))
    assert 100 <= sum(ended) < 200
    for name in ("adapter_evictions", "preemptions"):
        eventually(lambda name=name: cramped.metrics()[f"lorikeet_{name}_total"] > 0, f"{name} are counted")
    eventually(cramped.is_idle, "no page, row or lease is left")


def test_busy_adapters_cannot_keep_another_out(cramped_client: Client, expected: dict[Key, list[int]]) -> None:
    """Their streams overlap, so that there is always one of each; together with the newcomer they do not fit."""
    stop = threading.Event()

    def keep_busy(name: str) -> int:
        num_streams = 0
        while not stop.is_set():
            cramped_client.stream(generation(PROMPTS[0], name, 60))
            num_streams += 1
        return num_streams

    busy = ["rank-8", "rank-24-patterns", "rank-32-last-layer"]
    with ThreadPoolExecutor(6) as pool:
        loops = [pool.submit(keep_busy, name) for name in busy * 2]
        try:
            for name in (LARGEST, "rank-48", "rank-16-rslora"):
                answer = cramped_client.stream(generation(PROMPTS[1], name, 20))
                assert answer.token_ids == expected[1, name][:20]
        finally:
            stop.set()
        assert all(loop.result() > 0 for loop in loops)


def test_an_adapter_that_can_never_fit_is_refused(start_server: StartServer) -> None:
    server = start_server("--kv-cache-memory", "4MiB", "--adapter-memory", "300KiB")
    client = Client(server.port)
    failure = client.refused(generation(PROMPTS[0], LARGEST))
    assert failure.code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert failure.reason == "ADAPTER_TOO_LARGE"
    assert "--adapter-memory" in failure.message
    assert len(client.stream(generation(PROMPTS[0], "rank-4", 3)).token_ids) == 3
    client.close()
    assert server.stop() == 0
