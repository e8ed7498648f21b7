"""Every wrong request gets its own status and a message that names the field; the server and its neighbours go on."""

from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lorikeet.v1 import adapter_pb2, common_pb2, inference_pb2
from tests.support.client import Client, failure_of, generation
from tests.support.server_process import ServerProcess
from tests.support.tiny_base import MAX_MODEL_LEN

INVALID = grpc.StatusCode.INVALID_ARGUMENT
NAN, INF = float("nan"), float("inf")

pytestmark = pytest.mark.usefixtures("neighbour")


def chat(*turns: common_pb2.ChatMessage) -> dict[str, Any]:
    fields = generation([1])
    del fields["token_ids"]
    return fields | {"messages": common_pb2.Chat(messages=turns)}


def no_prompt() -> dict[str, Any]:
    fields = generation([1])
    del fields["token_ids"]
    return fields


BAD_FIELDS: list[tuple[str, dict[str, Any]]] = [
    *[("sampling.temperature", generation([5], temperature=value)) for value in (-0.1, 2.1, NAN, INF)],
    *[("sampling.top_p", generation([5], top_p=value)) for value in (0.0, -0.5, 1.01, NAN)],
    *[("sampling.min_p", generation([5], min_p=value)) for value in (-0.1, 1.1, NAN)],
    *[("sampling.repetition_penalty", generation([5], repetition_penalty=value)) for value in (0.0, -1.0, 10.1, NAN)],
    *[("sampling.presence_penalty", generation([5], presence_penalty=value)) for value in (-2.1, 2.1, NAN)],
    *[("sampling.frequency_penalty", generation([5], frequency_penalty=value)) for value in (-2.1, 2.1, -INF)],
    ("sampling.seed", generation([5], seed=2**63)),
    ("sampling.logprobs", generation([5], logprobs=21)),
    ("stopping.max_tokens", generation([5], max_tokens=0)),
    ("stopping.max_tokens", generation([5], max_tokens=MAX_MODEL_LEN)),
    ("stopping.max_tokens", generation([5], max_tokens=2**32 - 1)),
    ("stopping.stop_strings", generation([5], stop=[str(i) for i in range(17)])),
    ("stopping.stop_strings[1]", generation([5], stop=["a", ""])),
    ("stopping.stop_token_ids[0]", generation([5], stop_ids=[2**31])),
    ("token_ids[2]", generation([5, 6, 2**31, 7])),
    ("token_ids", generation([5] * MAX_MODEL_LEN)),
    ("text", generation("word " * MAX_MODEL_LEN)),
    ("text", generation("")),
    ("prompt", generation([])),
    ("prompt", no_prompt()),
    ("prompt", chat()),
    ("request_id", generation([5]) | {"request_id": "no spaces"}),
    ("request_id", generation([5]) | {"request_id": "x" * 129}),
]


@pytest.mark.parametrize(
    ("field", "fields"), BAD_FIELDS, ids=[f"{i}-{field}" for i, (field, _) in enumerate(BAD_FIELDS)]
)
def test_a_field_out_of_range_is_named(client: Client, field: str, fields: dict[str, Any]) -> None:
    failure = client.refused(fields)
    assert failure.code == INVALID, failure
    assert failure.reason == "REQUEST_INVALID"
    assert failure.fields == [field]
    assert failure.metadata["field"] == field
    assert failure.message.startswith(f"{field}: ")
    assert "\n" not in failure.message
    assert failure.retry_delay is None


@pytest.mark.parametrize("value", [0.0, 2.0])
def test_the_ends_of_a_range_belong_to_it(client: Client, value: float) -> None:
    penalty = value - 1 or 2.0
    fields = generation(
        [5, 6], "", 3, temperature=value, top_p=1.0, min_p=1.0, top_k=2**32 - 1, repetition_penalty=10.0,
        presence_penalty=-penalty, frequency_penalty=penalty, seed=2**63 - 1, logprobs=20,
    )  # fmt: skip
    answer = client.generate(fields)
    assert len(answer.token_ids) == 3
    assert [len(position.top) for position in answer.logprobs] == [20] * 3


MALFORMED_IDS = [
    *("../secret", "..", "a/../b", "/etc/passwd", "a/b", "a\\b", "%2e%2e%2f", "a@../x"),
    *("Upper", "-dash", ".hidden", "a b", "a\x00b", "a\n", "ü", "x" * 129, "x" * 100_000),
    *("@", "a@", "@latest", "a@@b", "a@latest@latest", "a@sha256:12", "a@sha256:" + "G" * 64, "a@SHA256:" + "0" * 64),
]


@pytest.mark.parametrize("adapter_id", MALFORMED_IDS, ids=[repr(text[:20]) for text in MALFORMED_IDS])
def test_a_malformed_adapter_id_is_refused(client: Client, adapter_id: str) -> None:
    failure = client.refused(generation([5], adapter_id))
    assert failure.code == INVALID
    assert failure.reason == "ADAPTER_ID_INVALID"
    assert failure.fields == ["adapter_id"]
    assert len(failure.message) < 400
    for call, request in (
        (client.adapters.GetAdapter, adapter_pb2.GetAdapterRequest(adapter_id=adapter_id)),
        (client.adapters.LoadAdapter, adapter_pb2.LoadAdapterRequest(adapter_id=adapter_id)),
        (client.adapters.UnloadAdapter, adapter_pb2.UnloadAdapterRequest(adapter_id=adapter_id)),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            call(request, timeout=60)
        assert failure_of(caught.value).reason == "ADAPTER_ID_INVALID"


@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    adapter_id=st.text(st.characters(codec="utf-8"), min_size=1, max_size=200)
    | st.from_regex(r"[a-z./@:%\\-]{1,40}", fullmatch=True)
)
@example(adapter_id="rank-4@sha256:" + "0" * 64)
def test_no_adapter_id_does_harm(client: Client, adapter_id: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        client.adapters.GetAdapter(adapter_pb2.GetAdapterRequest(adapter_id=adapter_id), timeout=60)
    assert failure_of(caught.value).reason in ("ADAPTER_ID_INVALID", "ADAPTER_NOT_FOUND")


@pytest.mark.parametrize(
    "adapter_id", ["nobody", "rank-4@stable", "rank-4@sha256:" + "0" * 64, "names", "versions.json", "x" * 128]
)
def test_an_unknown_adapter_is_not_found(client: Client, adapter_id: str) -> None:
    failure = client.refused(generation([5], adapter_id))
    assert failure.code == grpc.StatusCode.NOT_FOUND
    assert failure.reason == "ADAPTER_NOT_FOUND"
    assert adapter_id.partition("@")[0] in failure.message
    with pytest.raises(grpc.RpcError) as caught:
        client.adapters.LoadAdapter(adapter_pb2.LoadAdapterRequest(adapter_id=adapter_id), timeout=60)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


RAW_REQUESTS = [
    ("text", inference_pb2.GenerateRequest(text="abc").SerializeToString().replace(b"abc", b"\xff\xfe\xfd")),
    ("adapter_id", inference_pb2.GenerateRequest(adapter_id="abc").SerializeToString().replace(b"abc", b"\xc3\x28x")),
    (
        "stopping.stop_strings",
        inference_pb2.GenerateRequest(text="x", stopping=common_pb2.Stopping(stop_strings=["abc"]))
        .SerializeToString()
        .replace(b"abc", b"\xed\xa0\x80"),
    ),
    ("request", b"\xff\xff\xff\xff"),
    ("request", b"\x12\xff\xff\xff\x0fshort"),
]


@pytest.mark.parametrize(
    ("field", "data"), RAW_REQUESTS, ids=[f"{i}-{name}" for i, (name, _) in enumerate(RAW_REQUESTS)]
)
@pytest.mark.parametrize("method", ["Generate", "StreamGenerate"])
def test_bytes_that_are_no_request_are_refused(client: Client, method: str, field: str, data: bytes) -> None:
    """Among them strings that are not UTF-8, which no client library would send."""
    name = f"/lorikeet.v1.InferenceService/{method}"
    call = client.channel.unary_unary(name) if method == "Generate" else client.channel.unary_stream(name)
    with pytest.raises(grpc.RpcError) as caught:
        list(call(data, timeout=60))
    failure = failure_of(caught.value)
    assert failure.code == INVALID
    assert failure.fields == [field]


def test_a_message_over_the_limit_is_refused(client: Client) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        client.generate(generation("x" * (5 << 20)))
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert len(client.generate(generation([5], "", 2)).token_ids) == 2


def test_an_adapter_in_the_metadata_must_be_the_request_s(client: Client) -> None:
    request = inference_pb2.GenerateRequest(**generation([5], "rank-4", 2))
    client.inference.Generate(request, metadata=[("x-adapter", "rank-4")], timeout=30)
    with pytest.raises(grpc.RpcError) as caught:
        client.inference.Generate(request, metadata=[("x-adapter", "rank-8")], timeout=30)
    assert failure_of(caught.value).fields == ["adapter_id"]


@pytest.mark.parametrize(
    ("field", "request_"),
    [
        ("page_token", adapter_pb2.ListAdaptersRequest(page_token="../..")),
        ("page_token", adapter_pb2.ListAdaptersRequest(page_token="x" * 5000)),
    ],
)
def test_a_page_token_of_nobody_s_is_refused(
    client: Client, field: str, request_: adapter_pb2.ListAdaptersRequest
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        client.adapters.ListAdapters(request_, timeout=60)
    failure = failure_of(caught.value)
    assert failure.code == INVALID
    assert field in failure.message


def test_refusals_are_counted_and_leave_nothing_behind(client: Client, server: ServerProcess) -> None:
    before = server.metrics()
    client.refused(generation([5], "nobody"))
    client.refused(generation([5], temperature=-1.0))
    after = server.metrics()
    assert after["lorikeet_rejected_total"] == before.get("lorikeet_rejected_total", 0) + 4
    assert client.is_serving()
