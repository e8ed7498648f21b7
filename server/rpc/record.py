"""What is known of one call: filled in on its way, read at its end by what counts, logs and traces it."""

import re
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from adapters.errors import LorikeetError
from server.engine.messages import Serving, Timings
from server.frontend.types import Delta, GenerateRequest, Usage

REQUEST_ID_METADATA = "x-request-id"

# What stands for every method that there is not: the client's word may be anything. OpenTelemetry's name for it.
UNKNOWN_METHOD = "_OTHER"

# Printable ASCII without spaces: it goes into log lines and into the metadata of responses.
_SANE_ID = re.compile(r"[!-~]{1,128}", re.ASCII)


@dataclass(slots=True)
class Generation:
    """How far a generation has come. `first_token` is seconds from the call's arrival; `usage` and `timings` come with
    the first tokens and, complete, with the last. `texts` are what was made, kept only where that is to be logged."""

    request: GenerateRequest
    texts: list[str] | None
    num_tokens: int = 0
    first_token: float | None = None
    serving: Serving | None = None
    usage: Usage | None = None
    timings: Timings | None = None
    finish_reason: str | None = None

    def add(self, delta: Delta, elapsed: Callable[[], float]) -> None:
        """On the path of every token. `elapsed` tells the seconds since the call's arrival."""
        self.num_tokens += len(delta.token_ids)
        if self.texts is not None:
            self.texts.append(delta.text)
        if self.first_token is None:
            self.first_token, self.serving = elapsed(), delta.serving
        if delta.usage is not None:
            self.usage, self.timings, self.finish_reason = delta.usage, delta.timings, delta.finish_reason


@dataclass(slots=True)
class CallRecord:
    """One call. `service` is "" and `method` UNKNOWN_METHOD where there is no such method. `metadata` is the client's,
    without binary values and the last of each key. `adapter_id` is what was asked for, cut where it is too long to be
    one; `adapter` its name once it is known to exist ("" the base, None not known), `digest` what it stood for.

    `code` (a gRPC code's name), `seconds` and `error` are set at the end; `trace_id` where the call is traced."""

    service: str
    method: str
    metadata: Mapping[str, str]
    request_id: str
    adapter_id: str = ""
    adapter: str | None = None
    digest: str = ""
    generation: Generation | None = None
    code: str = ""
    seconds: float = 0.0
    error: LorikeetError | None = None
    trace_id: str = ""

    @property
    def full_method(self) -> str:
        """With its service."""
        return f"{self.service}/{self.method}" if self.service else self.method


class Observer(Protocol):
    """Hears of every call once, when it has ended. Called on the event loop: it may not wait, nor raise."""

    def ended(self, record: CallRecord) -> None: ...


def request_id_of(metadata: Mapping[str, str]) -> str:
    """The client's own, where it can stand in a log line, or else a new one."""
    given = metadata.get(REQUEST_ID_METADATA, "")
    return given if _SANE_ID.fullmatch(given) is not None else uuid.uuid4().hex
