"""What one step computes, as the scheduler tells the runner. Plain data; no tensor."""

from dataclasses import dataclass

from server.engine.messages import TokenLogprob
from server.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, start + length) of a sequence; its last one's logits draw a token if `samples`."""

    seq: Sequence
    start: int
    length: int
    samples: bool

    @property
    def stop(self) -> int:
        """The position after the chunk's last: so many tokens of KV does its attention see."""
        return self.start + self.length

    @property
    def output_index(self) -> int:
        """Which of the sequence's outputs the chunk draws; the same however the sequence was batched or preempted."""
        return self.start + self.length - len(self.seq.prompt)


@dataclass(frozen=True, slots=True)
class Plan:
    """One step. The first `num_decodes` chunks are decodes: one token each, and that token is the one last drawn for
    the sequence's row (perhaps by a plan not yet committed: then only the device knows it). The rest are prefill
    chunks, whose tokens are all known. `admitted` are the sequences given a row by this plan."""

    chunks: tuple[Chunk, ...]
    num_decodes: int
    admitted: tuple[Sequence, ...]

    @property
    def num_tokens(self) -> int:
        return sum(chunk.length for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class Sampled:
    """One drawn token, and its log-probability where the request asked for it."""

    token: int
    logprob: TokenLogprob | None = None
