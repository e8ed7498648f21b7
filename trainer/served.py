"""The server's own forward pass in this process: what an adapter does when it is served, as losses and as answers.

Nothing is computed here but what the server computes: its weights' layout and dtype, its reading and checking of an
adapter, its low-rank term, its attention over paged keys and values. The scheduler alone is missing.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from server.base.quantization import Quantization
from server.base.spec import ModelSpec
from server.engine.canary import Canary
from server.lora.batch import TokenSpan, build_lora_batch
from server.lora.pool import AdapterPool, Ranges
from server.lora.weights import load_adapter
from server.model.attention import AttentionChunk, TorchAttention
from server.model.batch import ForwardBatch
from server.model.kv_cache import KVCache
from server.model.loader import DTYPES, load_weights
from server.model.transformer import Transformer

PAGE_SIZE = 16
STEP_TOKENS = 1024  # of one forward pass: what their logits take is bounded
BATCH_ROWS = 32  # sequences that generate at once


class Tokens(Protocol):
    """A row: token ids, and for each whether it is learned (predicted from those before it). Tuples or arrays."""

    @property
    def ids(self) -> Any: ...

    @property
    def mask(self) -> Any: ...


@dataclass(frozen=True, slots=True)
class Loss:
    """Cross entropy in nats over `num_tokens` learned tokens."""

    total: float
    num_tokens: int

    @property
    def mean(self) -> float:
        return self.total / self.num_tokens

    @classmethod
    def sum(cls, losses: "Sequence[Loss]") -> Self:
        """Of all rows together."""
        return cls(sum(loss.total for loss in losses), sum(loss.num_tokens for loss in losses))


@dataclass(frozen=True, slots=True)
class ServedAdapter:
    """An adapter in the memory that the server's kernels read."""

    pool: AdapterPool
    rows: Ranges


@dataclass(frozen=True, slots=True)
class _Part:
    """Tokens [start, start + len(ids)) of a sequence; `wanted` are those of `ids` whose logits are."""

    ids: Sequence[int]
    start: int
    pages: range
    wanted: Sequence[int]


class ServedBase:
    """A base as the server holds it, in 4 bits with `quantization`. Raises BaseModelError where the server would."""

    def __init__(
        self, directory: Path, spec: ModelSpec, device: torch.device, quantization: Quantization | None = None
    ) -> None:
        self.spec = spec
        self.device = device
        self.dtype = DTYPES[spec.dtype]  # as `lorikeet serve` without --dtype
        weights = load_weights(directory, spec, self.dtype, device, quantization)
        self._model = Transformer(spec, weights, spec.max_position)
        self._attention = TorchAttention(spec.softmax_scale, spec.num_kv_heads, PAGE_SIZE, device)

    def load_adapter(self, directory: Path) -> ServedAdapter:
        """Read, check and place a PEFT directory as the server does, its canary too. Raises InvalidAdapter kinds."""
        packed = load_adapter(directory, self.spec, self.dtype)
        row_bytes = packed.num_bytes // packed.rank
        pool = AdapterPool(self.spec, row_bytes * (packed.rank + PAGE_SIZE), self.dtype, self.device)
        rows = pool.allocate(packed.rank)
        assert rows is not None, "the pool was made for this adapter"
        pool.write(rows, packed)
        Canary(self._model, pool, self.spec.max_position).check(directory, rows)
        return ServedAdapter(pool, rows)

    @torch.inference_mode()
    def losses(self, rows: Sequence[Tokens], adapter: ServedAdapter | None = None) -> list[Loss]:
        """Each row's loss on its learned tokens, in the order given."""
        groups = list(_groups([len(row.ids) for row in rows]))
        cache = self._cache(max(sum(_num_pages(len(rows[index].ids)) for index in group) for group in groups))
        losses: list[Loss] = []
        for group in groups:
            losses += self._losses([rows[index] for index in group], adapter, cache)
        return losses

    def _losses(self, rows: Sequence[Tokens], adapter: ServedAdapter | None, cache: KVCache) -> list[Loss]:
        """Rows that fit one step, or one longer row."""
        parts: list[_Part] = []
        first_page = 0
        for row in rows:
            pages = range(first_page, first_page + _num_pages(len(row.ids)))
            first_page = pages.stop
            for start in range(0, len(row.ids), STEP_TOKENS):
                ids = [int(token) for token in row.ids[start : start + STEP_TOKENS]]
                learned = row.mask[start + 1 : start + 1 + len(ids)]  # place t predicts token t + 1
                parts.append(_Part(ids, start, pages, [place for place, wanted in enumerate(learned) if wanted]))
        steps = [parts] if len(rows) > 1 else [[part] for part in parts]
        nats = torch.cat([self._nats(step, rows, adapter, cache) for step in steps])
        counts = [sum(bool(learned) for learned in row.mask[1:]) for row in rows]
        return [Loss(float(part.sum()), count) for part, count in zip(nats.split(counts), counts, strict=True)]

    def _nats(
        self, parts: Sequence[_Part], rows: Sequence[Tokens], adapter: ServedAdapter | None, cache: KVCache
    ) -> Tensor:
        """[wanted of all parts] float32; part i is of row i, or all are of the one row."""
        owners = rows if len(rows) > 1 else [rows[0]] * len(parts)
        targets = [
            int(row.ids[part.start + place + 1])
            for part, row in zip(parts, owners, strict=True)
            for place in part.wanted
        ]
        logits = self._forward(parts, adapter, cache)
        return F.cross_entropy(logits.float(), self._tensor(targets), reduction="none").cpu()

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        end_ids: Collection[int],
        adapter: ServedAdapter | None = None,
    ) -> list[list[int]]:
        """Greedy answers, in the order of the prompts, without the token that ended them."""
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        answers: list[list[int]] = [[] for _ in prompts]
        for first in range(0, len(order), BATCH_ROWS):
            batch = order[first : first + BATCH_ROWS]
            given = [prompts[index] for index in batch]
            for index, answer in zip(batch, self._generate(given, max_tokens, end_ids, adapter), strict=True):
                answers[index] = answer
        return answers

    def _generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        end_ids: Collection[int],
        adapter: ServedAdapter | None,
    ) -> list[list[int]]:
        size = _num_pages(max(map(len, prompts)) + max_tokens)
        pages = [range(row * size, (row + 1) * size) for row in range(len(prompts))]
        cache = self._cache(len(prompts) * size)
        answers: list[list[int]] = [[] for _ in prompts]
        drawn = self._prefill(prompts, pages, adapter, cache)
        live = list(range(len(prompts)))
        for _ in range(max_tokens):
            for row, token in zip(live, drawn, strict=True):
                answers[row].append(token)
            live = [row for row in live if answers[row][-1] not in end_ids and len(answers[row]) < max_tokens]
            if not live:
                break
            parts = [
                _Part(answers[row][-1:], len(prompts[row]) + len(answers[row]) - 1, pages[row], [0]) for row in live
            ]
            drawn = self._forward(parts, adapter, cache).argmax(-1).tolist()
        return [answer[:-1] if answer[-1] in end_ids else answer for answer in answers]

    def _prefill(
        self,
        prompts: Sequence[Sequence[int]],
        pages: Sequence[range],
        adapter: ServedAdapter | None,
        cache: KVCache,
    ) -> list[int]:
        """The first token of every answer."""
        drawn: list[int] = []
        for group in _groups([len(prompt) for prompt in prompts]):
            if len(group) > 1:
                whole = [_Part(prompts[row], 0, pages[row], [len(prompts[row]) - 1]) for row in group]
                drawn += self._forward(whole, adapter, cache).argmax(-1).tolist()
            else:
                drawn.append(self._prefill_alone(prompts[group[0]], pages[group[0]], adapter, cache))
        return drawn

    def _prefill_alone(self, prompt: Sequence[int], pages: range, adapter: ServedAdapter | None, cache: KVCache) -> int:
        for start in range(0, len(prompt), STEP_TOKENS):
            ids = prompt[start : start + STEP_TOKENS]
            logits = self._forward([_Part(ids, start, pages, [len(ids) - 1])], adapter, cache)
        return int(logits[-1].argmax())

    def _forward(self, parts: Sequence[_Part], adapter: ServedAdapter | None, cache: KVCache) -> Tensor:
        """Logits [wanted of all parts, vocab]. K and V of the parts go into the cache."""
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        wanted: list[int] = []
        for part in parts:
            stop = part.start + len(part.ids)
            wanted += [len(ids) + place for place in part.wanted]
            ids += part.ids
            positions += range(part.start, stop)
            slots += [part.pages[at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE for at in range(part.start, stop)]
        chunks = [AttentionChunk(part.start, len(part.ids), part.pages) for part in parts]
        split = len(chunks) if all(chunk.length == 1 for chunk in chunks) else 0  # all decode, or all are prompts
        lora = None
        if adapter is not None:
            spans = [TokenSpan(chunk.length, adapter.rows) for chunk in chunks]
            lora = build_lora_batch(adapter.pool, spans[:split], spans[split:])
        batch = ForwardBatch(
            input_ids=self._tensor(ids),
            positions=self._tensor(positions),
            slots=self._tensor(slots),
            sample_index=self._tensor(wanted),
            attention=self._attention.plan(chunks[:split], chunks[split:]),
            lora=lora,
        )
        return self._model.forward(batch, cache)

    def _cache(self, num_pages: int) -> KVCache:
        return KVCache.allocate(self.spec, num_pages, PAGE_SIZE, self.dtype, self.device)

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)


def _num_pages(num_tokens: int) -> int:
    return -(-num_tokens // PAGE_SIZE)


def _groups(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indexes in order, as many at once as fit a step; one that does not fit is alone."""
    group: list[int] = []
    total = 0
    for index, length in enumerate(lengths):
        if group and total + length > STEP_TOKENS:
            yield group
            group, total = [], 0
        group.append(index)
        total += length
    if group:
        yield group
