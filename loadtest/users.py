"""The Locust user, what it reports to Locust, and what it keeps for the exact numbers.

Importing this patches the process for gevent, gRPC too: no other module of the project may import it.
"""

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc.experimental.gevent
from gevent import Greenlet, pool, sleep, spawn
from locust import User, task
from locust.env import Environment

from loadtest.draws import Draw, Draws
from loadtest.records import Record, Run
from loadtest.scenario import Open, Scenario
from loadtest.streams import Client

grpc.experimental.gevent.init_gevent()

# Rows of Locust's tables: adapters past it share one.
MAX_NAMES = 50


class StreamFailed(Exception):
    """How a request failed. Locust counts failures by this text, so there is nothing in it of one request alone."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(f"{code} {reason}".strip())


@dataclass(slots=True)
class Load:
    """What the users of one run share: the scenario, what the server has, and all that was measured."""

    scenario: Scenario
    address: str
    mode: str
    names: Sequence[str]
    vocab_size: int
    num_users: int
    began: float = field(default_factory=time.perf_counter)
    ended: float | None = None
    swapping: "Greenlet[[], None] | None" = None
    records: list[Record] = field(default_factory=list)
    swaps: list[Record] = field(default_factory=list)
    share: tuple[int, int] = (0, 1)  # which of how many processes that make the load
    _requests: "itertools.count[int]" = field(init=False)
    _users: "itertools.count[int]" = field(init=False)

    def __post_init__(self) -> None:
        self._requests, self._users = itertools.count(*self.share), itertools.count(*self.share)

    def draws(self) -> Draws:
        """Those of one more user."""
        next_index = self._requests.__next__
        return Draws(self.scenario, self.names, self.vocab_size, next(self._users), next_index)

    def label(self, adapter: str) -> str:
        """A row's name: the mode, if any, and the adapter."""
        known = not adapter or adapter in self.names[:MAX_NAMES]
        name = (adapter or "base") if known else "_other"
        return f"{self.mode}/{name}" if self.mode else name

    def report(self, environment: Environment, record: Record) -> None:
        """Keep it, and fire Locust's events: one row for each kind of time, whose unit its type says."""
        self.records.append(record)
        self.fire(environment, "end to end ms", record, record.seconds * 1000)
        if not record.is_ok:
            return
        if record.first_token_seconds is not None:
            self.fire(environment, "TTFT ms", record, record.first_token_seconds * 1000)
        if record.per_token_seconds is not None:
            self.fire(environment, "TPOT ms", record, record.per_token_seconds * 1000)
        self.fire(environment, "tokens/s", record, record.tokens_per_second)

    def fire(self, environment: Environment, kind: str, record: Record, value: float) -> None:
        """One event. Locust counts a failure, but no time of it: what is refused at once would look fast."""
        environment.events.request.fire(
            request_type=kind,
            name=self.label(record.adapter),
            response_time=value if record.is_ok else None,
            response_length=record.num_tokens if kind == "end to end ms" else 0,
            exception=None if record.is_ok else StreamFailed(record.code, record.reason),
            context={},
        )

    def measured(self) -> Run:
        """All of it, so far."""
        ended = time.perf_counter() if self.ended is None else self.ended
        return Run(self.mode, self.num_users, self.began, ended, self.records, self.swaps)


def make_load(scenario: Scenario, address: str, mode: str, num_users: int, share: tuple[int, int] = (0, 1)) -> Load:
    """Raises LoadTestFailed when the server is not there, or has too few adapters."""
    if not isinstance(scenario.arrivals, Open):
        scenario = scenario.at(users=num_users)
    client = Client(address)
    try:
        vocab_size = client.info().base.vocab_size
        names = client.adapter_names(0 if scenario.adapters.popularity == "base" else scenario.adapters.count)
    finally:
        client.close()
    return Load(scenario, address, mode, names, vocab_size, num_users, share=share)


class StreamUser(User):
    """Streams one answer after the other (closed), or begins them at its share of the rate (open). `load` is set on the
    environment by the locustfile before users are made."""

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self._load: Load = environment.lorikeet_load  # type: ignore[attr-defined]
        self._draws = self._load.draws()
        self._client = Client(self._load.address)
        self._in_flight = pool.Group()
        self._due = time.perf_counter()

    @task
    def play(self) -> None:
        arrivals, draw = self._load.scenario.arrivals, self._draws.request()
        if not isinstance(arrivals, Open):
            self._run(draw, time.perf_counter())
            sleep(arrivals.think)
            return
        self._due += self._draws.gap(arrivals.rate / self._load.num_users)
        sleep(max(0.0, self._due - time.perf_counter()))
        if len(self._in_flight) < arrivals.most_in_flight / self._load.num_users:
            self._in_flight.spawn(self._run, draw, self._due)
        else:
            record = Record(draw.adapter, self._due, ended=time.perf_counter(), code="CLIENT_FULL")
            self._load.report(self.environment, record)

    def on_stop(self) -> None:
        self._in_flight.join(timeout=self._load.scenario.timeout)
        self._client.close()

    def _run(self, draw: Draw, due: float) -> None:
        record = self._client.run(draw, due, self._load.scenario.timeout)
        self._load.report(self.environment, record)


def start_swaps(environment: Environment, load: Load) -> "Greenlet[[], None]":
    """Hot swaps until it is killed; does nothing where the scenario has none."""

    def swap() -> None:
        plan = load.scenario.swap
        if plan is None:
            return
        draws, client = load.draws(), Client(load.address)
        while True:
            sleep(plan.every)
            record = client.swap(draws.any_adapter(), plan.action)
            load.swaps.append(record)
            load.fire(environment, "swap ms", record, record.seconds * 1000)

    return spawn(swap)
