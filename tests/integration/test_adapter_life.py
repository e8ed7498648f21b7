"""Pins, drains, progress and moves of labels on a live server, and what its page says of them."""

import threading
import time
from typing import Any

import grpc
import pytest
from prometheus_client import Metric

from lorikeet.v1 import adapter_pb2
from tests.integration.conftest import StartServer, World
from tests.integration.test_metrics import page, value
from tests.support.client import Client, failure_of, generation
from tests.support.peft_model import ATTENTION, lora_config
from tests.support.server_process import ServerProcess
from tests.support.waiting import eventually

Adapter, Progress = adapter_pb2.Adapter, adapter_pb2.Progress
PROMPT = [40, 41, 42]


def get(client: Client, adapter_id: str) -> Adapter:
    return client.adapters.GetAdapter(adapter_pb2.GetAdapterRequest(adapter_id=adapter_id), timeout=30).adapter


@pytest.fixture(scope="module")
def small(start_server: StartServer) -> ServerProcess:
    """A server whose adapter memory holds a few of rank 8."""
    return start_server("--kv-cache-memory", "16MiB", "--adapter-memory", "256KiB")


@pytest.fixture(scope="module")
def crowd(world: World) -> list[str]:
    """More adapters than the memory of `small` holds."""
    names = [f"crowd-{index}" for index in range(12)]
    for name in names:
        world.publish(world.make(name, lora_config(8, ATTENTION)), name)
    return names


def test_a_pinned_adapter_stays_on_the_device_while_others_come_and_go(
    small: ServerProcess, crowd: list[str], world: World
) -> None:
    client = Client(small.port)
    first, *others = crowd
    pinned = client.adapters.PinAdapter(adapter_pb2.PinAdapterRequest(adapter_id=first), timeout=30).adapter
    assert (pinned.pinned, pinned.residency) == (True, Adapter.RESIDENCY_DEVICE)
    for _ in range(2):
        for name in others:
            answer = client.generate(generation(PROMPT, name, 4))
            assert list(answer.token_ids) == world.oracle.greedy(PROMPT, 4, name)
    now = get(client, first)
    assert (now.pinned, now.residency) == (True, Adapter.RESIDENCY_DEVICE)
    assert {tier.residency for tier in now.tiers} >= {Adapter.RESIDENCY_DEVICE}
    assert all(tier.size_bytes > 0 for tier in now.tiers)
    client.adapters.UnpinAdapter(adapter_pb2.UnpinAdapterRequest(adapter_id=first), timeout=30)
    for name in others:
        client.generate(generation(PROMPT, name, 4))
    assert get(client, first).residency != Adapter.RESIDENCY_DEVICE
    answer = client.generate(generation(PROMPT, first, 4))
    assert list(answer.token_ids) == world.oracle.greedy(PROMPT, 4, first)
    client.close()


def test_the_page_counts_adapters_by_tier_and_tells_routers(small: ServerProcess, crowd: list[str]) -> None:
    client = Client(small.port)
    for name in crowd:
        client.generate(generation(PROMPT, name, 4))
    last = crowd[-1]
    eventually(lambda: value(small, "lorikeet_adapter_evictions_total", tier="device") > 0, "some had to go")
    assert value(small, "lorikeet_adapter_loads_total", tier="device") >= len(crowd)
    assert value(small, "lorikeet_adapter_cache_misses_total", tier="device") > 0
    before = value(small, "lorikeet_adapter_cache_hits_total", tier="device")
    client.generate(generation(PROMPT, last, 4))
    eventually(lambda: value(small, "lorikeet_adapter_cache_hits_total", tier="device") > before, "a hit is counted")
    families = page(small)
    loads = {(s.labels["from"], s.labels["to"]) for s in samples(families["lorikeet_adapter_load_seconds"], "_count")}
    assert loads == {("disk", "host"), ("host", "device")}
    assert 0 < value(small, "lorikeet_adapter_bytes", tier="device") <= 256 << 10
    assert value(small, "lorikeet_store_up") == 1
    [info] = families["vllm:lora_requests_info"].samples
    running = info.labels["running_lora_adapters"].split(",")
    assert last in running
    assert len(running) == value(small, "lorikeet_adapters_loaded", tier="device") <= int(info.labels["max_lora"])
    assert abs(time.time() - info.value) < 60
    client.close()


def samples(family: Metric, suffix: str) -> list[Any]:
    return [sample for sample in family.samples if sample.name.endswith(suffix)]


def test_an_unload_that_drains_waits_for_its_streams(client: Client, world: World) -> None:
    world.publish(world.make("drained", lora_config(8, ATTENTION)), "drained")
    load = client.adapters.StreamLoadAdapter(adapter_pb2.StreamLoadAdapterRequest(adapter_id="drained"), timeout=30)
    *told, last = list(load)
    stages = [event.progress.stage for event in told]
    assert stages == sorted(stages), "the stages are in their order; one that is over in a moment is not told"
    assert last.adapter.residency == Adapter.RESIDENCY_DEVICE
    stream = client.open(generation(PROMPT, "drained", 14_000))
    next(stream)
    refusing = adapter_pb2.UnloadAdapterRequest(adapter_id="drained")
    with pytest.raises(grpc.RpcError) as caught:
        client.adapters.UnloadAdapter(refusing, timeout=30)
    assert failure_of(caught.value).reason == "ADAPTER_IN_USE"
    draining = client.adapters.StreamUnloadAdapter(
        adapter_pb2.StreamUnloadAdapterRequest(adapter_id="drained", mode=adapter_pb2.UNLOAD_MODE_DRAIN), timeout=60
    )
    assert next(draining).progress.stage == Progress.STAGE_DRAINING
    reader = threading.Thread(target=lambda: [next(stream) for _ in range(3)])
    reader.start()  # it runs on meanwhile
    reader.join(timeout=60)
    stream.cancel()
    last = next(draining)
    assert last.adapter.residency == Adapter.RESIDENCY_DISK
    assert list(draining) == []


def test_labels_move_over_the_wire(client: Client, world: World) -> None:
    old, new = (world.publish(world.make(f"moved-{i}", lora_config(4, ATTENTION)), "moved").digest for i in range(2))
    fields = generation(PROMPT, "moved", 8)
    assert client.generate(fields).adapter_digest == new
    move = adapter_pb2.MoveAdapterLabelRequest(name="moved", label="latest", digest=old, expected_digest=new)
    assert client.adapters.MoveAdapterLabel(move, timeout=30).adapter.digest == old
    answer = client.generate(fields)
    assert answer.adapter_digest == old
    assert list(answer.token_ids) == world.oracle.greedy(PROMPT, 8, "moved-0")
    with pytest.raises(grpc.RpcError) as caught:
        client.adapters.MoveAdapterLabel(move, timeout=30)
    assert (failure_of(caught.value).code, failure_of(caught.value).reason) == (
        grpc.StatusCode.ABORTED,
        "LABEL_MOVED",
    )
    rollback = adapter_pb2.RollbackAdapterLabelRequest(name="moved")
    assert client.adapters.RollbackAdapterLabel(rollback, timeout=30).adapter.digest == new
    assert client.generate(fields).adapter_digest == new
    deleted = client.adapters.DeleteAdapter(adapter_pb2.DeleteAdapterRequest(name="moved"), timeout=30)
    assert set(deleted.digests) == {old, new}
    assert client.refused(fields).reason == "ADAPTER_NOT_FOUND"
    assert set(world.store.gc().removed) >= {old, new}
