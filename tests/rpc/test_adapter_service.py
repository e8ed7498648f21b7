"""AdapterService through a real socket: memory, progress, labels."""

import asyncio
from dataclasses import asdict, replace
from typing import Any

import grpc
import pytest

from adapters.errors import AdapterInUse, LabelMoved, StoreUnavailable
from adapters.manifest import Scores, TrainingInfo
from lorikeet.v1 import adapter_pb2, server_pb2
from server.cli.adapters_fields import adapter_fields, version_fields
from server.engine.messages import CallProgress, LayerError, MergeReport
from server.frontend.types import MergeOptions, Residency
from server.rpc import convert
from tests.rpc.fakes import DIGEST, FakeBackend, FakeCatalog, a_version, serving
from tests.rpc.test_services import failure

OTHER = "sha256:" + "c" * 64
Progress = adapter_pb2.Progress
READING = [CallProgress("1", "reading", 0, 100), CallProgress("1", "reading", 100, 100), CallProgress("1", "checking")]


def test_an_adapter_says_which_tiers_hold_it_and_whether_it_is_pinned() -> None:
    async def scenario() -> None:
        async with serving(FakeBackend()) as running:
            stub = running.adapters
            cold = (await stub.GetAdapter(adapter_pb2.GetAdapterRequest(adapter_id="pirate"))).adapter
            assert (cold.residency, list(cold.tiers), cold.pinned) == (adapter_pb2.Adapter.RESIDENCY_DISK, [], False)
            pinned = (await stub.PinAdapter(adapter_pb2.PinAdapterRequest(adapter_id="pirate"))).adapter
            assert pinned.pinned
            assert [(tier.residency, tier.size_bytes, tier.num_leases) for tier in pinned.tiers] == [
                (adapter_pb2.Adapter.RESIDENCY_DEVICE, 8192, 2),
                (adapter_pb2.Adapter.RESIDENCY_HOST, 4096, 0),
            ]
            assert pinned.residency == adapter_pb2.Adapter.RESIDENCY_DEVICE
            listed = (await stub.ListAdapters(adapter_pb2.ListAdaptersRequest())).adapters
            assert pinned in listed
            unpinned = (await stub.UnpinAdapter(adapter_pb2.UnpinAdapterRequest(adapter_id="pirate"))).adapter
            assert not unpinned.pinned

    asyncio.run(scenario())


@pytest.mark.parametrize("exact_match", [None, 0.0, 0.875])
def test_a_server_tells_the_scores_that_the_store_has(exact_match: float | None) -> None:
    scores = Scores(
        rows_digest=OTHER, held_out=False, num_rows=64, num_tokens=900, loss=0.5, trainer_loss=0.5004, base_loss=3.0,
        exact_match=exact_match,
    )  # fmt: skip
    version = a_version("pirate")
    training = TrainingInfo(method="lora", scores=scores)
    scored = replace(version, manifest=replace(version.manifest, training=training))
    told = adapter_fields(convert.adapter(scored, Residency()))["scores"]
    assert told == asdict(scores) == version_fields(scored)["scores"]
    assert adapter_fields(convert.adapter(version, Residency()))["scores"] == {} == version_fields(version)["scores"]


@pytest.mark.parametrize(
    ("mode", "drains"),
    [
        (adapter_pb2.UNLOAD_MODE_UNSPECIFIED, False),
        (adapter_pb2.UNLOAD_MODE_REFUSE, False),
        (adapter_pb2.UNLOAD_MODE_DRAIN, True),
    ],
)
def test_an_unload_refuses_unless_it_is_told_to_drain(mode: adapter_pb2.UnloadMode, drains: bool) -> None:
    async def scenario() -> None:
        backend = FakeBackend()
        async with serving(backend) as running:
            await running.adapters.UnloadAdapter(adapter_pb2.UnloadAdapterRequest(adapter_id="a", mode=mode))
            stream = running.adapters.StreamUnloadAdapter(
                adapter_pb2.StreamUnloadAdapterRequest(adapter_id="b", mode=mode)
            )
            assert [message.WhichOneof("event") async for message in stream] == ["adapter"]
            await running.adapters.DeleteAdapter(adapter_pb2.DeleteAdapterRequest(name="c", mode=mode))
        assert backend.unloaded == [("a", drains), ("b", drains)]
        assert backend.deleted == [("c", None, drains)]

    asyncio.run(scenario())


def test_a_mode_of_a_later_version_is_refused() -> None:
    async def scenario() -> None:
        backend = FakeBackend()
        async with serving(backend) as running:
            message = adapter_pb2.UnloadAdapterRequest.FromString(b"\x0a\x01a\x10\x09")
            code, _, details = await failure(running.adapters.UnloadAdapter(message))
            assert code == grpc.StatusCode.INVALID_ARGUMENT
            assert [violation.field for violation in details["BadRequest"].field_violations] == ["mode"]
        assert backend.unloaded == []

    asyncio.run(scenario())


def test_progress_comes_before_the_adapter() -> None:
    async def scenario() -> None:
        async with serving(FakeBackend(stages=READING)) as running:
            load = running.adapters.StreamLoadAdapter(adapter_pb2.StreamLoadAdapterRequest(adapter_id="pirate"))
            *told, last = [message async for message in load]
            assert [message.progress for message in told] == [
                Progress(stage=Progress.STAGE_READING, total_bytes=100),
                Progress(stage=Progress.STAGE_READING, done_bytes=100, total_bytes=100),
                Progress(stage=Progress.STAGE_CHECKING),
            ]
            assert (last.adapter.name, last.adapter.digest) == ("pirate", DIGEST)
            assert last.adapter.residency == adapter_pb2.Adapter.RESIDENCY_DEVICE
        labels = {"method": "StreamLoadAdapter", "code": "OK", "adapter": "pirate"}
        assert running.value("lorikeet_requests_total", **labels) == 1

    asyncio.run(scenario())


def test_an_error_comes_after_the_progress() -> None:
    async def scenario() -> None:
        error = AdapterInUse("2 requests use it")
        async with serving(FakeBackend(stages=READING[:1], call_error=error)) as running:
            for stream in (
                running.adapters.StreamLoadAdapter(adapter_pb2.StreamLoadAdapterRequest(adapter_id="pirate")),
                running.adapters.StreamUnloadAdapter(adapter_pb2.StreamUnloadAdapterRequest(adapter_id="pirate")),
            ):
                assert (await anext(aiter(stream))).progress.stage == Progress.STAGE_READING
                code, message, details = await failure(stream)
                assert (code, message) == (grpc.StatusCode.FAILED_PRECONDITION, "2 requests use it")
                assert details["ErrorInfo"].reason == "ADAPTER_IN_USE"

    asyncio.run(scenario())


def test_a_client_that_leaves_ends_the_wait() -> None:
    async def scenario() -> None:
        backend = FakeBackend(stages=[CallProgress("1", "draining")], hangs=True)
        async with serving(backend) as running:
            stream = running.adapters.StreamUnloadAdapter(
                adapter_pb2.StreamUnloadAdapterRequest(adapter_id="pirate", mode=adapter_pb2.UNLOAD_MODE_DRAIN)
            )
            assert (await stream.read()).progress.stage == Progress.STAGE_DRAINING
            stream.cancel()
            await backend.closed.wait()

    asyncio.run(scenario())


def test_merges_and_unmerges_as_asked_and_tells_what_merging_does() -> None:
    async def scenario() -> None:
        report = MergeReport(0.01, 0.25, [LayerError(3, 0.001, 0.5)], 4096)
        stages = [CallProgress("1", "draining"), CallProgress("1", "merging", 50, 100)]
        backend = FakeBackend(stages=stages, report=report)
        async with serving(backend) as running:
            merge = adapter_pb2.MergeAdapterRequest(adapter_id="pirate", drain_seconds=2.5, force=True, probe_text="so")
            merged = await running.adapters.MergeAdapter(merge)
            assert (merged.adapter.digest, merged.report.held_bytes) == (DIGEST, 4096)
            assert (merged.report.kl, merged.report.largest_kl) == (0.01, 0.25)
            assert merged.report.layers == [adapter_pb2.MergeReport.Layer(index=3, weight_error=0.001, delta_error=0.5)]
            stream = running.adapters.StreamMergeAdapter(adapter_pb2.StreamMergeAdapterRequest(adapter_id="pirate"))
            *told, last = [message async for message in stream]
            assert [message.progress for message in told] == [
                Progress(stage=Progress.STAGE_DRAINING),
                Progress(stage=Progress.STAGE_MERGING, done_bytes=50, total_bytes=100),
            ]
            assert (last.adapter.digest, last.report) == (DIGEST, merged.report)
            backend.report = None
            assert not (await running.adapters.MergeAdapter(merge)).HasField("report"), "it was merged already"
            info = await running.server.GetServerInfo(server_pb2.GetServerInfoRequest())
            assert (info.merged_adapter_digest, info.compensates_merged) == (DIGEST, False)
            unmerge = adapter_pb2.UnmergeAdapterRequest(adapter_id="pirate", drain_seconds=0.5)
            assert (await running.adapters.UnmergeAdapter(unmerge)).adapter.digest == DIGEST
            back = running.adapters.StreamUnmergeAdapter(adapter_pb2.StreamUnmergeAdapterRequest(adapter_id="pirate"))
            assert [message.WhichOneof("event") async for message in back] == ["progress", "progress", "adapter"]
            info = await running.server.GetServerInfo(server_pb2.GetServerInfoRequest())
            assert info.merged_adapter_digest == ""
        forced, default = MergeOptions(2.5, force=True, probe_text="so"), MergeOptions()
        assert backend.merged == [("pirate", forced), ("pirate", default), ("pirate", forced)]
        assert backend.unmerged == [("pirate", MergeOptions(0.5)), ("pirate", default)]

    asyncio.run(scenario())


def test_labels_move_as_asked() -> None:
    """What is expected of a label: anything, nothing there, a digest."""

    async def scenario() -> None:
        catalog = FakeCatalog()
        async with serving(FakeBackend(), catalog) as running:
            move: dict[str, Any] = {"name": "pirate", "label": "prod", "digest": DIGEST}
            for expected in ({}, {"expected_digest": ""}, {"expected_digest": OTHER}):
                request = adapter_pb2.MoveAdapterLabelRequest(**move, **expected)
                assert (await running.adapters.MoveAdapterLabel(request)).adapter.digest == DIGEST
            for request in (
                adapter_pb2.RollbackAdapterLabelRequest(name="pirate"),
                adapter_pb2.RollbackAdapterLabelRequest(name="pirate", label="prod", expected_digest=OTHER),
            ):
                assert (await running.adapters.RollbackAdapterLabel(request)).adapter.digest == DIGEST
        assert catalog.moves == [
            ("move", "pirate", "prod", DIGEST, None),
            ("move", "pirate", "prod", DIGEST, "absent"),
            ("move", "pirate", "prod", DIGEST, OTHER),
            ("rollback", "pirate", "latest", None),
            ("rollback", "pirate", "prod", OTHER),
        ]

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (LabelMoved("it is elsewhere"), grpc.StatusCode.ABORTED, "LABEL_MOVED"),
        (StoreUnavailable("no network", retry_after=5.0), grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE"),
    ],
)
def test_a_label_that_does_not_move_says_why(error: Exception, code: grpc.StatusCode, reason: str) -> None:
    async def scenario() -> None:
        async with serving(FakeBackend(), FakeCatalog(error=error)) as running:
            request = adapter_pb2.MoveAdapterLabelRequest(name="pirate", label="prod", digest=DIGEST)
            got, _, details = await failure(running.adapters.MoveAdapterLabel(request))
            assert (got, details["ErrorInfo"].reason) == (code, reason)
            assert ("RetryInfo" in details) == (reason == "STORE_UNAVAILABLE")

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("method", "field", "request_"),
    [
        ("MoveAdapterLabel", "name", adapter_pb2.MoveAdapterLabelRequest(name="../x", label="a", digest=DIGEST)),
        ("MoveAdapterLabel", "label", adapter_pb2.MoveAdapterLabelRequest(name="a", digest=DIGEST)),
        ("MoveAdapterLabel", "digest", adapter_pb2.MoveAdapterLabelRequest(name="a", label="a", digest="latest")),
        (
            "MoveAdapterLabel",
            "expected_digest",
            adapter_pb2.MoveAdapterLabelRequest(name="a", label="a", digest=DIGEST, expected_digest="absent"),
        ),
        ("RollbackAdapterLabel", "name", adapter_pb2.RollbackAdapterLabelRequest()),
        ("RollbackAdapterLabel", "label", adapter_pb2.RollbackAdapterLabelRequest(name="a", label="A")),
        ("DeleteAdapter", "name", adapter_pb2.DeleteAdapterRequest(digest=DIGEST)),
        ("DeleteAdapter", "digest", adapter_pb2.DeleteAdapterRequest(name="a", digest="prod")),
    ],
)
def test_a_malformed_name_label_or_digest_is_refused_by_its_field(method: str, field: str, request_: Any) -> None:
    async def scenario() -> None:
        backend, catalog = FakeBackend(), FakeCatalog()
        async with serving(backend, catalog) as running:
            code, message, details = await failure(getattr(running.adapters, method)(request_))
            assert code == grpc.StatusCode.INVALID_ARGUMENT
            assert message.startswith(f"{field}: ")
            assert [violation.field for violation in details["BadRequest"].field_violations] == [field]
        assert (catalog.moves, backend.deleted) == ([], [])

    asyncio.run(scenario())


def test_a_deletion_says_what_is_gone() -> None:
    async def scenario() -> None:
        backend = FakeBackend()
        async with serving(backend) as running:
            whole = await running.adapters.DeleteAdapter(adapter_pb2.DeleteAdapterRequest(name="a"))
            one = await running.adapters.DeleteAdapter(adapter_pb2.DeleteAdapterRequest(name="a", digest=OTHER))
            assert (list(whole.digests), list(one.digests)) == ([DIGEST], [OTHER])
        assert backend.deleted == [("a", None, False), ("a", OTHER, False)]

    asyncio.run(scenario())
