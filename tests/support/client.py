"""A client as a user would write one, over the generated stubs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from lorikeet.v1 import (
    adapter_pb2_grpc,
    common_pb2,
    inference_pb2,
    inference_pb2_grpc,
    server_pb2_grpc,
)

Prompt = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class Failure:
    """A call's status: code, message and the details it carries."""

    code: grpc.StatusCode
    message: str
    reason: str
    metadata: dict[str, str]
    retry_delay: float | None
    fields: list[str]


def failure_of(error: grpc.RpcError) -> Failure:
    """What a failed call says; every error of the server has ErrorInfo of the domain `lorikeet`."""
    assert isinstance(error, grpc.Call)
    status = rpc_status.from_call(error)
    assert status is not None, f"{error.code()} {error.details()} carries no google.rpc.Status"
    info, retry, bad = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo(), error_details_pb2.BadRequest()
    kinds = {detail.type_url.rpartition(".")[2]: detail for detail in status.details}
    assert kinds["ErrorInfo"].Unpack(info)
    assert info.domain == "lorikeet"
    has_retry = "RetryInfo" in kinds and kinds["RetryInfo"].Unpack(retry)
    if "BadRequest" in kinds:
        kinds["BadRequest"].Unpack(bad)
    return Failure(
        code=error.code(),
        message=status.message,
        reason=info.reason,
        metadata=dict(info.metadata),
        retry_delay=_seconds(retry.retry_delay) if has_retry else None,
        fields=[violation.field for violation in bad.field_violations],
    )


def _seconds(duration: Duration) -> float:
    return duration.ToNanoseconds() / 1e9


def generation(
    prompt: Prompt,
    adapter: str = "",
    max_tokens: int | None = 16,
    *,
    ignore_eos: bool = True,
    stop: Sequence[str] = (),
    stop_ids: Sequence[int] = (),
    **sampling: Any,
) -> dict[str, Any]:
    """The fields of a request; greedy unless `sampling` says otherwise."""
    fields: dict[str, Any] = {
        "adapter_id": adapter,
        "sampling": common_pb2.Sampling(**({"temperature": 0.0} | sampling)),
        "stopping": common_pb2.Stopping(
            max_tokens=max_tokens, ignore_eos=ignore_eos, stop_strings=stop, stop_token_ids=stop_ids
        ),
    }
    if isinstance(prompt, str):
        fields["text"] = prompt
    else:
        fields["token_ids"] = common_pb2.TokenIds(ids=prompt)
    return fields


@dataclass(slots=True)
class Answer:
    """What the pieces of a stream make together; `last` is its last message, None while it has not come."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    digests: set[str] = field(default_factory=set)
    num_pieces: int = 0
    last: inference_pb2.StreamGenerateResponse | None = None

    def add(self, piece: inference_pb2.StreamGenerateResponse) -> None:
        assert self.last is None, "a piece after the last"
        self.token_ids.extend(piece.token_ids)
        self.text += piece.text
        self.digests.add(piece.adapter_digest)
        self.num_pieces += 1
        if piece.finish_reason != common_pb2.FINISH_REASON_UNSPECIFIED:
            self.last = piece


class Client:
    """One channel to a server, usable from several threads."""

    def __init__(self, port: int) -> None:
        options = [("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1)]
        self.channel = grpc.insecure_channel(f"127.0.0.1:{port}", options=options)
        self.inference = inference_pb2_grpc.InferenceServiceStub(self.channel)
        self.adapters = adapter_pb2_grpc.AdapterServiceStub(self.channel)
        self.server = server_pb2_grpc.ServerServiceStub(self.channel)
        self.health = health_pb2_grpc.HealthStub(self.channel)

    def generate(self, fields: dict[str, Any], timeout: float = 120.0) -> inference_pb2.GenerateResponse:
        return self.inference.Generate(inference_pb2.GenerateRequest(**fields), timeout=timeout)

    def open(self, fields: dict[str, Any], timeout: float = 120.0) -> Any:
        """A stream: an iterator of messages that is also the call (`cancel`, `code`)."""
        return self.inference.StreamGenerate(inference_pb2.StreamGenerateRequest(**fields), timeout=timeout)

    def stream(self, fields: dict[str, Any], timeout: float = 120.0) -> Answer:
        """A stream read to its end."""
        return read(self.open(fields, timeout))

    def refused(self, fields: dict[str, Any]) -> Failure:
        """The status that Generate and StreamGenerate both refuse these fields with."""
        failures = []
        for call in (self.generate, self.stream):
            try:
                call(fields)
            except grpc.RpcError as error:
                failures.append(failure_of(error))
        assert len(failures) == 2, "the request was taken"
        assert failures[0] == failures[1]
        return failures[0]

    def is_serving(self, service: str = "") -> bool:
        """What grpc.health.v1 says; False as well when nobody answers."""
        try:
            response = self.health.Check(health_pb2.HealthCheckRequest(service=service), timeout=60)
        except grpc.RpcError:
            return False
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)

    def close(self) -> None:
        self.channel.close()


def read(stream: Iterator[inference_pb2.StreamGenerateResponse], answer: Answer | None = None) -> Answer:
    """All pieces to the end."""
    answer = answer if answer is not None else Answer()
    for piece in stream:
        answer.add(piece)
    return answer
