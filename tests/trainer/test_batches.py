"""Batches: every example once, little padding, tensors as documented, the same from any place on."""

import random
from itertools import islice

from hypothesis import given
from hypothesis import strategies as st

from trainer.batches import Feed, Position, StepData, collate, group_by_length
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
    rows = [
        [Example.of((5, 6, 7, 8), (False, True, False, True))],
        [Example.of((9, 4), (False, True))],
    ]
    batch = collate(rows, pad_id=3)
    assert batch.ids.tolist() == [[5, 6, 7, 8], [9, 4, 3, 3]]
    assert batch.position_ids is None
    assert batch.places.tolist() == [0, 2, 4]
    assert batch.targets.tolist() == [6, 8, 4]
    assert batch.num_tokens == 6


def test_positions_restart_with_every_packed_example_and_with_the_padding() -> None:
    short = Example.of((9, 4), (True, True))
    batch = collate([[Example.of((5, 6, 7), (True, True, True)), short], [short]], pad_id=0, pad_to=4)
    assert batch.position_ids is not None
    assert batch.ids.tolist() == [[5, 6, 7, 9, 4, 0, 0, 0], [9, 4, 0, 0, 0, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2], [0, 1, 0, 1, 2, 3, 4, 5]]
    assert batch.targets.tolist() == [6, 7, 4, 4]  # no example's first token is predicted from its neighbour
    assert batch.places.tolist() == [0, 1, 3, 8]


def example(length: int) -> Example:
    return Example.of([length] * length, [True] * length)


def seen(step: StepData) -> tuple[object, ...]:
    return step.epoch, step.after, step.ends_epoch, [[len(part) for part in row] for row in step.rows]


@given(
    st.lists(st.lists(st.integers(2, 12), min_size=1, max_size=9), min_size=1, max_size=4),
    st.integers(1, 4),
    st.booleans(),
    st.integers(0, 30),
)
def test_a_feed_goes_on_from_any_place_as_if_it_had_come_by(
    windows: list[list[int]], batch_size: int, packed: bool, cut: int
) -> None:
    examples = [[example(length) for length in window] for window in windows]

    def feed() -> Feed:
        return Feed(lambda first: examples[first:], batch_size=batch_size, pack_to=12 if packed else None, seed=5)

    whole = list(islice(feed().steps(Position()), cut + 10))
    place = whole[cut - 1].after if cut else Position()
    assert [seen(s) for s in islice(feed().steps(place), 10)] == [seen(s) for s in whole[cut:]]
    lengths = [len(part) for s in whole if s.epoch == 0 for row in s.rows for part in row]
    if any(s.ends_epoch for s in whole):
        assert sorted(lengths) == sorted(length for window in windows for length in window)
        if len(windows) == 1:
            assert feed().num_steps(examples[0]) == sum(s.epoch == 0 for s in whole)
