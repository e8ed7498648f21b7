"""Bytes to requests: whatever comes in, a request or an error that says what is wrong with it."""

import contextlib
from collections.abc import Callable

import pytest
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from lorikeet.v1 import adapter_pb2, common_pb2, inference_pb2
from server.errors import InvalidRequest
from server.rpc.convert import generate_request
from server.rpc.handlers import parser

MARK = "@@@@"  # takes as many bytes as BAD
BAD = b"\xf0\x9f\x98@"  # an emoji that was cut

turn = common_pb2.ChatMessage(role="user", content=MARK)


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (inference_pb2.GenerateRequest(adapter_id=MARK, text="x"), "adapter_id"),
        (inference_pb2.StreamGenerateRequest(text=MARK), "text"),
        (inference_pb2.GenerateRequest(text="x", request_id=MARK), "request_id"),
        (inference_pb2.GenerateRequest(messages=common_pb2.Chat(messages=[turn])), "messages.messages.content"),
        (inference_pb2.GenerateRequest(stopping=common_pb2.Stopping(stop_strings=[MARK])), "stopping.stop_strings"),
        (adapter_pb2.LoadAdapterRequest(adapter_id=MARK), "adapter_id"),
    ],
)
def test_a_string_that_is_not_utf8_is_named_by_its_path(message: Message, field: str) -> None:
    parse = parser(type(message))
    data = message.SerializeToString()
    assert parse(data) == message
    refused = parse(data.replace(MARK.encode(), BAD))
    assert isinstance(refused, InvalidRequest)
    assert refused.message == f"{field}: is not valid UTF-8"


@given(st.binary(max_size=200))
def test_any_bytes_are_a_request_or_refused(data: bytes) -> None:
    _is_request_or_refused(parser(inference_pb2.GenerateRequest), data)


@given(st.binary(max_size=40), st.integers(0, 60), st.integers(0, 20))
def test_any_damage_to_a_request_is_a_request_or_refused(noise: bytes, at: int, length: int) -> None:
    whole = inference_pb2.GenerateRequest(
        adapter_id="pirate@latest",
        messages=common_pb2.Chat(messages=[turn]),
        sampling=common_pb2.Sampling(temperature=0.5, seed=7),
        stopping=common_pb2.Stopping(max_tokens=5, stop_strings=["é"], stop_token_ids=[1, 2]),
    ).SerializeToString()
    _is_request_or_refused(parser(inference_pb2.GenerateRequest), whole[:at] + noise + whole[at + length :])


def _is_request_or_refused(parse: Callable[[bytes], Message | InvalidRequest], data: bytes) -> None:
    message = parse(data)
    if isinstance(message, InvalidRequest):
        return
    assert isinstance(message, inference_pb2.GenerateRequest)
    with contextlib.suppress(InvalidRequest):
        generate_request(message, "id")
