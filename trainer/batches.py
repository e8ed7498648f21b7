"""Which examples make a step, and a batch's tensors."""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainer.encoding import Example
from trainer.packing import pack

WINDOW = 16  # batches that are sorted by length together: little padding, still a different mix every epoch
PAD_TO = 8  # tokens; what the matrix units of a GPU like

Sequences = list[list[Example]]  # the rows of a step, each with the examples packed into it


@dataclass(frozen=True, slots=True)
class Segments:
    """Where the examples packed into flattened rows begin and end; padding counts as one. None attends to another."""

    bounds: Tensor  # [examples + 1] int32
    longest: int

    @classmethod
    def of(cls, position_ids: Tensor) -> "Segments":
        """From positions [rows, length] that begin at 0 with every example."""
        starts = (position_ids.flatten() == 0).nonzero().flatten()
        bounds = torch.cat([starts, starts.new_full((1,), position_ids.numel())]).int()
        return cls(bounds, int(bounds.diff().max()))

    def to(self, device: torch.device) -> "Segments":
        """On `device`."""
        return Segments(self.bounds.to(device, non_blocking=True), self.longest)


@dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded rows, without an attention mask: what is on the right is never seen from the left.

    `position_ids` is None where each row is one example; else it restarts with every example (and with the padding),
    which is how transformers knows that none of them attends to another.
    """

    ids: Tensor  # [rows, length] int64
    position_ids: Tensor | None  # [rows, length] int64
    places: Tensor  # [learned] int64: where in the flattened rows a learned token is predicted
    targets: Tensor  # [learned] int64: those tokens
    num_tokens: int  # without padding
    segments: Segments | None = None  # what `position_ids` say

    def to(self, device: torch.device) -> "Batch":
        """On `device`."""
        position_ids = None if self.position_ids is None else self.position_ids.to(device, non_blocking=True)
        ids, places, targets = (t.to(device, non_blocking=True) for t in (self.ids, self.places, self.targets))
        segments = None if self.segments is None else self.segments.to(device)
        return Batch(ids, position_ids, places, targets, self.num_tokens, segments)


@dataclass(frozen=True, slots=True)
class Position:
    """Where in the data a run is: windows of the epoch and steps of the window that are behind it."""

    epoch: int = 0
    window: int = 0
    step: int = 0


@dataclass(frozen=True, slots=True)
class StepData:
    """The rows of one step, the place after it, and whether it ends its epoch."""

    rows: Sequences
    epoch: int
    after: Position
    ends_epoch: bool


Windows = Callable[[int], Iterable[Sequence[Example]]]  # the windows of an epoch, from the given one on


class Feed:
    """The steps of a run in their order, from any place on. Nothing but seed and place decides what comes.

    `windows` gives the data in pieces that are mixed each by itself: all of it at once, or a stream's buffers.
    """

    def __init__(self, windows: Windows, *, batch_size: int, pack_to: int | None, seed: int) -> None:
        self._windows = windows
        self._batch_size = batch_size
        self._pack_to = pack_to
        self._seed = seed

    def steps(self, start: Position) -> Iterator[StepData]:
        """Steps for ever, epoch after epoch; ends only where an epoch has none."""
        epoch, first, skip = start.epoch, start.window, start.step
        while True:
            is_empty = True
            pending: StepData | None = None  # one step behind, to know which is an epoch's last
            for number, examples in enumerate(self._windows(first), first):
                steps = self._mix(examples, epoch, number)
                for index in range(skip, len(steps)):
                    if pending:
                        yield pending
                    rows = [[examples[i] for i in row] for row in steps[index]]
                    pending = StepData(rows, epoch, Position(epoch, number, index + 1), ends_epoch=False)
                    is_empty = False
                skip = 0
            if pending:
                yield StepData(pending.rows, epoch, Position(epoch + 1), ends_epoch=True)
            if is_empty and first == 0:
                return
            epoch, first, skip = epoch + 1, 0, 0

    def _mix(self, examples: Sequence[Example], epoch: int, window: int) -> list[list[list[int]]]:
        """Steps of rows of indexes of `examples`."""
        rng = random.Random(f"{self._seed} {epoch} {window}")
        lengths = [len(example) for example in examples]
        if self._pack_to is None:
            return [[[index] for index in batch] for batch in group_by_length(lengths, self._batch_size, rng)]
        order = list(range(len(lengths)))
        rng.shuffle(order)
        rows = [[order[i] for i in part] for part in pack([lengths[i] for i in order], self._pack_to)]
        rng.shuffle(rows)
        return [rows[i : i + self._batch_size] for i in range(0, len(rows), self._batch_size)]

    def num_steps(self, examples: Sequence[Example]) -> int:
        """Steps of an epoch whose one window `examples` is."""
        if self._pack_to is None:
            return -(-len(examples) // self._batch_size)
        return -(-len(pack([len(example) for example in examples], self._pack_to)) // self._batch_size)


def share(rows: Sequences, rank: int, size: int, at_once: int) -> Iterator[Sequences]:
    """The micro-batches, of up to `at_once` of a step's `rows`, of process `rank` of `size`: every so-manieth row.

    All processes get as many, so that those which exchange weights in a pass stay together: one that lacks rows gets
    one with nothing to learn.
    """
    own = rows[rank::size]
    for start in range(0, len(rows[::size]), at_once):
        yield own[start : start + at_once] or [[Example.of([0, 0], [False, False])]]


def group_by_length(lengths: Sequence[int], batch_size: int, rng: random.Random) -> list[list[int]]:
    """Indexes in batches of at most `batch_size`, each index once; rows of a batch are of similar length."""
    order = list(range(len(lengths)))
    rng.shuffle(order)
    window = batch_size * WINDOW
    batches: list[list[int]] = []
    for start in range(0, len(order), window):
        part = sorted(order[start : start + window], key=lambda index: lengths[index])
        batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    rng.shuffle(batches)
    return batches


def num_learned(rows: Sequences) -> int:
    """Tokens of `rows` that are learned."""
    return sum(int(example.mask.sum()) for row in rows for example in row)


def collate(rows: Sequences, pad_id: int, *, pad_to: int = 1) -> Batch:
    """Put each row's examples one after the other and pad rows to the longest, and that to a multiple of `pad_to`."""
    longest = max(sum(map(len, row)) for row in rows)
    length = -(-longest // pad_to) * pad_to
    ids = np.full((len(rows), length), pad_id, dtype=np.int64)
    mask = np.zeros((len(rows), length), dtype=np.bool_)
    position_ids = np.zeros((len(rows), length), dtype=np.int64)
    for number, row in enumerate(rows):
        end = 0
        for example in row:
            begin, end = end, end + len(example)
            ids[number, begin:end] = example.ids
            mask[number, begin:end] = example.mask
            position_ids[number, begin:end] = np.arange(len(example))
        position_ids[number, end:] = np.arange(length - end)
    learned = np.flatnonzero(mask)
    packed = torch.from_numpy(position_ids) if any(len(row) > 1 for row in rows) else None
    return Batch(
        ids=torch.from_numpy(ids),
        position_ids=packed,
        places=torch.from_numpy(learned - 1),  # no row's first token is learned, so this stays within its row
        targets=torch.from_numpy(ids.reshape(-1)[learned]),
        num_tokens=sum(len(example) for row in rows for example in row),
        segments=None if packed is None else Segments.of(packed),
    )
