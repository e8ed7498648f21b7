"""A scenario: which adapters are asked for, how requests arrive, how long they are. Read from TOML (or JSON).

Lengths are tokens, times seconds. Every field has the meaning that `docs/load-tests.md` tells.
"""

import tomllib
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from loadtest.errors import ScenarioError

FOLDER = Path(__file__).parent / "scenarios"

Positive = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, le=1)]


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A table of the file: a field that it does not know is a mistake."""


class Fixed(_Table, frozen=True, tag_field="distribution", tag="fixed"):
    """Always as many."""

    tokens: Positive


class Uniform(_Table, frozen=True, tag_field="distribution", tag="uniform"):
    """From `low` to `high`, both included."""

    low: Positive
    high: Positive

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")


class Lognormal(_Table, frozen=True, tag_field="distribution", tag="lognormal"):
    """exp of a normal distribution: as many short as `median` says and a tail, cut at `most`."""

    median: Positive
    most: Positive
    sigma: Annotated[float, Meta(gt=0, le=3)] = 1.0


Lengths = Fixed | Uniform | Lognormal


class Adapters(_Table, frozen=True):
    """Whose requests they are, of the first `count` adapters by name.

    popularity: `base` (none of them), `one` (the first), `uniform`, `zipf` (the i-th with weight i**-exponent),
    `distinct` (each request the next one), `mixed` (a `base_share` of requests to the base, the others as zipf).
    """

    popularity: Literal["base", "one", "uniform", "zipf", "distinct", "mixed"] = "uniform"
    count: Positive = 16
    rank: Positive = 8  # of the random adapters of a server that the load test starts
    exponent: Annotated[float, Meta(gt=0)] = 1.0
    base_share: Share = 0.5


class Closed(_Table, frozen=True, tag_field="kind", tag="closed"):
    """`users` that each wait for their answer, think, and ask again."""

    users: Positive = 4
    think: Seconds = 0.0


class Open(_Table, frozen=True, tag_field="kind", tag="open"):
    """A Poisson process: requests come `rate` times a second, whatever the server does; past `most_in_flight` they
    fail as CLIENT_FULL."""

    rate: Annotated[float, Meta(gt=0)]
    most_in_flight: Positive = 1024


class Swap(_Table, frozen=True):
    """A change every `every` seconds to an adapter drawn uniformly: `reload` unloads it (waiting for its requests) and
    loads it again, `rollback` moves its label `latest` to where it was before, which needs two versions."""

    every: Annotated[float, Meta(gt=0)]
    action: Literal["reload", "rollback"] = "reload"


class Scenario(_Table, frozen=True):
    """What is played. `warmup` seconds at the start are not counted; `timeout` is a request's deadline."""

    name: str
    prompt: Lengths
    output: Lengths
    adapters: Adapters = Adapters()
    arrivals: Closed | Open = Closed()
    swap: Swap | None = None
    seconds: Annotated[int, Meta(ge=1, le=3600)] = 20
    warmup: Seconds = 2.0
    timeout: Annotated[float, Meta(gt=0)] = 60.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.warmup >= self.seconds:
            raise ValueError(f"warmup {self.warmup:g} leaves nothing of seconds {self.seconds}")
        if self.swap is not None and self.adapters.popularity == "base":
            raise ValueError("swap needs adapters, and popularity is base")

    def at(self, *, users: int | None = None, rate: float | None = None, seconds: int | None = None) -> "Scenario":
        """The same at another load. Raises ScenarioError."""
        changes: dict[str, object] = {}
        if users is not None and rate is not None:
            raise ScenarioError("--users and --rate exclude each other: the one is closed, the other open")
        if users is not None:
            think = self.arrivals.think if isinstance(self.arrivals, Closed) else 0.0
            changes["arrivals"] = {"kind": "closed", "users": users, "think": think}
        if rate is not None:
            most = self.arrivals.most_in_flight if isinstance(self.arrivals, Open) else Open(rate).most_in_flight
            changes["arrivals"] = {"kind": "open", "rate": rate, "most_in_flight": most}
        if seconds is not None:
            changes |= {"seconds": seconds, "warmup": min(self.warmup, seconds / 4)}
        return _convert(msgspec.to_builtins(self) | changes, self.name)


def read_scenario(given: str) -> Scenario:
    """A file, or the name of one of `loadtest/scenarios`. Raises ScenarioError."""
    path = Path(given)
    if not path.exists() and (FOLDER / f"{given}.toml").exists():
        path = FOLDER / f"{given}.toml"
    try:
        text = path.read_text()
        found = msgspec.json.decode(text) if path.suffix == ".json" else tomllib.loads(text)
    except FileNotFoundError:
        known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.toml")))
        raise ScenarioError(f"scenario {given!r}: no such file, and not one of {known}") from None
    except (OSError, ValueError) as error:
        raise ScenarioError(f"scenario {given}: {error}") from error
    return _convert({"name": path.stem} | found, given)


def _convert(found: dict[str, object], where: str) -> Scenario:
    try:
        return msgspec.convert(found, Scenario)
    except msgspec.ValidationError as error:
        raise ScenarioError(f"scenario {where}: {error}") from error
