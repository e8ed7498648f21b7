"""Errors of the server; the tree's root and its adapter branch are in `adapters.errors`.

    LorikeetError
    ├── InvalidRequest      INVALID_ARGUMENT     a field of a request is out of range; `field` names it
    ├── UnknownMethod       UNIMPLEMENTED        no service here has such a method
    ├── ServerBusy          RESOURCE_EXHAUSTED   the waiting queue is full; carries retry_after
    ├── AnswerTooLarge      RESOURCE_EXHAUSTED   an answer takes more bytes than a message may have
    ├── ShuttingDown        UNAVAILABLE          the server is stopping and takes no new requests
    ├── StreamStalled       ABORTED              the client did not read its stream for too long
    ├── EngineUnavailable   UNAVAILABLE          the engine process died or is not ready yet
    ├── PinRefused          RESOURCE_EXHAUSTED   pinning it would leave too little memory for other adapters
    ├── LoadCancelled       ABORTED              the adapter was unloaded while it was being loaded
    ├── BaseMerged          FAILED_PRECONDITION  another adapter is merged into the base, and only it is served
    ├── MergeRefused        FAILED_PRECONDITION  merged, the adapter would not do what it does unmerged
    ├── MergeTooLarge       RESOURCE_EXHAUSTED   the host has no room for the weights that a merge puts aside
    ├── MergeAborted        ABORTED              a merge or unmerge was given up; all is as before
    ├── CanaryFailed        FAILED_PRECONDITION  a loaded adapter computes what its files do not say (an InvalidAdapter)
    ├── BaseModelError      FAILED_PRECONDITION  the base model cannot be found or read
    │   └── UnsupportedModel                     its architecture or a setting is not supported
    ├── ConfigError         INVALID_ARGUMENT     a setting of the server itself is wrong (port in use, …)
    └── DoesNotFit          RESOURCE_EXHAUSTED   what is planned takes more memory than the device has

Must not hold: anything of gRPC (`server.rpc.status`) or torch.
"""

from adapters.errors import InvalidAdapter, LorikeetError


class InvalidRequest(LorikeetError):
    """A field of a request is missing or out of range."""

    code = "INVALID_ARGUMENT"
    reason = "REQUEST_INVALID"

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}", field=field)
        self.field = field


class UnknownMethod(LorikeetError):
    """No service here has such a method."""

    code = "UNIMPLEMENTED"
    reason = "METHOD_UNKNOWN"


class ServerBusy(LorikeetError):
    """The waiting queue is full."""

    code = "RESOURCE_EXHAUSTED"
    reason = "SERVER_BUSY"


class AnswerTooLarge(LorikeetError):
    """An answer takes more bytes than a message may have."""

    code = "RESOURCE_EXHAUSTED"
    reason = "ANSWER_TOO_LARGE"


class ShuttingDown(LorikeetError):
    """The server is stopping and takes no new requests."""

    code = "UNAVAILABLE"
    reason = "SHUTTING_DOWN"


class StreamStalled(LorikeetError):
    """The client did not read its stream for too long; what the answer held in the engine was given back."""

    code = "ABORTED"
    reason = "STREAM_STALLED"


class PinRefused(LorikeetError):
    """Pinning the adapter would leave too little memory for another one."""

    code = "RESOURCE_EXHAUSTED"
    reason = "ADAPTER_PIN_REFUSED"


class LoadCancelled(LorikeetError):
    """The adapter was unloaded while it was being loaded."""

    code = "ABORTED"
    reason = "ADAPTER_LOAD_CANCELLED"


class BaseMerged(LorikeetError):
    """Another adapter is merged into the base, and requests that are not for it are not served meanwhile. Metadata:
    `merged_adapter_digest`."""

    code = "FAILED_PRECONDITION"
    reason = "BASE_MERGED"


class MergeRefused(LorikeetError):
    """In the base's format, merged weights would not do what the adapter does unmerged. Metadata: `kl`, `max_kl`."""

    code = "FAILED_PRECONDITION"
    reason = "ADAPTER_MERGE_REFUSED"


class MergeTooLarge(LorikeetError):
    """The host has no room for the weights that a merge puts aside."""

    code = "RESOURCE_EXHAUSTED"
    reason = "ADAPTER_MERGE_TOO_LARGE"


class MergeAborted(LorikeetError):
    """A merge or an unmerge was given up: requests did not end in time, or the other was asked for. All is as
    before."""

    code = "ABORTED"
    reason = "ADAPTER_MERGE_ABORTED"


class CanaryFailed(InvalidAdapter):
    """Once loaded, the adapter computes something else than its files say. `faults` names the projections."""

    reason = "ADAPTER_CANARY_FAILED"


class EngineUnavailable(LorikeetError):
    """The engine process is not there: it died under this request, or is starting."""

    code = "UNAVAILABLE"
    reason = "ENGINE_UNAVAILABLE"


class BaseModelError(LorikeetError):
    """The base model cannot be found or read."""

    code = "FAILED_PRECONDITION"
    reason = "BASE_MODEL"


class UnsupportedModel(BaseModelError):
    """The base model's architecture, or one of its settings, is not supported."""

    reason = "BASE_MODEL_UNSUPPORTED"


class ConfigError(LorikeetError):
    """A setting of the server is wrong."""

    code = "INVALID_ARGUMENT"
    reason = "CONFIG_INVALID"


class DoesNotFit(LorikeetError):
    """What is planned, or asked for, takes more memory than there is; the message says what to lower."""

    code = "RESOURCE_EXHAUSTED"
    reason = "PLAN_DOES_NOT_FIT"
