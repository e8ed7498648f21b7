"""One log line for each call, however it ended. No prompt and no answer is in it unless the record keeps them."""

import logging
from collections.abc import Mapping

from adapters.errors import LorikeetError
from server.engine.messages import Serving
from server.frontend.types import ChatMessage, Prompt
from server.logs import Event
from server.rpc.record import CallRecord, Generation

# Of an error's message, in characters.
MAX_MESSAGE = 300


class RequestLog:
    """Logs calls at level info."""

    def __init__(self, logger: logging.Logger | None = None) -> None:
        self._logger = logger or logging.getLogger(__name__)

    def ended(self, record: CallRecord) -> None:
        self._logger.info(RequestEnded(record))


class RequestEnded(Event):
    """The line. What is not known, or does not apply, is left out."""

    __slots__ = ("_record",)

    name = "request"

    def __init__(self, record: CallRecord) -> None:
        self._record = record

    def fields(self) -> Mapping[str, object]:
        record = self._record
        fields: dict[str, object] = {
            "request_id": record.request_id,
            "method": record.method,
            "code": record.code,
            "seconds": _rounded(record.seconds),
            "adapter": record.adapter or None,
            "adapter_id": record.adapter_id if record.adapter_id != record.adapter else None,
            "digest": record.digest or None,
        }
        if record.generation is not None:
            fields |= _generated(record.generation, record.adapter)
        if record.error is not None:
            fields |= _refused(record.error)
        fields["trace_id"] = record.trace_id or None
        return {name: value for name, value in fields.items() if value not in (None, "")}


def _generated(generation: Generation, adapter: str | None) -> dict[str, object]:
    usage, timings, serving = generation.usage, generation.timings, generation.serving
    is_base = adapter == "" and serving is Serving.UNMERGED
    fields: dict[str, object] = {
        "serving": "base" if is_base else serving,
        "prompt_tokens": usage and usage.prompt_tokens,
        "cached_prompt_tokens": usage and usage.cached_prompt_tokens,
        "completion_tokens": generation.num_tokens,
        "queue_seconds": timings and _rounded(timings.queue),
        "adapter_load_seconds": timings and _rounded(timings.load),
        "first_token_seconds": generation.first_token and _rounded(generation.first_token),
        "finish_reason": generation.finish_reason,
    }
    if generation.texts is not None:
        fields |= {"prompt": _prompt(generation.request.prompt), "completion": "".join(generation.texts)}
    return fields


def _refused(error: LorikeetError) -> dict[str, object]:
    """A message about a field may quote what is in it, as a chat template does: the field must do."""
    field = error.metadata.get("field")
    return {"reason": error.reason, "field": field, "error": error.message[:MAX_MESSAGE] if field is None else None}


def _prompt(prompt: Prompt) -> object:
    if isinstance(prompt, str):
        return prompt
    return [{"role": part.role, "content": part.content} if isinstance(part, ChatMessage) else part for part in prompt]


def _rounded(seconds: float) -> float:
    """To microseconds."""
    return round(seconds, 6)
