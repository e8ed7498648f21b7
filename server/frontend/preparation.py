"""From a request as the client asked for it to one that the engine can run: checked, tokenized, with a budget."""

import asyncio
import secrets
from dataclasses import dataclass

from msgspec.structs import replace

from adapters.versions import Version
from server.base.resolve import BaseModel
from server.engine.messages import AdapterRef, Ready, Submit
from server.frontend.completion import Completion
from server.frontend.detokenizer import Detokenizer, TokenBytes
from server.frontend.stop_strings import StopStrings
from server.frontend.tokenizer import Tokenizer
from server.frontend.types import GenerateRequest
from server.frontend.validation import check_known, check_request, output_budget

# Characters that take about a millisecond to encode; longer prompts are encoded in a thread.
_ENCODE_INLINE = 2048

# Characters of stop strings whose automaton takes about a millisecond to make; for more it is made in a thread.
_STOP_INLINE = 500

# What rendering a message of a conversation takes beside its text, in such characters.
_MESSAGE_CHARACTERS = 32


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that can be submitted, and what makes its answer of the engine's tokens."""

    submit: Submit
    completion: Completion


class Preparation:
    """Knows the base's tokenizer. Raises BaseModelError when that, or the chat template, cannot be read."""

    def __init__(self, base: BaseModel, max_stop_strings: int) -> None:
        self._vocab_size = base.spec.vocab_size
        self._max_stop_strings = max_stop_strings
        self._tokenizer = Tokenizer.load(base.path)
        self._token_bytes = TokenBytes(self._tokenizer.backend)

    def encode_probe(self, text: str) -> list[int]:
        """The text of a merge's probe as tokens. Raises InvalidRequest for one that the base does not know."""
        tokens = self._tokenizer.encode_text(text, len(text) + 1)
        check_known("probe_text", tokens, self._vocab_size)
        return tokens

    def check(self, request: GenerateRequest, info: Ready) -> None:
        """Raises InvalidRequest for what is wrong whatever the adapter and the tokens of the prompt."""
        check_request(
            request,
            vocab_size=self._vocab_size,
            max_model_len=info.max_model_len,
            max_stop_strings=self._max_stop_strings,
        )

    async def prepare(
        self, request: GenerateRequest, info: Ready, request_id: str, version: Version | None
    ) -> Prepared:
        """Of a checked request, for an adapter or (None) the base. Raises InvalidRequest when the prompt does not
        fit, or has a token that the base does not know."""
        field, prompt = await self._encode(request, info.max_model_len)
        check_known(field, prompt, self._vocab_size)
        max_tokens = output_budget(field, len(prompt), request.max_tokens, info.max_model_len)
        sampling = request.sampling
        if sampling.seed is None:  # chosen here, so that a sequence that is computed again draws the same tokens
            sampling = replace(sampling, seed=secrets.randbits(63))
        submit = Submit(
            request_id=request_id,
            prompt=prompt,
            sampling=sampling,
            stopping=request.stop_params(max_tokens),
            adapter=None if version is None else reference(version),
        )
        completion = Completion(
            Detokenizer(self._token_bytes, prompt),
            await self._stop_strings(request.stop_strings),
            "" if version is None else version.digest,
            len(prompt),
            _trained_otherwise(version, info),
        )
        return Prepared(submit, completion)

    async def _stop_strings(self, strings: tuple[str, ...]) -> StopStrings | None:
        if sum(map(len, strings)) > _STOP_INLINE:
            return await asyncio.to_thread(StopStrings, strings)
        return StopStrings(strings) if strings else None

    async def _encode(self, request: GenerateRequest, max_tokens: int) -> tuple[str, list[int]]:
        """The field that holds the prompt, and its tokens. A long one is encoded in a thread, one that is far too
        long not at all."""
        prompt = request.prompt
        if isinstance(prompt, str):
            if len(prompt) > _ENCODE_INLINE:
                return "text", await asyncio.to_thread(self._tokenizer.encode_text, prompt, max_tokens)
            return "text", self._tokenizer.encode_text(prompt, max_tokens)
        token_ids = [token for token in prompt if isinstance(token, int)]
        messages = [message for message in prompt if not isinstance(message, int)]
        if token_ids:
            return "token_ids", token_ids
        if sum(_MESSAGE_CHARACTERS + len(turn.role) + len(turn.content) for turn in messages) > _ENCODE_INLINE:
            return "messages", await asyncio.to_thread(self._tokenizer.encode_chat, messages, max_tokens)
        return "messages", self._tokenizer.encode_chat(messages, max_tokens)


def _trained_otherwise(version: Version | None, info: Ready) -> str:
    """What the base was held in when the adapter was trained, if that is known and not what it is held in now."""
    training = version.manifest.training if version is not None else None
    if training is None or training.held_base == (info.quantization or "none"):
        return ""
    return training.held_base


def reference(version: Version) -> AdapterRef:
    """A version whose files are held, as the engine is to hear of it."""
    return AdapterRef(version.digest, str(version.path))
