"""One world for the folder: a tiny base, a store with PEFT's adapters, a server, a client, and the oracle."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from adapters.store import AdapterStore, Version
from server.base.resolve import BaseModel, resolve_base
from tests.support.client import Answer, Client, generation
from tests.support.peft_model import ADAPTERS, LoraConfig, PeftOracle
from tests.support.server_process import ServerProcess
from tests.support.tiny_base import save_tiny_base

NEIGHBOUR_PROMPT = [21, 22, 23, 24, 25]
NEIGHBOUR_TOKENS = 200


@dataclass(slots=True)
class World:
    """What the servers of this folder serve, and how to add to it."""

    base: BaseModel
    store: AdapterStore
    oracle: PeftOracle
    num_made: int = 0

    def make(self, name: str, config: LoraConfig) -> Path:
        """A new random adapter, known to the oracle under `name`, not published."""
        self.num_made += 1
        return self.oracle.make(name, config, seed=self.num_made)

    def publish(self, source: Path, name: str, base_digest: str | None = None) -> Version:
        """`base_digest` None: for the base that is served."""
        return self.store.publish(
            source,
            name,
            base_digest=base_digest or self.base.digest,
            base_name=self.base.name,
            linears=self.base.spec.linears(),
        )


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    directory = tmp_path_factory.mktemp("world")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORIKEET_CACHE", str(directory / "cache"))
        model = save_tiny_base(directory / "tiny")
        base = resolve_base(str(directory / "tiny"))
        made = World(base, AdapterStore(directory / "store"), PeftOracle(model, directory / "peft"))
        for name, config in ADAPTERS.items():
            made.publish(made.make(name, config), name)
        yield made
    torch.set_num_threads(threads)


StartServer = Callable[..., ServerProcess]


@pytest.fixture(scope="session")
def start_server(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartServer]:
    """Starts a server of the world with these options; every one of them ends with the folder, if not before."""
    servers: list[ServerProcess] = []

    def start(*options: str) -> ServerProcess:
        directory = tmp_path_factory.mktemp("server")
        servers.append(ServerProcess.start(directory, world.base.path, world.store.root, *options))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()
        print(
            f"--- {server.log}", server.log.read_text(errors="replace")[-4000:], sep="\n"
        )  # pytest shows it on failure


@pytest.fixture(scope="session")
def server(start_server: StartServer) -> ServerProcess:
    """The server that most tests share: none may leave it other than it was."""
    return start_server("--kv-cache-memory", "32MiB", "--adapter-memory", "16MiB")


@pytest.fixture(scope="session")
def client(server: ServerProcess) -> Iterator[Client]:
    client = Client(server.port)
    yield client
    client.close()


class Neighbour:
    """Someone else's streams, one after the other, each of which must have the tokens it would have alone."""

    def __init__(self, client: Client, expected: list[int]) -> None:
        self._client = client
        self._expected = expected
        self._begun, self._stopping = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.num_streams = 0
        self.error: BaseException | None = None

    def start(self) -> None:
        """Returns when the first token of the first stream is there."""
        self._thread.start()
        assert self._begun.wait(timeout=60), self.error

    def stop(self) -> None:
        """Returns when the stream in progress has ended."""
        self._stopping.set()
        self._thread.join(timeout=60)

    def check(self) -> None:
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                answer = Answer()
                for piece in self._client.open(generation(NEIGHBOUR_PROMPT, "rank-8", NEIGHBOUR_TOKENS)):
                    answer.add(piece)
                    self._begun.set()
                assert answer.last is not None, "the neighbour's stream did not end"
                assert answer.token_ids == self._expected, "the neighbour's tokens have changed"
                self.num_streams += 1
        except BaseException as error:  # noqa: BLE001 (handed to the test's thread)
            self.error = error


@pytest.fixture(scope="module")
def neighbours(client: Client, world: World) -> Iterator[Neighbour]:
    expected = world.oracle.greedy(NEIGHBOUR_PROMPT, NEIGHBOUR_TOKENS, "rank-8")
    neighbour = Neighbour(client, expected)
    neighbour.start()
    yield neighbour
    neighbour.stop()
    neighbour.check()
    assert neighbour.num_streams > 0


@pytest.fixture
def neighbour(neighbours: Neighbour) -> Iterator[None]:
    """Someone else's stream runs during the test and must not notice."""
    neighbours.check()
    yield
    neighbours.check()
