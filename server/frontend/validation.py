"""The ranges of a request's fields, as the wire contract states them. Names fields by their path there."""

from server.engine.messages import SamplingParams
from server.errors import InvalidRequest
from server.frontend.types import GenerateRequest

MAX_LOGPROBS = 20
MAX_STOP_CHARS = 1000


def check_request(request: GenerateRequest, *, vocab_size: int, max_model_len: int, max_stop_strings: int) -> None:
    """Everything that needs neither the tokenizer nor the adapter. Raises InvalidRequest."""
    _check_sampling(request.sampling)
    _check_stopping(request, vocab_size, max_stop_strings)
    _check_prompt(request, vocab_size, max_model_len)


def output_budget(field: str, prompt_tokens: int, max_tokens: int | None, max_model_len: int) -> int:
    """The most tokens to generate: `max_tokens`, or what the context has left. Raises InvalidRequest, for the
    prompt's `field`, when the prompt leaves no room, and for max_tokens when it asks for more than is left."""
    if prompt_tokens == 0:
        raise InvalidRequest(field, "is empty")
    left = max_model_len - prompt_tokens
    if left <= 0:
        raise InvalidRequest(
            field,
            f"has {prompt_tokens} tokens; the limit is {max_model_len - 1}, as prompt and answer share a context of "
            f"{max_model_len} tokens",
        )
    if max_tokens is None:
        return left
    if max_tokens > left:
        raise InvalidRequest(
            "stopping.max_tokens",
            f"is {max_tokens}, but the prompt's {prompt_tokens} tokens leave {left} of the context of {max_model_len}",
        )
    return max_tokens


def check_known(field: str, tokens: list[int], vocab_size: int) -> None:
    """Of what a tokenizer made of `field`: some have tokens that were added to them, and never to the model."""
    if (largest := max(tokens, default=0)) >= vocab_size:
        raise InvalidRequest(
            field,
            f"has the token {largest}, which the base's tokenizer has and the base has not: ids are below {vocab_size}",
        )


def _check_prompt(request: GenerateRequest, vocab_size: int, max_model_len: int) -> None:
    prompt = request.prompt
    if not prompt:
        raise InvalidRequest("text" if isinstance(prompt, str) else "prompt", "is empty")
    if isinstance(prompt[0], int):
        output_budget("token_ids", len(prompt), request.max_tokens, max_model_len)  # before looking at each
        _check_token_ids("token_ids", [token for token in prompt if isinstance(token, int)], vocab_size)
    elif not isinstance(prompt, str) and len(prompt) > max_model_len:  # before rendering each
        raise InvalidRequest("messages", f"has {len(prompt)} messages, more than the context of {max_model_len} tokens")


def _check_sampling(sampling: SamplingParams) -> None:
    _check("temperature", 0 <= sampling.temperature <= 2, sampling.temperature, "between 0 (greedy) and 2")
    _check("top_k", 0 <= sampling.top_k < 2**32, sampling.top_k, "at least 0 (off)")
    _check("top_p", 0 < sampling.top_p <= 1, sampling.top_p, "above 0 and at most 1 (off)")
    _check("min_p", 0 <= sampling.min_p <= 1, sampling.min_p, "between 0 (off) and 1")
    penalty = sampling.repetition_penalty
    _check("repetition_penalty", 0 < penalty <= 10, penalty, "above 0 and at most 10; 1 is off")
    for name in ("presence_penalty", "frequency_penalty"):
        penalty = getattr(sampling, name)
        _check(name, -2 <= penalty <= 2, penalty, "between -2 and 2; 0 is off")
    if sampling.seed is not None:
        _check("seed", 0 <= sampling.seed < 2**63, sampling.seed, "at least 0 and below 2^63")
    if sampling.logprobs is not None:
        _check("logprobs", 0 <= sampling.logprobs <= MAX_LOGPROBS, sampling.logprobs, f"between 0 and {MAX_LOGPROBS}")


def _check(name: str, is_valid: bool, value: float, range_: str) -> None:
    """A NaN fails every comparison, and so is never valid."""
    if not is_valid:
        raise InvalidRequest(f"sampling.{name}", f"is {value}; it must be {range_}")


def _check_stopping(request: GenerateRequest, vocab_size: int, max_stop_strings: int) -> None:
    if request.max_tokens is not None and request.max_tokens < 1:
        raise InvalidRequest("stopping.max_tokens", f"is {request.max_tokens}; it must be at least 1")
    strings = request.stop_strings
    if len(strings) > max_stop_strings:
        raise InvalidRequest("stopping.stop_strings", f"has {len(strings)} strings; the limit is {max_stop_strings}")
    for i, string in enumerate(strings):
        if not string:
            raise InvalidRequest(f"stopping.stop_strings[{i}]", "is empty")
        if len(string) > MAX_STOP_CHARS:
            raise InvalidRequest(
                f"stopping.stop_strings[{i}]", f"has {len(string)} characters; the limit is {MAX_STOP_CHARS}"
            )
    if len(request.stop_token_ids) > vocab_size:
        count = len(request.stop_token_ids)
        raise InvalidRequest("stopping.stop_token_ids", f"has {count} ids; the base has {vocab_size} tokens")
    _check_token_ids("stopping.stop_token_ids", request.stop_token_ids, vocab_size)


def _check_token_ids(field: str, ids: list[int] | tuple[int, ...], vocab_size: int) -> None:
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        i, token = next((i, token) for i, token in enumerate(ids) if not 0 <= token < vocab_size)
        raise InvalidRequest(f"{field}[{i}]", f"is {token}; token ids are at least 0 and below {vocab_size}")
