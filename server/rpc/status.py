"""Errors as google.rpc.Status: the one place that knows both this project's error tree and gRPC's.

Every status carries ErrorInfo; RetryInfo, BadRequest and PreconditionFailure join where they say more (AIP-193).
A status travels in HTTP/2 trailers, of which receivers take 8 KiB unless told otherwise; past that a client sees
only that something was too large. So all that came from a user or a file is cut to fit.
"""

import logging
import uuid

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from adapters.errors import InvalidAdapter, InvalidAdapterId, LorikeetError

DOMAIN = "lorikeet"

# The message travels twice: percent-encoded (up to three bytes for one) and, with the details, in base64. Together
# at most 3 + 4/3 × 3 = 7 KiB.
MAX_MESSAGE_BYTES = 1024
MAX_STATUS_BYTES = 3072
MAX_METADATA_BYTES = 256
MAX_METADATA_ENTRIES = 4
MAX_FAULT_BYTES = 200

_logger = logging.getLogger(__name__)


def status_of(error: LorikeetError) -> status_pb2.Status:
    """The status of an error that a user is to hear of."""
    message = cut(error.message, MAX_MESSAGE_BYTES)
    status = status_pb2.Status(code=code_pb2.Code.Value(error.code), message=message)
    metadata = list(error.metadata.items())[:MAX_METADATA_ENTRIES]
    _add(
        status,
        error_details_pb2.ErrorInfo(
            reason=error.reason,
            domain=DOMAIN,
            metadata={cut(key, 64): cut(value, MAX_METADATA_BYTES) for key, value in metadata},
        ),
    )
    if error.retry_after is not None:
        delay = Duration()
        delay.FromNanoseconds(round(error.retry_after * 1e9))
        _add(status, error_details_pb2.RetryInfo(retry_delay=delay))
    field = error.metadata.get("field")
    if field is not None:
        _add(status, _bad_request(field, error.message.removeprefix(f"{field}: ")))
    elif isinstance(error, InvalidAdapterId):
        _add(status, _bad_request("adapter_id", error.message))
    elif isinstance(error, InvalidAdapter) and error.faults:
        budget = MAX_STATUS_BYTES - status.ByteSize()
        _add(status, _precondition_failure(error, budget))
    return status


def unexpected(error: BaseException) -> LorikeetError:
    """What a client hears of an error that is ours: it is logged under an id, and the id is all the client gets."""
    error_id = uuid.uuid4().hex[:12]
    _logger.error("internal error %s", error_id, exc_info=error)
    return LorikeetError(f"internal error; the server's log has it as {error_id}", error_id=error_id)


def cut(text: str, max_bytes: int) -> str:
    """The longest start of `text` that takes at most `max_bytes` in UTF-8, "…" at its end if that is not all."""
    data = text.encode(errors="replace")
    if len(data) <= max_bytes:
        return data.decode()
    return data[: max_bytes - 3].decode(errors="ignore") + "…"


def _bad_request(field: str, description: str) -> error_details_pb2.BadRequest:
    violation = error_details_pb2.BadRequest.FieldViolation(
        field=cut(field, MAX_METADATA_BYTES), description=cut(description, MAX_METADATA_BYTES)
    )
    return error_details_pb2.BadRequest(field_violations=[violation])


def _precondition_failure(error: InvalidAdapter, budget: int) -> error_details_pb2.PreconditionFailure:
    """Every fault as a violation, as many as `budget` bytes hold; the last says how many were left out."""
    failure = error_details_pb2.PreconditionFailure()
    room = budget - 128  # for the last violation and what Any adds
    for index, fault in enumerate(error.faults):
        violation = error_details_pb2.PreconditionFailure.Violation(
            type=error.reason, description=cut(fault, MAX_FAULT_BYTES)
        )
        room -= violation.ByteSize() + 3
        if room < 0:
            failure.violations.add(type=error.reason, description=f"and {len(error.faults) - index} more")
            break
        failure.violations.append(violation)
    return failure


def _add(status: status_pb2.Status, detail: Message) -> None:
    status.details.add().Pack(detail)
