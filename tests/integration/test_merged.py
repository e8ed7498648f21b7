"""A live server with an adapter in its base: merged by a call and at the start, under traffic, after a crash."""

import threading
from collections.abc import Iterator

import grpc
import pytest

from lorikeet.v1 import adapter_pb2, common_pb2, server_pb2
from tests.integration.conftest import StartServer, World
from tests.integration.test_metrics import value
from tests.support.client import Client, failure_of, generation
from tests.support.server_process import ServerProcess
from tests.support.waiting import eventually

PROMPT = [40, 41, 42, 43]
Progress = adapter_pb2.Progress
OPTIONS = ("--kv-cache-memory", "16MiB", "--adapter-memory", "8MiB")


def merged_digest(client: Client) -> str:
    info = client.server.GetServerInfo(server_pb2.GetServerInfoRequest(), timeout=30)
    return info.merged_adapter_digest


def check(client: Client, world: World, adapter: str, serving: common_pb2.Serving, num_tokens: int = 24) -> None:
    """Both ways of asking give PEFT's tokens, and say how they came about."""
    answer = client.generate(generation(PROMPT, adapter, num_tokens))
    assert list(answer.token_ids) == world.oracle.greedy(PROMPT, num_tokens, adapter or None)
    assert answer.serving == serving
    pieces = list(client.open(generation(PROMPT, adapter, 3)))
    assert {piece.serving for piece in pieces} == {serving}


@pytest.fixture(scope="module")
def compensating(start_server: StartServer) -> ServerProcess:
    return start_server(*OPTIONS, "--merged-others", "compensate")


@pytest.fixture
def client(compensating: ServerProcess) -> Iterator[Client]:
    client = Client(compensating.port)
    yield client
    client.close()


def test_merging_and_unmerging_under_traffic_changes_no_token(
    compensating: ServerProcess, client: Client, world: World
) -> None:
    names = ["", "rank-4", "rank-8", "rank-24-patterns"]
    wanted = {name: world.oracle.greedy(PROMPT, 40, name or None) for name in names}
    stop, faults, counts = threading.Event(), list[str](), dict.fromkeys(names, 0)

    def ask(name: str) -> None:
        mine = Client(compensating.port)
        while not stop.is_set() and not faults:
            answer = mine.generate(generation(PROMPT, name, 40))
            counts[name] += 1
            if list(answer.token_ids) != wanted[name]:
                faults.append(f"{name}: {list(answer.token_ids)} when {answer.serving}")
        mine.close()

    threads = [threading.Thread(target=ask, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    try:
        for name in ("rank-8", "rank-24-patterns"):
            request = adapter_pb2.StreamMergeAdapterRequest(adapter_id=name)
            *told, last = client.adapters.StreamMergeAdapter(request, timeout=60)
            assert told[-1].progress.stage == Progress.STAGE_MERGING
            assert told[-1].progress.done_bytes == told[-1].progress.total_bytes == last.report.held_bytes
            assert last.adapter.merged
            assert last.report.kl < 1e-6
            assert merged_digest(client) == last.adapter.digest
            assert value(compensating, "lorikeet_adapter_merged", adapter=name) == 1
            before = dict(counts)
            eventually(lambda before=before: all(counts[n] > before[n] for n in names) or faults, "all are served")
            check(client, world, name, common_pb2.SERVING_MERGED)
            check(client, world, "rank-16-rslora", common_pb2.SERVING_COMPENSATED)
            back = adapter_pb2.UnmergeAdapterRequest(adapter_id=name)
            assert not client.adapters.UnmergeAdapter(back, timeout=60).adapter.merged
            assert merged_digest(client) == ""
            check(client, world, name, common_pb2.SERVING_UNMERGED)
    finally:
        stop.set()
        for thread in threads:
            thread.join(timeout=60)
    assert not faults
    for serving in ("merged", "compensated", "unmerged"):
        assert value(compensating, "lorikeet_served_total", serving=serving) > 0
    assert value(compensating, "lorikeet_merges_total") == value(compensating, "lorikeet_unmerges_total") == 2


def test_merged_at_the_start_others_are_refused_and_an_engine_that_died_comes_back_merged(
    start_server: StartServer, world: World
) -> None:
    server = start_server(*OPTIONS, "--merge", "rank-8")
    client = Client(server.port)
    digest = merged_digest(client)
    check(client, world, "rank-8", common_pb2.SERVING_MERGED)
    for other in ("", "rank-4"):
        refused = client.refused(generation(PROMPT, other, 4))
        assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "BASE_MERGED")
        assert refused.metadata == {"merged_adapter_digest": digest}
    for call, request in (
        (client.adapters.UnloadAdapter, adapter_pb2.UnloadAdapterRequest(adapter_id="rank-8")),
        (client.adapters.DeleteAdapter, adapter_pb2.DeleteAdapterRequest(name="rank-8", mode=2)),
        (client.adapters.DeleteAdapter, adapter_pb2.DeleteAdapterRequest(name="rank-8", digest=digest, mode=2)),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            call(request, timeout=30)
        failure = failure_of(caught.value)
        assert (failure.code, failure.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "ADAPTER_IN_USE")
        assert "unmerge it first" in failure.message
    with pytest.raises(grpc.RpcError) as caught:
        client.adapters.MergeAdapter(adapter_pb2.MergeAdapterRequest(adapter_id="rank-4"), timeout=30)
    assert failure_of(caught.value).reason == "BASE_MERGED"
    server.engine().kill()
    eventually(lambda: value(server, "lorikeet_merges_total") == 2, "the next engine has merged it")
    check(client, world, "rank-8", common_pb2.SERVING_MERGED)
    assert merged_digest(client) == digest
    client.adapters.UnmergeAdapter(adapter_pb2.UnmergeAdapterRequest(adapter_id="rank-8"), timeout=60)
    check(client, world, "", common_pb2.SERVING_UNMERGED)
    check(client, world, "rank-4", common_pb2.SERVING_UNMERGED)
    client.close()


@pytest.mark.parametrize(
    ("fields", "field"), [({"drain_seconds": 0}, "drain_seconds"), ({"probe_text": "x" * 100_001}, "probe_text")]
)
def test_merge_options_out_of_range_are_refused(client: Client, fields: dict[str, object], field: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        client.adapters.MergeAdapter(adapter_pb2.MergeAdapterRequest(adapter_id="rank-8", **fields), timeout=30)
    failure = failure_of(caught.value)
    assert (failure.code, failure.fields) == (grpc.StatusCode.INVALID_ARGUMENT, [field])
