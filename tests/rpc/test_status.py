"""Every error as a status: its code and reason, its details, and that it fits the trailers."""

import logging
from base64 import b64encode
from collections.abc import Iterator
from urllib.parse import quote_from_bytes

import pytest
from google.rpc import code_pb2, error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

import server.errors  # the rest of the tree
from adapters.errors import InvalidAdapter, InvalidAdapterId, InvalidPage, LorikeetError
from server.errors import InvalidRequest, ServerBusy
from server.rpc.status import cut, status_of, unexpected

assert server.errors


def tree(root: type[LorikeetError]) -> Iterator[type[LorikeetError]]:
    yield root
    for child in root.__subclasses__():
        yield from tree(child)


def instance(kind: type[LorikeetError]) -> LorikeetError:
    """An error with all that its kind can carry."""
    if issubclass(kind, InvalidRequest | InvalidPage):
        return kind("field", "is wrong")
    if issubclass(kind, InvalidAdapter):
        return kind("what is wrong", adapter="pirate")
    return kind("what is wrong", retry_after=1.5, adapter="pirate")


@pytest.mark.parametrize("kind", list(tree(LorikeetError)), ids=lambda kind: kind.__name__)
def test_every_error_of_the_tree_has_its_status(kind: type[LorikeetError]) -> None:
    error = instance(kind)
    status = status_of(error)
    assert code_pb2.Code.Name(status.code) == kind.code
    assert status.message == error.message
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.reason, info.domain, dict(info.metadata)) == (kind.reason, "lorikeet", error.metadata)
    retry = [entry for entry in status.details if entry.Is(error_details_pb2.RetryInfo.DESCRIPTOR)]
    assert len(retry) == (error.retry_after is not None)


def test_a_retry_delay_keeps_its_fraction() -> None:
    retry = error_details_pb2.RetryInfo()
    assert status_of(ServerBusy("full", retry_after=0.25)).details[1].Unpack(retry)
    assert retry.retry_delay.ToMilliseconds() == 250


@pytest.mark.parametrize(
    ("error", "field", "description"),
    [
        (InvalidRequest("sampling.top_p", "is 2"), "sampling.top_p", "is 2"),
        (InvalidPage("page_token", "is old"), "page_token", "is old"),
        (InvalidAdapterId("'../x' is no name"), "adapter_id", "'../x' is no name"),
    ],
)
def test_a_wrong_field_is_named(error: LorikeetError, field: str, description: str) -> None:
    request = error_details_pb2.BadRequest()
    assert status_of(error).details[1].Unpack(request)
    assert [(v.field, v.description) for v in request.field_violations] == [(field, description)]


def test_faults_past_the_room_are_counted() -> None:
    faults = [f"tensor {index}: has shape [1, 2] where [3, 4] is needed" for index in range(1000)]
    failure = error_details_pb2.PreconditionFailure()
    assert status_of(InvalidAdapter("1000 faults", faults=faults)).details[1].Unpack(failure)
    shown = [violation.description for violation in failure.violations]
    assert shown[:-1] == faults[: len(shown) - 1]
    assert len(shown) > 10
    assert shown[-1] == f"and {1000 - (len(shown) - 1)} more"


texts = st.one_of(st.text(max_size=300), st.text(min_size=1, max_size=4).map(lambda text: text * 5000))


def in_trailers(status: status_pb2.Status) -> int:
    """Bytes that a status takes in HTTP/2 trailers: a name, a value and 32 for each (RFC 9113, 6.5.2)."""
    message = len("grpc-message") + len(quote_from_bytes(status.message.encode())) + 32
    details = len("grpc-status-details-bin") + len(b64encode(status.SerializeToString())) + 32
    return message + details + len("grpc-status") + 2 + 32


@given(texts, st.dictionaries(st.text(min_size=1).map("k".__add__), texts, max_size=8), st.floats(0, 1e6))
def test_no_message_or_metadata_outgrows_the_trailers(message: str, metadata: dict[str, str], delay: float) -> None:
    assert in_trailers(status_of(LorikeetError(message, retry_after=delay, **metadata))) <= 8192


@given(texts, st.lists(texts, max_size=30))
def test_no_list_of_faults_outgrows_the_trailers(message: str, faults: list[str]) -> None:
    assert in_trailers(status_of(InvalidAdapter(message, faults=faults))) <= 8192


@given(texts, texts)
def test_no_field_outgrows_the_trailers(field: str, message: str) -> None:
    assert in_trailers(status_of(InvalidRequest(field, message))) <= 8192


@given(st.text(st.characters(), max_size=40), st.integers(3, 50))
def test_cut_text_is_a_start_of_it_and_fits(text: str, limit: int) -> None:
    shorter = cut(text, limit)
    text = text.encode(errors="replace").decode()  # file names can hold what UTF-8 cannot
    assert len(shorter.encode()) <= limit
    assert shorter == text or text.startswith(shorter.removesuffix("…"))
    assert shorter != "" or text == ""


def test_an_unexpected_error_is_logged_and_not_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        status = status_of(unexpected(RuntimeError("password")))
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert b"password" not in status.SerializeToString()
    assert info.metadata["error_id"] in caplog.text
    assert "password" in caplog.text
