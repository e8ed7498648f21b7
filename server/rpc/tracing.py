"""A span for each call, sent to an OpenTelemetry collector. Imports OpenTelemetry, and is imported only to use it.

Names are those of the semantic conventions for RPC and for generative AI (the latter in development), and where these
have none those that vLLM's spans have, or `lorikeet.…`:
https://opentelemetry.io/docs/specs/semconv/rpc/grpc/, https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/.
Neither prompt nor answer is in them.
"""

import threading
import time
from collections.abc import Mapping

from opentelemetry import propagate
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, format_trace_id, set_span_in_context
from opentelemetry.util.types import AttributeValue

from server.engine.messages import Timings
from server.frontend.types import ChatMessage, GenerateRequest
from server.rpc.record import CallRecord, Generation
from server.version import lorikeet_version

NAME = "lorikeet"

# Codes that are the server's failure; the others are the client's, whose span says so.
# https://opentelemetry.io/docs/specs/semconv/rpc/grpc/
FAILURES = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})

Attributes = dict[str, AttributeValue | None]


class Tracing:
    """Makes spans of calls that have ended, below the caller's where its metadata names one (W3C traceparent, or what
    OTEL_PROPAGATORS says)."""

    def __init__(self, exporter: SpanExporter, base_name: str) -> None:
        self._exporter = exporter
        self._provider = TracerProvider(resource=_resource())
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer(NAME, lorikeet_version())
        self._base_name = base_name

    def ended(self, record: CallRecord) -> None:
        end = time.time_ns()
        begin = end - _nanoseconds(record.seconds)
        attributes = _of_call(record)
        if record.generation is not None:
            attributes |= _of_generation(record, record.generation, self._base_name)
        span = self._tracer.start_span(
            record.full_method,
            propagate.extract(record.metadata),
            SpanKind.SERVER,
            {name: value for name, value in attributes.items() if value is not None},
            start_time=begin,
        )
        record.trace_id = format_trace_id(span.get_span_context().trace_id)
        if span.is_recording():
            if record.code in FAILURES:
                span.set_status(Status(StatusCode.ERROR, None if record.error is None else record.error.reason))
            if record.generation is not None:
                self._add_phases(span, record.generation, begin)
        span.end(end)

    def close(self, patience: float) -> None:
        """Waits until what is left is sent, but no longer than `patience` seconds."""
        hurry = threading.Timer(patience, self._exporter.shutdown)  # which interrupts what it does
        hurry.start()
        self._provider.shutdown()
        hurry.cancel()

    def _add_phases(self, parent: Span, generation: Generation, begin: int) -> None:
        """Children for what the engine did: their lengths are its own, their place follows from the first token's."""
        first_token, timings = generation.first_token, generation.timings
        if first_token is None or timings is None:
            return
        context = set_span_in_context(parent)
        first = begin + _nanoseconds(first_token)
        admitted = first - _nanoseconds(timings.prefill)
        came = admitted - _nanoseconds(timings.queue)
        phases = (
            ("queue", came, admitted),
            ("prefill", admitted, first),
            ("decode", first, first + _nanoseconds(timings.decode)),
        )
        for name, start, end in phases:
            self._tracer.start_span(name, context, start_time=max(start, begin)).end(end)


def _of_call(record: CallRecord) -> Attributes:
    attributes: Attributes = {
        "rpc.system.name": "grpc",
        "rpc.method": record.full_method,
        "rpc.response.status_code": record.code,
        "error.type": record.code if record.code in FAILURES else None,
        "lorikeet.request.id": record.request_id,
        "lorikeet.adapter.id": record.adapter_id or None,
        "lorikeet.adapter.name": record.adapter or None,
        "lorikeet.adapter.digest": record.digest or None,
    }
    if record.error is not None:
        attributes["lorikeet.error.reason"] = record.error.reason
    return attributes


def _of_generation(record: CallRecord, generation: Generation, base_name: str) -> Attributes:
    request, usage = generation.request, generation.usage
    return {
        "gen_ai.operation.name": _operation(request),
        "gen_ai.provider.name": NAME,
        "gen_ai.request.model": record.adapter_id or base_name,
        "gen_ai.request.max_tokens": request.max_tokens,
        "gen_ai.request.temperature": request.sampling.temperature,
        "gen_ai.request.top_p": request.sampling.top_p,
        "gen_ai.request.top_k": request.sampling.top_k or None,
        "gen_ai.response.model": base_name,
        "gen_ai.response.id": record.request_id,
        "gen_ai.response.finish_reasons": None if generation.finish_reason is None else (generation.finish_reason,),
        "gen_ai.usage.input_tokens": None if usage is None else usage.prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": None if usage is None else usage.cached_prompt_tokens,
        "gen_ai.usage.output_tokens": generation.num_tokens,
        "lorikeet.serving": None if generation.serving is None else generation.serving.value,
        **_of_timings(record.seconds, generation.first_token, generation.timings),
    }


def _of_timings(seconds: float, first_token: float | None, timings: Timings | None) -> Attributes:
    """In seconds, under vLLM's names."""
    attributes: Attributes = {"gen_ai.latency.e2e": seconds, "gen_ai.latency.time_to_first_token": first_token}
    if timings is not None:
        attributes |= {
            "gen_ai.latency.time_in_queue": timings.queue,
            "gen_ai.latency.time_in_model_prefill": timings.prefill,
            "gen_ai.latency.time_in_model_decode": timings.decode,
            "lorikeet.adapter.load_seconds": timings.load,
        }
    return attributes


def _operation(request: GenerateRequest) -> str:
    prompt = request.prompt
    is_chat = not isinstance(prompt, str) and any(isinstance(part, ChatMessage) for part in prompt[:1])
    return "chat" if is_chat else "text_completion"


def _resource() -> Resource:
    """The environment's attributes, and our name where it gives none."""
    own: Mapping[str, AttributeValue] = {"service.name": NAME, "service.version": lorikeet_version()}
    return Resource.create({**own, **OTELResourceDetector().detect().attributes})


def otlp_exporter(endpoint: str | None, protocol: str) -> SpanExporter:
    """To a collector by its URL, None: the one that the environment names; `protocol` is "grpc" or "http/protobuf"."""
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        return OTLPSpanExporter(endpoint)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as OTLPSpanExporterHttp

    return OTLPSpanExporterHttp(endpoint)


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
