"""Every error this project raises for a user's fault, and those about adapters.

    LorikeetError                 INTERNAL
    └── AdapterError
        ├── InvalidAdapterId      INVALID_ARGUMENT     the id is malformed
        ├── InvalidPage           INVALID_ARGUMENT     page_size or page_token of a listing; `field` names it
        ├── AdapterNotFound       NOT_FOUND            no such name, label or version
        ├── InvalidAdapter        FAILED_PRECONDITION  the files are broken or do not fit; `faults` lists all
        │   ├── UnsupportedAdapter                     well formed, but uses what is not honoured (DoRA, bias, …)
        │   └── BaseMismatch                           made for another base model
        ├── AdapterInUse          FAILED_PRECONDITION  asked to remove what running requests or labels hold
        ├── LabelMoved            ABORTED              the label is not where the caller expected it
        ├── AdapterTooLarge       RESOURCE_EXHAUSTED   does not fit the memory set aside for adapters
        ├── StoreFull             RESOURCE_EXHAUSTED   no room on the store's disk
        └── StoreUnavailable      UNAVAILABLE          the store cannot be read or written

`server.errors` continues the tree. `code` is the canonical name of a gRPC status code, `reason` the
UPPER_SNAKE_CASE constant of google.rpc.ErrorInfo (AIP-193): both are part of the API and stay stable.
Nothing here knows gRPC; `server.rpc.status` is the only place that turns an error into a status.
"""

from collections.abc import Sequence
from typing import ClassVar


class LorikeetError(Exception):
    """Root of all errors a user can cause or must hear of.

    `message` is one line that names what is wrong and, where it helps, what to do. `metadata` goes into
    ErrorInfo.metadata; `retry_after` (seconds) into RetryInfo, None when trying again cannot help.
    """

    code: ClassVar[str] = "INTERNAL"
    reason: ClassVar[str] = "INTERNAL"

    def __init__(self, message: str, *, retry_after: float | None = None, **metadata: str) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after = retry_after
        self.metadata = metadata


class AdapterError(LorikeetError):
    """Something is wrong with an adapter, or with where it lives."""


class InvalidAdapterId(AdapterError):
    """An adapter id that is not `name`, `name@label` or `name@sha256:<64 hex digits>`."""

    code = "INVALID_ARGUMENT"
    reason = "ADAPTER_ID_INVALID"


class InvalidPage(AdapterError):
    """A page size or page token that cannot be used."""

    code = "INVALID_ARGUMENT"
    reason = "REQUEST_INVALID"

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}", field=field)
        self.field = field


class AdapterNotFound(AdapterError):
    """No adapter of that name, or no such label or version of it."""

    code = "NOT_FOUND"
    reason = "ADAPTER_NOT_FOUND"


class InvalidAdapter(AdapterError):
    """The adapter's files are broken or do not fit the base. `faults` lists every fault found, one line each."""

    code = "FAILED_PRECONDITION"
    reason = "ADAPTER_INVALID"

    def __init__(self, message: str, *, faults: Sequence[str] = (), **metadata: str) -> None:
        super().__init__(message, retry_after=None, **metadata)
        self.faults = tuple(faults)


class UnsupportedAdapter(InvalidAdapter):
    """A well-formed adapter that uses something this server does not honour; served, it would be silently wrong."""

    reason = "ADAPTER_UNSUPPORTED"


class BaseMismatch(InvalidAdapter):
    """The adapter was made for another base model."""

    reason = "ADAPTER_BASE_MISMATCH"


class AdapterInUse(AdapterError):
    """Running requests, or labels, hold this adapter."""

    code = "FAILED_PRECONDITION"
    reason = "ADAPTER_IN_USE"


class LabelMoved(AdapterError):
    """A label is not where the caller expected it: someone else moved it. Look again, then decide."""

    code = "ABORTED"
    reason = "LABEL_MOVED"


class AdapterTooLarge(AdapterError):
    """The adapter needs more memory than is set aside for adapters."""

    code = "RESOURCE_EXHAUSTED"
    reason = "ADAPTER_TOO_LARGE"


class StoreFull(AdapterError):
    """The disk of the store has no room."""

    code = "RESOURCE_EXHAUSTED"
    reason = "STORE_FULL"


class StoreUnavailable(AdapterError):
    """The store cannot be read or written."""

    code = "UNAVAILABLE"
    reason = "STORE_UNAVAILABLE"
