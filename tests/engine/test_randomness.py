"""The counter-based generator against splitmix64's published outputs, and its uniformity."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from server.engine.randomness import splitmix64, uniform


def test_splitmix64_gives_the_published_sequence() -> None:
    # The test vector of the reference implementation (prng.di.unimi.it/splitmix64.c) for the state 1234567.
    assert [splitmix64(1234567, i) for i in range(5)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@given(seed=st.integers(-(2**70), 2**70), step=st.integers(0, 2**40))
def test_uniform_lies_in_the_unit_interval_and_repeats(seed: int, step: int) -> None:
    value = uniform(seed, step)
    assert 0 <= value < 1
    assert value == uniform(seed, step)


def test_draws_are_uniform_along_the_steps_and_along_the_seeds() -> None:
    along_steps = np.array([uniform(7, step) for step in range(40_000)])
    along_seeds = np.array([uniform(seed, 3) for seed in range(40_000)])
    for draws in (along_steps, along_seeds):
        counts = np.histogram(draws, bins=64, range=(0, 1))[0]
        chi_square = float(((counts - 625) ** 2 / 625).sum())
        assert chi_square < 120  # 63 degrees of freedom: p < 2e-5 above; the draws are fixed
        neighbours = float(np.corrcoef(draws[:-1], draws[1:])[0, 1])
        assert abs(neighbours) < 0.02
    assert abs(float(np.corrcoef(along_steps, along_seeds)[0, 1])) < 0.02
