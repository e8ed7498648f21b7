"""One request inside the engine: its tokens, its place in the cache and its marks in time. Plain data; no tensor."""

from dataclasses import dataclass, field
from enum import Enum

from server.engine.messages import AdapterRef, SamplingParams, Serving, StopParams, Timings


class State(Enum):
    """Where a sequence stands. PREEMPTED and ENDED ones keep what they hold until no uncommitted plan uses it."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    ENDED = "ended"


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens are `prompt` followed by `output`; positions count through both.

    `row` is the sampler's row and `pages` the KV pages in order of position (page i holds positions
    [i * page_size, (i + 1) * page_size)); a waiting sequence has neither. `num_computed` counts the leading tokens
    whose KV is in the cache or planned to be. `num_pending` counts planned draws that are not committed: at most
    one when `Scheduler.schedule` begins, two between it and the commit of the plan before. Times are the
    scheduler's clock in seconds. Only the scheduler and the page manager write to a sequence once it is added.
    """

    request_id: str
    prompt: list[int]
    sampling: SamplingParams
    stopping: StopParams
    submitted_at: float
    adapter: AdapterRef | None = None
    output: list[int] = field(default_factory=list)
    state: State = State.WAITING
    row: int | None = None
    pages: list[int] = field(default_factory=list)
    page_keys: list[bytes] = field(
        default_factory=list
    )  # prefix-cache keys of the leading full pages, made when needed
    num_published: int = 0  # leading pages already offered to (or taken from) the prefix cache
    num_computed: int = 0
    num_pending: int = 0
    num_cached: int = 0  # prompt tokens found in the prefix cache when first admitted
    in_flight: int = 0  # uncommitted plans with a chunk of this sequence
    is_decoding: bool = False  # the chunk that ends the prefill is planned: what follows are decodes
    merged: str | None = None  # the adapter that was in the base's weights when this was admitted, by digest
    load_seconds: float = 0.0
    scheduled_at: float | None = None
    first_token_at: float | None = None

    @property
    def digest(self) -> str:
        """The adapter's content digest, "" for the base: what leases and fairness are keyed by."""
        return "" if self.adapter is None else self.adapter.digest

    @property
    def serving(self) -> Serving:
        """How it is served, from its admission to its end."""
        if self.merged is None:
            return Serving.UNMERGED
        return Serving.MERGED if self.merged == self.digest else Serving.COMPENSATED

    @property
    def kv_key(self) -> str:
        """What its KV is keyed by: its digest, and what else changes the KV's bits."""
        return self.digest if self.merged is None else f"{self.digest} on {self.merged}"

    @property
    def num_known(self) -> int:
        """Tokens whose values are known here: prompt and committed output."""
        return len(self.prompt) + len(self.output)

    @property
    def num_tokens(self) -> int:
        """All tokens, the pending ones (known to the device only) too."""
        return len(self.prompt) + len(self.output) + self.num_pending

    def tokens(self, start: int, stop: int) -> list[int]:
        """The known tokens at positions [start, stop)."""
        num_prompt = len(self.prompt)
        if stop <= num_prompt:
            return self.prompt[start:stop]
        return self.prompt[start:num_prompt] + self.output[max(start - num_prompt, 0) : stop - num_prompt]

    def ends_with_pending(self, max_model_len: int) -> bool:
        """Whether the pending token is certainly the last, whatever it is."""
        return len(self.output) + self.num_pending >= self.stopping.max_tokens or self.num_tokens >= max_model_len

    def finish_reason(self, eos_token_ids: frozenset[int], max_model_len: int) -> str | None:
        """Why the sequence ends with its last output, None if it goes on."""
        token = self.output[-1]
        if token in self.stopping.stop_token_ids or (token in eos_token_ids and not self.stopping.ignore_eos):
            return "stop"
        if len(self.output) >= self.stopping.max_tokens or self.num_known >= max_model_len:
            return "length"
        return None

    def timings(self, now: float) -> Timings:
        """Where the time of a sequence went that drew its last token now."""
        assert self.scheduled_at is not None, "it ran"
        assert self.first_token_at is not None, "it drew a token"
        return Timings(
            queue=self.scheduled_at - self.submitted_at,
            load=self.load_seconds,
            prefill=self.first_token_at - self.scheduled_at,
            decode=now - self.first_token_at,
        )
