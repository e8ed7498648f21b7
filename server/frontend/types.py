"""What crosses between the RPC layer and the front end: plain values, no protobuf, no torch."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from server.engine.messages import (
    CallProgress,
    ResidentAdapter,
    SamplingParams,
    Serving,
    StopParams,
    Timings,
    TokenLogprob,
)

OnProgress = Callable[[CallProgress], None]


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation; `role` is what the chat template knows ("system", "user", "assistant")."""

    role: str
    content: str


Prompt = str | list[int] | list[ChatMessage]


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One generation as the client asked for it. `adapter_id` "" is the base; `max_tokens` None means what the
    context has left. Ranges are not yet checked."""

    request_id: str
    adapter_id: str
    prompt: Prompt
    sampling: SamplingParams
    max_tokens: int | None
    stop_strings: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def stop_params(self, max_tokens: int) -> StopParams:
        return StopParams(max_tokens, frozenset(self.stop_token_ids), self.ignore_eos)


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts; `cached_prompt_tokens` of the prompt's came from the prefix cache."""

    prompt_tokens: int
    cached_prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new since the last one. `adapter_digest` ("" for the base) is what really serves the request, `serving`
    how; neither changes within it. The first and the last have `usage` and `timings`, as they are then. The last one
    has `finish_reason` ("stop" or "length") and `trained_quantization`: what the base was held in when the adapter was
    trained, if that is known and is not what it is held in now, else ""."""

    text: str
    token_ids: list[int]
    adapter_digest: str
    logprobs: list[TokenLogprob] | None = None
    finish_reason: str | None = None
    usage: Usage | None = None
    timings: Timings | None = None
    serving: Serving = Serving.UNMERGED
    trained_quantization: str = ""


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """How a merge or an unmerge is made: `drain_seconds` are given to running requests, `force` merges however far
    that is from unmerged serving, as compared on `probe_text` ("": the server's own)."""

    drain_seconds: float = 60.0
    force: bool = False
    probe_text: str = ""


@dataclass(frozen=True, slots=True)
class Residency:
    """Where an adapter is, as of the engine's last snapshot: the tiers that hold it, the fastest first."""

    tiers: tuple[ResidentAdapter, ...] = ()

    @property
    def fastest(self) -> str:
        """One of "device", "host" and "disk"."""
        return self.tiers[0].tier if self.tiers else "disk"

    @property
    def pinned(self) -> bool:
        return any(tier.pinned for tier in self.tiers)

    @property
    def merged(self) -> bool:
        return any(tier.merged for tier in self.tiers)


def residencies(adapters: Iterable[ResidentAdapter]) -> dict[str, Residency]:
    """Digest → where it is, of all that are in memory."""
    tiers: dict[str, list[ResidentAdapter]] = {}
    for adapter in sorted(adapters, key=lambda adapter: adapter.tier != "device"):
        tiers.setdefault(adapter.digest, []).append(adapter)
    return {digest: Residency(tuple(found)) for digest, found in tiers.items()}
