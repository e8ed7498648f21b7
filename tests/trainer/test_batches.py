"""Batches: every example once, little padding, tensors as documented."""

import random

import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.batches import collate, group_by_length
from trainer.encoding import Example


@given(st.lists(st.integers(1, 500), min_size=1, max_size=300), st.integers(1, 9), st.integers(0, 3))
def test_every_example_comes_once_in_full_batches(lengths: list[int], batch_size: int, seed: int) -> None:
    batches = group_by_length(lengths, batch_size, random.Random(seed))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert len(batches) == -(-len(lengths) // batch_size)
    assert batches == group_by_length(lengths, batch_size, random.Random(seed))


def test_grouping_spares_most_padding_and_epochs_differ() -> None:
    rng = random.Random(0)
    lengths = [rng.randint(10, 400) for _ in range(256)]
    one, two = (group_by_length(lengths, 8, rng) for _ in range(2))
    padded = sum(max(lengths[index] for index in batch) * len(batch) for batch in one)
    assert padded < 1.15 * sum(lengths)
    assert one != two


def test_a_batch_pads_on_the_right_and_predicts_the_learned_tokens() -> None:
    examples = [
        Example((5, 6, 7, 8), (False, True, False, True)),
        Example((9, 4), (False, True)),
    ]
    batch = collate(examples, pad_id=3, device=torch.device("cpu"))
    assert batch.ids.tolist() == [[5, 6, 7, 8], [9, 4, 3, 3]]
    assert batch.attention.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.positions.int().tolist() == [[1, 0, 1, 0], [1, 0, 0, 0]]
    assert batch.targets.tolist() == [6, 8, 4]
