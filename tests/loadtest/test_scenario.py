"""Scenarios: read, checked, and drawn from."""

import itertools
import math
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.draws import Draws
from loadtest.errors import LoadTestFailed, ScenarioError
from loadtest.play import locust_command, meet, split
from loadtest.scenario import (
    FOLDER,
    Adapters,
    Closed,
    Fixed,
    Lengths,
    Lognormal,
    Open,
    Scenario,
    Swap,
    Uniform,
    read_scenario,
)

NAMES = ["ada", "bob", "cyd", "dan"]


def scenario(**changes: object) -> Scenario:
    return Scenario(**{"name": "a test", "prompt": Fixed(5), "output": Fixed(7), **changes})  # type: ignore[arg-type]


def draws(played: Scenario, user: int = 0, names: list[str] = NAMES) -> Draws:
    return Draws(played, names, 1000, user, itertools.count().__next__)


def popularity(**fields: object) -> Counter[str]:
    drawn = draws(scenario(adapters=Adapters(**fields)))  # type: ignore[arg-type]
    return Counter(drawn.adapter() for _ in range(12_000))


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.toml")), ids=lambda file: file.stem)
def test_every_scenario_that_comes_along_is_one(file: Path) -> None:
    assert read_scenario(file.stem) == read_scenario(str(file))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "prompt"),
        ("prompt = 3", "prompt"),
        ("promt = {}", "promt"),
        ("seconds = 0", "seconds"),
        ("seconds = 4\nwarmup = 4", "warmup 4 leaves nothing"),
        ("[adapters]\npopularity = 'odd'", "adapters.popularity"),
        ("[adapters]\npopularity = 'mixed'\nbase_share = 1.5", "adapters.base_share"),
        ("[adapters]\npopularity = 'base'\n[swap]\nevery = 1.0", "swap needs adapters"),
        ("[arrivals]\nkind = 'open'", "rate"),
        ("[arrivals]\nkind = 'closed'\nrate = 1.0", "rate"),
        ("no toml", "line 1"),
    ],
)
def test_a_mistake_is_told_by_its_field(tmp_path: Path, text: str, said: str) -> None:
    lengths = 'prompt = { distribution = "fixed", tokens = 1 }\noutput = { distribution = "fixed", tokens = 1 }\n'
    file = tmp_path / "mine.toml"
    file.write_text(text if said in ("prompt", "line 1") else lengths + text)
    with pytest.raises(ScenarioError, match=said) as raised:
        read_scenario(str(file))
    assert "mine.toml" in raised.value.message


def test_lengths_that_cannot_be_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        'prompt = { distribution = "uniform", low = 9, high = 3 }\noutput = { distribution = "fixed", tokens = 1 }'
    )
    with pytest.raises(ScenarioError, match=r"low 9 is above high 3.*prompt"):
        read_scenario(str(file))


def test_another_load_is_the_same_scenario_otherwise() -> None:
    played = scenario(arrivals=Closed(users=3, think=0.5), seconds=20, warmup=4.0)
    assert played.at(users=9).arrivals == Closed(users=9, think=0.5)
    assert played.at(rate=2.5).arrivals == Open(rate=2.5)
    opened = scenario(arrivals=Open(rate=1.0, most_in_flight=9))
    assert opened.at(rate=2.5).arrivals == Open(rate=2.5, most_in_flight=9)
    assert (played.at(seconds=8).seconds, played.at(seconds=8).warmup) == (8, 2.0)
    assert played.at() == played
    with pytest.raises(ScenarioError, match="--users and --rate"):
        played.at(users=1, rate=1.0)
    with pytest.raises(ScenarioError, match="users"):
        played.at(users=0)


def test_popularity() -> None:
    assert popularity(popularity="base") == {"": 12_000}
    assert popularity(popularity="one") == {"ada": 12_000}
    assert popularity(popularity="distinct") == dict.fromkeys(NAMES, 3000)
    uniform = popularity(popularity="uniform")
    assert uniform == {name: pytest.approx(3000, rel=0.1) for name in NAMES}
    zipf = popularity(popularity="zipf", exponent=1.0)  # 12, 6, 4 and 3 in 25
    assert zipf == {
        name: pytest.approx(12_000 * share / 25, rel=0.1) for name, share in zip(NAMES, (12, 6, 4, 3), strict=True)
    }
    mixed = popularity(popularity="mixed", base_share=0.75)
    assert mixed[""] == pytest.approx(9000, rel=0.1)
    assert mixed["ada"] == pytest.approx(3000 * 12 / 25, rel=0.2)


def test_distinct_counts_over_all_users() -> None:
    played, counter = scenario(adapters=Adapters(popularity="distinct")), itertools.count()
    users = [Draws(played, NAMES, 1000, user, counter.__next__) for user in range(2)]
    assert [users[i % 2].request().adapter for i in range(5)] == ["ada", "bob", "cyd", "dan", "ada"]


LENGTHS = st.one_of(
    st.builds(Fixed, st.integers(1, 500)),
    st.tuples(st.integers(1, 500), st.integers(1, 500)).map(lambda ends: Uniform(min(ends), max(ends))),
    st.builds(Lognormal, st.integers(1, 500), st.integers(1, 500), st.floats(0.01, 3)),
)


@given(prompt=LENGTHS, output=LENGTHS, seed=st.integers(0, 99), user=st.integers(0, 9))
def test_requests_keep_to_their_lengths_and_come_again_with_their_seed(
    prompt: Lengths, output: Lengths, seed: int, user: int
) -> None:
    played = scenario(prompt=prompt, output=output, seed=seed)
    first, again = draws(played, user), draws(played, user)
    for _ in range(5):
        request = first.request()
        assert request == again.request()
        for lengths, length in ((prompt, len(request.prompt)), (output, request.max_tokens)):
            match lengths:
                case Fixed():
                    assert length == lengths.tokens
                case Uniform():
                    assert lengths.low <= length <= lengths.high
                case Lognormal():
                    assert 1 <= length <= lengths.most
        assert all(100 <= token < 1000 for token in request.prompt)


def test_users_and_seeds_ask_for_different_things() -> None:
    prompts = [draws(scenario(seed=seed), user).request().prompt for seed in (0, 1) for user in (0, 1)]
    assert len(set(map(tuple, prompts))) == 4


def test_a_lognormal_has_its_median() -> None:
    drawn = draws(scenario())
    lengths = sorted(drawn.length(Lognormal(median=100, most=100_000, sigma=0.8)) for _ in range(4001))
    assert lengths[2000] == pytest.approx(100, rel=0.1)
    assert lengths[int(4001 * 0.8413)] == pytest.approx(100 * math.exp(0.8), rel=0.1)  # one sigma above


def test_gaps_are_those_of_a_poisson_process() -> None:
    drawn = draws(scenario())
    gaps = [drawn.gap(rate=4.0) for _ in range(4000)]
    mean = sum(gaps) / len(gaps)
    spread = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert mean == pytest.approx(0.25, rel=0.1)
    assert spread == pytest.approx(mean, rel=0.1)  # exponential: its deviation is its mean


def test_processes_of_one_load_wait_for_each_other(tmp_path: Path) -> None:
    with pytest.raises(LoadTestFailed, match="1 of 2 processes"):
        meet(tmp_path, 0, 2, timeout=0.0)
    meet(tmp_path, 1, 2, timeout=0.0)
    meet(tmp_path, 0, 2, timeout=0.0)


def test_locust_is_told_whole_seconds() -> None:
    for timeout, told in ((2.5, "3"), (60.0, "60"), (1_000_000.0, "1000000")):
        command = locust_command(scenario(timeout=timeout), Path("played.json"), "127.0.0.1:1", [])
        assert command[command.index("--stop-timeout") + 1] == told


def test_processes_split_users_rate_and_swaps() -> None:
    swapping = scenario(arrivals=Closed(users=7, think=0.5), swap=Swap(every=1.0))
    parts = split(swapping, 3)
    assert [part.arrivals for part in parts] == [Closed(users, 0.5) for users in (3, 2, 2)]
    assert [part.swap for part in parts] == [Swap(every=1.0), None, None]
    assert len(split(scenario(arrivals=Closed(users=2)), 8)) == 2
    opened = scenario(arrivals=Open(rate=9.0, most_in_flight=7))
    assert [part.arrivals for part in split(opened, 2)] == [Open(4.5, 4), Open(4.5, 3)], "together as many as one"
    assert len(split(scenario(arrivals=Open(rate=9.0, most_in_flight=2)), 8)) == 2
