"""Draws one token per sequence from its logits, on the device of the logits.

A sequence holds a row. `admit` puts the row's settings into device tensors; `sample` indexes them by row and
never waits for the device (on the CPU there is nothing to wait for). Which parts of the work are needed at all
is decided from the settings, which the host knows.

The order, as in transformers' `generate`: log-probabilities of the raw logits; repetition, then frequency and
presence penalties; temperature; top-k; top-p; min-p; one draw. Must not hold: sequences, stopping, text.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from server.engine import logits as ops
from server.engine.messages import SamplingParams
from server.engine.randomness import uniform


@dataclass(frozen=True, slots=True)
class SampledBatch:
    """What one step drew, on the device, in the order of the rows given.

    `tokens` [n] int64. `logprobs` [n] float32 and `top_ids` / `top_logprobs` [n, k] (int64 / float32, falling)
    are log-softmax of the raw logits, with k the most that any of these rows asked for: None if no row asked,
    and without meaning in rows that did not. A row that asked for fewer than k takes its first ones.
    """

    tokens: Tensor
    logprobs: Tensor | None = None
    top_ids: Tensor | None = None
    top_logprobs: Tensor | None = None


class Sampler:
    """The sampling state of `num_rows` rows. What penalties need (num_rows × vocab_size × 5 bytes) is allocated
    when the first row that has penalties is admitted."""

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device) -> None:
        self._num_rows = num_rows
        self._vocab_size = vocab_size
        self._device = device
        self._params: list[SamplingParams | None] = [None] * num_rows
        self._settings = torch.zeros(num_rows, 7, dtype=torch.float32, device=device)  # columns: see _settings_of
        self._last_tokens = torch.zeros(num_rows + 1, dtype=torch.int64, device=device)
        self._history: _History | None = None

    @property
    def last_tokens(self) -> Tensor:
        """[num_rows + 1] int64: the token last drawn for each row, and one for nobody's (`spare_row`); the same
        tensor for the sampler's life."""
        return self._last_tokens

    @property
    def spare_row(self) -> int:
        """A row that no sequence gets: that of a captured batch's padding."""
        return self._num_rows

    def admit(self, row: int, params: SamplingParams, prompt: Sequence[int], output: Sequence[int]) -> None:
        """Give `row` to a sequence. `output` is what it had drawn before (after a preemption), else empty."""
        assert params.seed is not None, "the seed is chosen before a sequence reaches the sampler"
        self._params[row] = params
        self._settings[row].copy_(self._to_device(_settings_of(params, self._vocab_size), torch.float32))
        if output:
            self._last_tokens[row].fill_(output[-1])
        if _is_penalised(params):
            if self._history is None:
                self._history = _History(self._num_rows, self._vocab_size, self._device)
            self._history.reset(row, self._to_device(prompt, torch.int64), self._to_device(output, torch.int64))

    def sample(
        self, logits: Tensor, rows: Sequence[int], steps: Sequence[int], likeliest: Tensor | None = None
    ) -> SampledBatch:
        """Draw one token for each of `rows` from `logits` [n, vocab_size] (any float dtype; not changed).

        `steps[i]` is the index of the token among its sequence's outputs: with the seed it decides the draw, so a
        sequence draws the same tokens alone, in any batch and after a preemption. Greedy ties go to the lowest id.
        `likeliest` [n] are the greedy tokens of `logits`, where they are known and `last_tokens` holds them already.
        """
        assert logits.shape == (len(rows), self._vocab_size), f"logits {tuple(logits.shape)} for {len(rows)} rows"
        batch = [_Entry(i, self._params_of(row), step) for i, (row, step) in enumerate(zip(rows, steps, strict=True))]
        penalised = [entry for entry in batch if _is_penalised(entry.params)]
        drawn = [entry for entry in batch if entry.params.temperature > 0]
        if likeliest is not None and not penalised and not drawn:
            return self._with_logprobs(likeliest, logits, batch)
        index = self._to_device(rows, torch.int64)  # [n]
        scores = self._penalise(logits, index, penalised) if penalised else logits
        largest, tokens = scores.max(dim=-1)  # [n]
        if drawn:
            tokens = self._draw(scores, largest, tokens, index, drawn)
        self._last_tokens[index] = tokens
        if penalised:
            at = self._positions(penalised)
            self._history_of_rows().add(index[at], tokens[at])
        return self._with_logprobs(tokens, logits, batch)

    def _penalise(self, logits: Tensor, index: Tensor, penalised: list["_Entry"]) -> Tensor:
        """Logits [n, vocab], those of the rows in `penalised` after their penalties."""
        at = self._positions(penalised)
        rows, history = index[at], self._history_of_rows()
        repetition, frequency, presence = _columns(self._settings[rows])[4:]
        x = _take(logits, at)
        if any(entry.params.repetition_penalty != 1 for entry in penalised):
            x = ops.penalise_repetition(x, history.is_seen[rows], repetition)
        if any(entry.params.frequency_penalty != 0 or entry.params.presence_penalty != 0 for entry in penalised):
            x = ops.penalise_counts(x, history.counts[rows], frequency, presence)
        return x if len(x) == len(logits) else logits.float().index_copy(0, at, x)

    def _draw(self, scores: Tensor, largest: Tensor, likeliest: Tensor, index: Tensor, drawn: list["_Entry"]) -> Tensor:
        """`likeliest` [n] (scores `largest` [n]), with the tokens of the rows in `drawn` replaced by drawn ones."""
        tokens = likeliest.clone()
        sorted_ = [entry for entry in drawn if entry.params.top_k > 0 or entry.params.top_p < 1]
        if sorted_:
            at = self._positions(sorted_)
            temperature, top_k, top_p, log_min_p, *_ = _columns(self._settings[index[at]])
            filters = ops.Filters(
                top_k,
                top_p,
                log_min_p,
                max_top_k=max(entry.params.top_k for entry in sorted_),
                has_free_top_p=any(entry.params.top_k == 0 for entry in sorted_),
            )
            x = _take(scores, at)
            tokens[at] = ops.draw_filtered(x, temperature, filters, self._uniforms(sorted_), likeliest[at])
        unsorted = [entry for entry in drawn if entry.params.top_k == 0 and entry.params.top_p >= 1]
        if unsorted:
            at = self._positions(unsorted)
            temperature, _, _, log_min_p, *_ = _columns(self._settings[index[at]])
            scaled = ops.scale(_take(scores, at), largest[at][:, None], temperature)
            tokens[at] = ops.draw(ops.weights_above(scaled, log_min_p), None, self._uniforms(unsorted), likeliest[at])
        return tokens

    def _with_logprobs(self, tokens: Tensor, logits: Tensor, batch: list["_Entry"]) -> SampledBatch:
        asking = [entry for entry in batch if entry.params.logprobs is not None]
        if not asking:
            return SampledBatch(tokens)
        at = self._positions(asking)
        x = _take(logits, at).float()
        log_total = x.logsumexp(dim=-1, keepdim=True)  # [m, 1]
        logprobs = tokens.new_zeros(len(tokens), dtype=torch.float32)
        logprobs[at] = (x.gather(1, tokens[at][:, None]) - log_total).squeeze(1)
        k = min(max(entry.params.logprobs or 0 for entry in asking), self._vocab_size)
        if k == 0:
            return SampledBatch(tokens, logprobs)
        top = x.topk(k, dim=-1)
        top_ids, top_logprobs = tokens.new_zeros(len(tokens), k), logprobs.new_zeros(len(tokens), k)
        top_ids[at] = top.indices
        top_logprobs[at] = top.values - log_total
        return SampledBatch(tokens, logprobs, top_ids, top_logprobs)

    def _params_of(self, row: int) -> SamplingParams:
        params = self._params[row]
        assert params is not None, f"row {row} was never admitted"
        return params

    def _history_of_rows(self) -> "_History":
        assert self._history is not None, "allocated when a row with penalties was admitted"
        return self._history

    def _positions(self, entries: list["_Entry"]) -> Tensor:
        """[m] int64: where these are in the batch."""
        return self._to_device([entry.position for entry in entries], torch.int64)

    def _uniforms(self, entries: list["_Entry"]) -> Tensor:
        """[m, 1] float64."""
        values = [uniform(entry.params.seed or 0, entry.step) for entry in entries]
        return self._to_device(values, torch.float64)[:, None]

    def _to_device(self, values: Sequence[float], dtype: torch.dtype) -> Tensor:
        """Values of the host as a tensor [len(values)], without waiting for the device."""
        is_cuda = self._device.type == "cuda"
        return torch.tensor(values, dtype=dtype, pin_memory=is_cuda).to(self._device, non_blocking=True)


@dataclass(frozen=True, slots=True)
class _Entry:
    """One row's part in a batch: where it is, its settings, and which of its draws this is."""

    position: int
    params: SamplingParams
    step: int


class _History:
    """Which tokens each row has seen (prompt and output), and how often its output has each."""

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device) -> None:
        self.is_seen = torch.zeros(num_rows, vocab_size, dtype=torch.bool, device=device)
        self.counts = torch.zeros(num_rows, vocab_size, dtype=torch.int32, device=device)

    def reset(self, row: int, prompt: Tensor, output: Tensor) -> None:
        self.is_seen[row].zero_().index_fill_(0, prompt, True).index_fill_(0, output, True)
        self.counts[row].zero_().index_add_(0, output, torch.ones_like(output, dtype=torch.int32))

    def add(self, rows: Tensor, tokens: Tensor) -> None:
        """tokens[i] was drawn for rows[i]; no row comes twice."""
        self.is_seen[rows, tokens] = True
        self.counts[rows, tokens] += 1


def _settings_of(params: SamplingParams, vocab_size: int) -> list[float]:
    """temperature, top_k, top_p, log(min_p), repetition, frequency, presence; each without effect where unused."""
    return [
        params.temperature,
        params.top_k if params.top_k < vocab_size else 0,
        params.top_p,
        math.log(params.min_p) if params.min_p > 0 else -math.inf,
        params.repetition_penalty,
        params.frequency_penalty,
        params.presence_penalty,
    ]


def _columns(settings: Tensor) -> tuple[Tensor, ...]:
    """Settings [m, 7] as columns [m, 1], in the order of _settings_of."""
    return settings[:, :, None].unbind(dim=1)


def _is_penalised(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1 or params.frequency_penalty != 0 or params.presence_penalty != 0


def _take(x: Tensor, positions: Tensor) -> Tensor:
    """x[positions]; `positions` rise and are distinct, so all of them are x itself."""
    return x if len(positions) == len(x) else x[positions]
