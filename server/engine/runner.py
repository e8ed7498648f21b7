"""Turns a plan into tensors, runs the model and draws tokens. Knows no queue and frees nothing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from server.engine.messages import TokenLogprob
from server.engine.plan import Chunk, Plan, Sampled
from server.engine.sampler import SampledBatch, Sampler
from server.engine.sequence import Sequence as SequenceState
from server.lora.batch import TokenSpan, build_lora_batch
from server.lora.pool import AdapterPool, Ranges
from server.model.attention import AttentionBackend, AttentionChunk
from server.model.batch import ForwardBatch
from server.model.kv_cache import KVCache
from server.model.transformer import Transformer


class DecodeGraphs(Protocol):
    """Decode steps, captured; `server.engine.graphs` on CUDA."""

    def holds(self, spans: Sequence[TokenSpan]) -> bool:
        """Whether some graph serves a decode batch of these adapters."""
        ...

    def run(
        self, rows: Sequence[int], chunks: Sequence[AttentionChunk], slots: Sequence[int], spans: Sequence[TokenSpan]
    ) -> tuple[Tensor, Tensor]:
        """Logits [n, vocab] of the tokens last drawn for these sampler rows, and the likeliest tokens [n], which are
        the rows' last tokens now. Valid until the next call."""
        ...


@dataclass(frozen=True, slots=True)
class StepHandle:
    """A step under way, over once `done` has passed (None: already); then `drawn` is on the host. Later steps are not
    awaited."""

    chunks: tuple[Chunk, ...]
    drawn: SampledBatch | None
    done: torch.cuda.Event | None

    def result(self) -> list[Sampled]:
        """One for each chunk that draws a token, in the plan's order. Waits for the device even where nothing is drawn:
        what the step reads may go to others then."""
        if self.done is not None:
            self.done.synchronize()
        if self.drawn is None:
            return []
        tokens: list[int] = self.drawn.tokens.tolist()
        if self.drawn.logprobs is None:
            return [Sampled(token, None) for token in tokens]
        logprobs = _token_logprobs(self.chunks, self.drawn)
        return [Sampled(token, logprob) for token, logprob in zip(tokens, logprobs, strict=True)]


class Runner:
    """Executes plans on one device. `rows_of` gives the pool's rows of a sequence's low-rank term; `graphs` runs
    the steps that only decode, where there are any."""

    def __init__(
        self,
        model: Transformer,
        cache: KVCache,
        attention: AttentionBackend,
        sampler: Sampler,
        pool: AdapterPool,
        rows_of: Callable[[SequenceState], Ranges | None],
        graphs: DecodeGraphs | None = None,
    ) -> None:
        self._model = model
        self._cache = cache
        self._attention = attention
        self._sampler = sampler
        self._pool = pool
        self._rows_of = rows_of
        self._graphs = graphs
        self._device = cache.k.device

    @torch.inference_mode()
    def execute(self, plan: Plan) -> StepHandle:
        """Start a step; on a CPU it is over on return, on a GPU its kernels are queued."""
        for seq in plan.admitted:
            assert seq.row is not None, f"{seq.request_id} admitted without a row"
            self._sampler.admit(seq.row, seq.sampling, seq.prompt, seq.output)
        replayed = self._replay(plan) if plan.num_decodes == len(plan.chunks) else None
        logits, likeliest = replayed or (self._model.forward(self._batch(plan), self._cache), None)
        drawing = tuple(chunk for chunk in plan.chunks if chunk.samples)
        drawn = None
        if drawing:
            rows = [_row(chunk) for chunk in drawing]
            drawn = self._sampler.sample(logits, rows, [chunk.output_index for chunk in drawing], likeliest)
        return self._handle(drawing, drawn)

    def _replay(self, plan: Plan) -> tuple[Tensor, Tensor] | None:
        """Logits and likeliest tokens of a step that only decodes; None where no graph serves it."""
        spans = [self._span(chunk) for chunk in plan.chunks]
        if self._graphs is None or not self._graphs.holds(spans):
            return None
        return self._graphs.run(
            [_row(chunk) for chunk in plan.chunks],
            [AttentionChunk(chunk.start, 1, chunk.seq.pages) for chunk in plan.chunks],
            [self._slot(chunk, chunk.start) for chunk in plan.chunks],
            spans,
        )

    def _slot(self, chunk: Chunk, position: int) -> int:
        """Where the cache holds the token at a position of the sequence."""
        page_size = self._cache.page_size
        return chunk.seq.pages[position // page_size] * page_size + position % page_size

    def _span(self, chunk: Chunk) -> TokenSpan:
        return TokenSpan(chunk.length, self._rows_of(chunk.seq))

    def _handle(self, drawing: tuple[Chunk, ...], drawn: SampledBatch | None) -> StepHandle:
        if self._device.type == "cpu":
            return StepHandle(drawing, drawn, None)
        on_host = None if drawn is None else _on_host(drawn)
        done = torch.cuda.Event()
        done.record()
        return StepHandle(drawing, on_host, done)

    def _batch(self, plan: Plan) -> ForwardBatch:
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        sample_index: list[int] = []
        pending: list[tuple[int, int]] = []  # (index in the batch, row) of tokens that only the device knows yet
        attention: list[AttentionChunk] = []
        spans: list[TokenSpan] = []
        for chunk in plan.chunks:
            seq = chunk.seq
            known = seq.tokens(chunk.start, chunk.stop)
            ids += known
            if len(known) < chunk.length:
                assert len(known) == chunk.length - 1, f"{seq.request_id}: more than one token is not known"
                pending.append((len(ids), _row(chunk)))
                ids.append(0)
            positions += range(chunk.start, chunk.stop)
            slots += [self._slot(chunk, position) for position in range(chunk.start, chunk.stop)]
            if chunk.samples:
                sample_index.append(len(ids) - 1)
            attention.append(AttentionChunk(chunk.start, chunk.length, seq.pages))
            spans.append(self._span(chunk))
        split = plan.num_decodes
        return ForwardBatch(
            input_ids=self._input_ids(ids, pending),
            positions=self._tensor(positions),
            slots=self._tensor(slots),
            sample_index=self._tensor(sample_index),
            attention=self._attention.plan(attention[:split], attention[split:]),
            lora=build_lora_batch(self._pool, spans[:split], spans[split:]),
        )

    def _input_ids(self, ids: list[int], pending: list[tuple[int, int]]) -> Tensor:
        tensor = self._tensor(ids)
        if pending:
            index, rows = zip(*pending, strict=True)
            tensor[self._tensor(index)] = self._sampler.last_tokens[self._tensor(rows)]
        return tensor

    def _tensor(self, values: Sequence[int]) -> Tensor:
        tensor = torch.tensor(values, dtype=torch.int64)
        return tensor if self._device.type == "cpu" else tensor.pin_memory().to(self._device, non_blocking=True)


def _row(chunk: Chunk) -> int:
    assert chunk.seq.row is not None, f"{chunk.seq.request_id} runs without a row"
    return chunk.seq.row


def _on_host(drawn: SampledBatch) -> SampledBatch:
    """Copies, there when the stream has come so far."""
    fields = (drawn.tokens, drawn.logprobs, drawn.top_ids, drawn.top_logprobs)
    tokens, *rest = (None if field is None else _to_host(field) for field in fields)
    assert tokens is not None, "tokens are always drawn"
    return SampledBatch(tokens, *rest)


def _to_host(tensor: Tensor) -> Tensor:
    """A copy in pinned memory, there likewise."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _token_logprobs(chunks: Sequence[Chunk], drawn: SampledBatch) -> list[TokenLogprob | None]:
    """Each chunk's log-probabilities, with as many alternatives as its request asked for."""
    assert drawn.logprobs is not None, "no log-probabilities were computed"
    logprobs: list[float] = drawn.logprobs.tolist()
    top_ids = [[] for _ in chunks] if drawn.top_ids is None else drawn.top_ids.tolist()
    top = [[] for _ in chunks] if drawn.top_logprobs is None else drawn.top_logprobs.tolist()
    result: list[TokenLogprob | None] = []
    for chunk, logprob, ids, values in zip(chunks, logprobs, top_ids, top, strict=True):
        wanted = chunk.seq.sampling.logprobs
        pairs = list(zip(ids, values, strict=True))
        result.append(None if wanted is None else TokenLogprob(logprob, pairs[:wanted]))
    return result
