"""A live server whose adapters are in a bucket on a real S3 server, which goes away and comes back."""

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from adapters.bucket import open_bucket
from adapters.remote import RemoteStore
from adapters.versions import Version
from tests.adapters.s3_server import S3Server
from tests.integration.conftest import World
from tests.support.client import Client, Failure, failure_of, generation
from tests.support.peft_model import ATTENTION, lora_config
from tests.support.server_process import ServerProcess
from tests.support.waiting import eventually

LOCATION = "s3://integration/adapters"
PROMPT = [50, 51, 52]


@pytest.fixture(scope="module")
def s3_server() -> Iterator[S3Server]:
    server = S3Server()
    server.make_bucket("integration")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def publisher(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RemoteStore]:
    """The store as the machine has it that publishes; its environment is the servers', too."""
    with pytest.MonkeyPatch.context() as patch:
        s3_server.tell(patch)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield RemoteStore(open_bucket(LOCATION), tmp_path_factory.mktemp("publisher"))


@pytest.fixture(scope="module")
def remote_server(
    publisher: RemoteStore, world: World, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    directory = tmp_path_factory.mktemp("server")
    server = ServerProcess.start(directory, world.base.path, LOCATION, "--kv-cache-memory", "16MiB")
    yield server
    server.stop()
    print(server.log.read_text(errors="replace")[-4000:])


def publish(store: RemoteStore, world: World, source: Path, name: str) -> Version:
    base = world.base
    return store.publish(
        source, name, base_digest=base.digest, base_name=base.name, linears=base.spec.linears(), label="latest"
    )


def refusal(client: Client, adapter: str) -> Failure | None:
    """What a generation is refused with; None if it is answered."""
    try:
        client.generate(generation(PROMPT, adapter, 8))
    except grpc.RpcError as error:
        return failure_of(error)
    return None


def test_what_is_here_is_served_while_the_bucket_is_away(
    remote_server: ServerProcess, publisher: RemoteStore, s3_server: S3Server, world: World
) -> None:
    contents = {name: world.make(f"remote-{name}", lora_config(8, ATTENTION)) for name in ("warm", "cold", "next")}
    warm, cold = (publish(publisher, world, contents[name], name) for name in ("warm", "cold"))
    client = Client(remote_server.port)
    eventually(lambda: refusal(client, "warm") is None, "the bucket answers in time")
    answer = client.generate(generation(PROMPT, "warm", 8))
    assert answer.adapter_digest == warm.digest
    assert list(answer.token_ids) == world.oracle.greedy(PROMPT, 8, "remote-warm")

    s3_server.stop()
    try:
        for _ in range(3):
            answer = client.generate(generation(PROMPT, "warm", 8))
            assert answer.adapter_digest == warm.digest
            assert list(answer.token_ids) == world.oracle.greedy(PROMPT, 8, "remote-warm")
        failure = refusal(client, "cold")
        assert failure is not None
        assert (failure.code, failure.reason) == (grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE")
        assert failure.retry_delay is not None
        assert failure.retry_delay > 0
        assert list(client.generate(generation(PROMPT, "", 8)).token_ids), "the base needs no store"
    finally:
        s3_server.start()

    eventually(lambda: refusal(client, "cold") is None, "the bucket is back")
    answer = client.generate(generation(PROMPT, "cold", 8))
    assert answer.adapter_digest == cold.digest
    assert list(answer.token_ids) == world.oracle.greedy(PROMPT, 8, "remote-cold")

    moved = publish(publisher, world, contents["next"], "warm")

    def is_next() -> bool:
        return client.generate(generation(PROMPT, "warm", 8)).adapter_digest == moved.digest

    eventually(is_next, "the label has moved in the bucket")
    answer = client.generate(generation(PROMPT, "warm", 8))
    assert list(answer.token_ids) == world.oracle.greedy(PROMPT, 8, "remote-next")
    eventually(lambda: refusal(client, f"warm@{warm.digest}") is None, "the bucket answers in time")
    pinned = client.generate(generation(PROMPT, f"warm@{warm.digest}", 8))
    assert list(pinned.token_ids) == world.oracle.greedy(PROMPT, 8, "remote-warm")
    client.close()
