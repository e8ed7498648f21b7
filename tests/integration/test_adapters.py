"""Adapters while the server runs: published, moved, broken, in use, shared; and what each error says."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save_file
from torch import Tensor

from adapters.store import Version
from lorikeet.v1 import adapter_pb2
from tests.integration.conftest import World
from tests.support.client import Answer, Client, Failure, failure_of, generation, read
from tests.support.peft_model import ATTENTION, lora_config
from tests.support.server_process import ServerProcess
from tests.support.waiting import eventually

WEIGHTS = "adapter_model.safetensors"
DISK, DEVICE = adapter_pb2.Adapter.RESIDENCY_DISK, adapter_pb2.Adapter.RESIDENCY_DEVICE
PROMPT = [30, 31, 32, 33]


def get(client: Client, adapter_id: str) -> adapter_pb2.Adapter:
    return client.adapters.GetAdapter(adapter_pb2.GetAdapterRequest(adapter_id=adapter_id), timeout=30).adapter


def load(client: Client, adapter_id: str) -> adapter_pb2.Adapter:
    return client.adapters.LoadAdapter(adapter_pb2.LoadAdapterRequest(adapter_id=adapter_id), timeout=30).adapter


def unload(client: Client, adapter_id: str) -> adapter_pb2.Adapter:
    return client.adapters.UnloadAdapter(adapter_pb2.UnloadAdapterRequest(adapter_id=adapter_id), timeout=30).adapter


def failure_in(call: Callable[[], object]) -> Failure:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return failure_of(caught.value)


@pytest.mark.usefixtures("neighbour")
def test_a_publication_during_traffic_is_served_at_once(client: Client, world: World) -> None:
    """New names and new versions; what runs and what is pinned stays on the version it began with."""
    fields = generation(PROMPT, "fresh", 12)
    assert client.refused(fields).reason == "ADAPTER_NOT_FOUND"
    first = world.publish(world.make("fresh-1", lora_config(8, ATTENTION)), "fresh")
    answer = client.generate(fields)
    assert answer.adapter_digest == first.digest
    assert list(answer.token_ids) == world.oracle.greedy(PROMPT, 12, "fresh-1")

    running, so_far = client.open(generation(PROMPT, "fresh", 400)), Answer()
    so_far.add(next(running))
    second = world.publish(world.make("fresh-2", lora_config(16, ATTENTION)), "fresh")
    answer = client.generate(fields)
    assert answer.adapter_digest == second.digest != first.digest
    assert list(answer.token_ids) == world.oracle.greedy(PROMPT, 12, "fresh-2")
    pinned = client.generate(generation(PROMPT, f"fresh@{first.digest}", 12))
    assert pinned.adapter_digest == first.digest
    assert list(pinned.token_ids) == world.oracle.greedy(PROMPT, 12, "fresh-1")
    assert read(running, so_far).token_ids == world.oracle.greedy(PROMPT, 400, "fresh-1")
    assert so_far.digests == {first.digest}


def test_one_content_under_two_names_is_one_adapter(client: Client, world: World, server: ServerProcess) -> None:
    source = world.make("twin", lora_config(6, ATTENTION))
    one, other = world.publish(source, "twin-a"), world.publish(source, "twin-b")
    assert one.digest == other.digest
    answers = [client.generate(generation(PROMPT, name, 8)) for name in ("twin-a", "twin-b")]
    assert {answer.adapter_digest for answer in answers} == {one.digest}
    assert [list(answer.token_ids) for answer in answers] == [world.oracle.greedy(PROMPT, 8, "twin")] * 2
    assert get(client, "twin-b").residency == DEVICE
    assert answers[1].timings.adapter_load_seconds == 0
    unload(client, "twin-b")
    assert get(client, "twin-a").residency == DISK


def test_load_and_unload(client: Client, world: World) -> None:
    world.publish(world.make("moving", lora_config(4, ATTENTION)), "moving")
    assert get(client, "moving").residency == DISK
    assert load(client, "moving").residency == DEVICE
    assert load(client, "moving").residency == DEVICE
    stream, answer = client.open(generation(PROMPT, "moving", 10_000)), Answer()
    answer.add(next(stream))
    failure = failure_in(lambda: unload(client, "moving"))
    assert failure.code == grpc.StatusCode.FAILED_PRECONDITION
    assert failure.reason == "ADAPTER_IN_USE"
    stream.cancel()

    def unloaded() -> bool:
        try:
            return unload(client, "moving").residency == DISK
        except grpc.RpcError:
            return False

    eventually(unloaded, "the cancelled stream lets go of its adapter")
    assert unload(client, "moving").residency == DISK
    assert list(client.generate(generation(PROMPT, "moving", 8)).token_ids) == world.oracle.greedy(PROMPT, 8, "moving")


def test_the_list_has_every_adapter_once_page_by_page(client: Client, world: World) -> None:
    names: list[str] = []
    token = ""
    while True:
        page = client.adapters.ListAdapters(adapter_pb2.ListAdaptersRequest(page_size=3, page_token=token), timeout=30)
        assert len(page.adapters) <= 3
        names += [adapter.name for adapter in page.adapters]
        token = page.next_page_token
        if not token:
            break
    assert names == sorted(set(names))
    assert set(names) == set(world.store.names())
    adapter = get(client, "rank-24-patterns")
    assert adapter.rank == 24
    assert adapter.digest == world.store.resolve("rank-24-patterns").digest
    assert adapter.base_digest == world.base.digest
    assert list(adapter.labels) == ["latest"]
    assert adapter.size_bytes > 0


@pytest.mark.usefixtures("neighbour")
def test_an_adapter_for_another_base_is_refused(client: Client, world: World) -> None:
    digest = "sha256:" + "1" * 64
    world.publish(world.make("foreign", lora_config(4, ATTENTION)), "foreign", base_digest=digest)
    failures = [client.refused(generation(PROMPT, "foreign")), failure_in(lambda: load(client, "foreign"))]
    for failure in failures:
        assert failure.code == grpc.StatusCode.FAILED_PRECONDITION
        assert failure.reason == "ADAPTER_BASE_MISMATCH"
        assert "foreign" in failure.message
        assert digest in failure.message


Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Q_B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


def retensored(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        tensors = load_tensors((directory / WEIGHTS).read_bytes())
        change(tensors)
        save_file(tensors, directory / WEIGHTS)

    return damage


def pickled(directory: Path) -> None:
    tensors = load_tensors((directory / WEIGHTS).read_bytes())
    torch.save(tensors, directory / WEIGHTS)


def truncated(directory: Path) -> None:
    data = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(data[: len(data) - 100])


def truncated_in_its_header(directory: Path) -> None:
    (directory / WEIGHTS).write_bytes((directory / WEIGHTS).read_bytes()[:100])


def without_weights(directory: Path) -> None:
    (directory / WEIGHTS).unlink()


def reconfigured(**values: object) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        path = directory / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage


def not_json(directory: Path) -> None:
    (directory / "adapter_config.json").write_text("{")


# What is done to a published version behind the store's back → what the message must name.
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "wrong-shape": (retensored(lambda tensors: tensors.update({Q_A: torch.ones(4, 63)})), Q_A),
    "wrong-rank": (retensored(lambda tensors: tensors.update({Q_B: torch.ones(64, 5)})), Q_B),
    "missing-tensor": (retensored(lambda tensors: tensors.pop(Q_B)), Q_B),
    "extra-tensor": (retensored(lambda tensors: tensors.update({"stray.weight": torch.ones(2)})), "stray.weight"),
    "extra-layer": (
        retensored(lambda tensors: tensors.update({Q_A.replace(".0.", ".9."): tensors[Q_A].clone()})),
        Q_A.replace(".0.", ".9."),
    ),
    "nan": (retensored(lambda tensors: tensors[Q_A][1].fill_(float("nan"))), Q_A),
    "infinity": (retensored(lambda tensors: tensors[Q_B][1].fill_(float("inf"))), Q_B),
    "pickle": (pickled, WEIGHTS),
    "truncated": (truncated, WEIGHTS),
    "truncated-header": (truncated_in_its_header, WEIGHTS),
    "no-weights": (without_weights, WEIGHTS),
    "dora": (reconfigured(use_dora=True), "use_dora"),
    "other-rank": (reconfigured(r=7), Q_A),
    "not-json": (not_json, "adapter_config.json"),
}


@pytest.fixture
def damaged(world: World, request: pytest.FixtureRequest) -> Version:
    """A version whose files were changed after they were published and checked."""
    kind = request.param
    version = world.publish(world.make(f"damaged-{kind}", lora_config(4, ATTENTION)), f"damaged-{kind}")
    DAMAGE[kind][0](version.path)
    return version


@pytest.mark.usefixtures("neighbour")
@pytest.mark.parametrize("damaged", DAMAGE, indirect=True)
def test_a_damaged_adapter_is_refused_by_the_engine_itself(client: Client, damaged: Version) -> None:
    kind = damaged.name.removeprefix("damaged-")
    for failure in (client.refused(generation(PROMPT, damaged.name)), failure_in(lambda: load(client, damaged.name))):
        assert failure.code == grpc.StatusCode.FAILED_PRECONDITION, failure
        assert failure.reason == ("ADAPTER_UNSUPPORTED" if kind == "dora" else "ADAPTER_INVALID")
        assert DAMAGE[kind][1] in failure.message
    assert get(client, damaged.name).residency == DISK


def test_a_repaired_adapter_is_served(client: Client, world: World) -> None:
    """A refusal is not remembered: publishing the content again puts the damaged version right."""
    source = world.make("repaired", lora_config(4, ATTENTION))
    version = world.publish(source, "repaired")
    truncated(version.path)
    assert client.refused(generation(PROMPT, "repaired")).reason == "ADAPTER_INVALID"
    assert world.publish(source, "repaired").digest == version.digest
    answer = client.generate(generation(PROMPT, "repaired", 8))
    assert list(answer.token_ids) == world.oracle.greedy(PROMPT, 8, "repaired")


def test_a_version_whose_directory_is_gone_is_an_error_of_its_own(client: Client, world: World) -> None:
    version = world.publish(world.make("gone", lora_config(4, ATTENTION)), "gone")
    shutil.rmtree(version.path)
    failure = client.refused(generation(PROMPT, "gone"))
    assert failure.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.FAILED_PRECONDITION)
    assert failure.reason in ("STORE_UNAVAILABLE", "ADAPTER_INVALID")
    world.store.remove("gone")
