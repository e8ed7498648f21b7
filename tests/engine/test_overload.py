"""Four times the load that is accepted, on a simulated clock: whoever is admitted gets tokens as fast as without it."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate

from server.engine.messages import AdapterRef, SamplingParams, StopParams
from server.engine.pages import PageManager
from server.engine.plan import Plan, Sampled
from server.engine.scheduler import Scheduler
from server.engine.sequence import Sequence
from server.errors import ServerBusy
from tests.engine.scheduler_world import FakeAdapters

MOST = 16
NAMES = [f"a{i}" for i in range(16)]
POPULARITY = list(accumulate(1 / (i + 1) for i in range(16)))
WARM_UP, SECONDS = 20.0, 320.0


def step_seconds(plan: Plan) -> float:
    """As on two cores with a small model: a part for each adapter in the batch, one for each token of a prompt."""
    decodes, prompts = plan.chunks[: plan.num_decodes], plan.chunks[plan.num_decodes :]
    adapters = {chunk.seq.digest for chunk in decodes}
    return 0.03 + 0.0033 * len(adapters) + 0.001 * sum(chunk.length for chunk in prompts)


@dataclass
class World:
    """One server, and who asks it; times are seconds."""

    draws: random.Random = field(default_factory=lambda: random.Random(1))
    now: float = 0.0
    num_requests: int = 0
    num_refused: int = 0
    times: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(
            pages=PageManager(num_pages=4000, page_size=16),
            adapters=FakeAdapters(set(NAMES)),
            max_num_seqs=MOST,
            max_batch_tokens=256,
            max_waiting=MOST,
            max_model_len=2048,
            eos_token_ids=frozenset(),
            clock=lambda: self.now,
        )

    def ask(self) -> None:
        self.num_requests += 1
        (name,) = self.draws.choices(NAMES, cum_weights=POPULARITY)
        seq = Sequence(
            request_id=str(self.num_requests),
            prompt=self.draws.choices(range(100, 9000), k=32),
            sampling=SamplingParams(),
            stopping=StopParams(max_tokens=self.draws.randint(32, 96), ignore_eos=True),
            submitted_at=self.now,
            adapter=AdapterRef(name, ""),
        )
        try:
            self.scheduler.add(seq)
        except ServerBusy:
            self.num_refused += 1

    def run(self, arrive: Callable[[int], None]) -> None:
        """`arrive` is called before each step, with the number of requests that ended in the one before. `times` then
        has the mean seconds per token after the first, of each request that began past the warm-up and ended."""
        num_ended, first, counts = 0, dict[str, float](), dict[str, int]()
        while self.now < SECONDS:
            arrive(num_ended)
            num_ended = 0
            plan = self.scheduler.schedule()
            assert plan is not None, "there is always work"
            self.now += step_seconds(plan)
            for output in self.scheduler.commit(plan, [Sampled(5) for chunk in plan.chunks if chunk.samples]):
                request_id = output.request_id
                began = first.setdefault(request_id, self.now)
                counts[request_id] = counts.get(request_id, 0) + 1
                if output.finish_reason is not None:
                    num_ended += 1
                    if began > WARM_UP:
                        self.times.append((self.now - began) / (counts[request_id] - 1))

    def quantile(self, share: float) -> float:
        return sorted(self.times)[int(share * len(self.times))]


def test_who_is_admitted_gets_tokens_as_fast_as_without_the_overload() -> None:
    accepted, overloaded = World(), World()
    for _ in range(MOST):
        accepted.ask()

    def again(num_ended: int) -> None:
        for _ in range(num_ended):
            accepted.ask()

    accepted.run(again)
    rate = 4 * len(accepted.times) / (SECONDS - WARM_UP)
    due = 0.0

    def poisson(num_ended: int) -> None:
        nonlocal due
        while due <= overloaded.now:
            overloaded.ask()
            due += overloaded.draws.expovariate(rate)

    overloaded.run(poisson)
    assert accepted.num_refused == 0
    assert overloaded.num_refused > 2 * len(overloaded.times), "three of four"
    assert len(overloaded.times) > 0.9 * len(accepted.times), "as many are served"
    for share in (0.5, 0.95, 0.99):
        assert overloaded.quantile(share) < 1.1 * accepted.quantile(share), share
