"""One request's answer, from the engine's tokens to the deltas a client sees: text, stop strings, counts."""

from server.engine.messages import Timings, TokenLogprob
from server.frontend.detokenizer import Detokenizer
from server.frontend.stop_strings import StopStrings
from server.frontend.streams import Piece, Stream
from server.frontend.types import Delta, Usage


class Completion:
    """Decodes the pieces of a stream as they are taken. `stop` None: there are no stop strings. The digest and
    `trained_quantization` are those of its deltas."""

    __slots__ = ("_adapter_digest", "_detokenizer", "_prompt_tokens", "_stop", "_trained_quantization", "num_tokens")

    def __init__(
        self,
        detokenizer: Detokenizer,
        stop: StopStrings | None,
        adapter_digest: str,
        prompt_tokens: int,
        trained_quantization: str = "",
    ) -> None:
        self._detokenizer = detokenizer
        self._stop = stop
        self._adapter_digest = adapter_digest
        self._prompt_tokens = prompt_tokens
        self._trained_quantization = trained_quantization
        self.num_tokens = 0

    def delta(self, piece: Piece, stream: Stream) -> Delta:
        """The next delta; the last one, with a finish reason, where the engine or a stop string ended the answer.
        Tokens after the one that completed a stop string do not belong to it."""
        token_ids, logprobs, finish_reason = piece.token_ids, piece.logprobs, piece.finish_reason
        # The token by which the engine stopped adds no text.
        with_text = token_ids[:-1] if finish_reason == "stop" else token_ids
        if self._stop is None:
            text = self._detokenizer.add(with_text)
            if finish_reason is not None:
                text += self._detokenizer.flush()
        else:
            text, num_used = self._text_before_stop(self._stop, with_text, finish_reason is not None)
            if self._stop.matched:
                finish_reason = "stop"
                token_ids, logprobs = _first(num_used, token_ids, logprobs)
        is_first = self.num_tokens == 0
        self.num_tokens += len(token_ids)
        if finish_reason is None and not is_first:
            return Delta(text, token_ids, self._adapter_digest, logprobs, serving=stream.serving)
        return Delta(
            text=text,
            token_ids=token_ids,
            adapter_digest=self._adapter_digest,
            logprobs=logprobs,
            finish_reason=finish_reason,
            usage=Usage(self._prompt_tokens, stream.num_cached, self.num_tokens),
            timings=_timings(stream),
            serving=stream.serving,
            trained_quantization=self._trained_quantization if finish_reason is not None else "",
        )

    def _text_before_stop(self, stop: StopStrings, token_ids: list[int], is_end: bool) -> tuple[str, int]:
        """The text to show, and how many of the tokens came until a stop string was complete."""
        shown = ""
        for i, token in enumerate(token_ids):
            shown += stop.add(self._detokenizer.add((token,)))
            if stop.matched:
                return shown, i + 1
        if is_end:
            shown += stop.add(self._detokenizer.flush())
            if not stop.matched:
                shown += stop.flush()
        return shown, len(token_ids)


def _first(
    num: int, token_ids: list[int], logprobs: list[TokenLogprob] | None
) -> tuple[list[int], list[TokenLogprob] | None]:
    return token_ids[:num], None if logprobs is None else logprobs[:num]


def _timings(stream: Stream) -> Timings | None:
    """The engine's. When a stop string ended the answer, the engine had not: then those that came with the first
    token, and the decode time as seen from here."""
    timings = stream.timings
    if timings is None or timings.decode > 0 or stream.first_at is None:
        return timings
    return Timings(timings.queue, timings.load, timings.prefill, stream.last_at - stream.first_at)
