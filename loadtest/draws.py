"""The requests of a scenario: the same for the same seed, whatever the server does with them."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from loadtest.scenario import Fixed, Lengths, Scenario, Uniform

# Token ids below are often special (end of sequence among them).
FIRST_PLAIN_TOKEN = 100


@dataclass(frozen=True, slots=True)
class Draw:
    """One request: its adapter ("" the base), its prompt and how many tokens it wants."""

    adapter: str
    prompt: list[int]
    max_tokens: int


class Draws:
    """What one user asks for. `names` are the adapters, the most popular first; `next_index` counts the requests of all
    users, for `distinct`."""

    def __init__(
        self, scenario: Scenario, names: Sequence[str], vocab_size: int, user: int, next_index: Callable[[], int]
    ) -> None:
        self._scenario = scenario
        self._names = names
        self._vocab_size = vocab_size
        self._random = random.Random(f"{scenario.seed}/{user}")
        self._next_index = next_index
        weights = (1.0, *((i + 1) ** -scenario.adapters.exponent for i in range(1, len(names))))
        self._zipf = list(accumulate(weights))

    def request(self) -> Draw:
        adapter = self.adapter()
        length = self.length(self._scenario.prompt)
        first = min(FIRST_PLAIN_TOKEN, self._vocab_size - 1)
        prompt = [self._random.randrange(first, self._vocab_size) for _ in range(length)]
        return Draw(adapter, prompt, self.length(self._scenario.output))

    def gap(self, rate: float) -> float:
        """Seconds to the next of a Poisson process."""
        return self._random.expovariate(rate)

    def adapter(self) -> str:
        match self._scenario.adapters.popularity:
            case "base":
                return ""
            case "one":
                return self._names[0]
            case "uniform":
                return self._random.choice(self._names)
            case "distinct":
                return self._names[self._next_index() % len(self._names)]
            case "mixed" if self._random.random() < self._scenario.adapters.base_share:
                return ""
            case _:
                return self._random.choices(self._names, cum_weights=self._zipf)[0]

    def length(self, lengths: Lengths) -> int:
        if isinstance(lengths, Fixed):
            return lengths.tokens
        if isinstance(lengths, Uniform):
            return self._random.randint(lengths.low, lengths.high)
        drawn = self._random.lognormvariate(math.log(lengths.median), lengths.sigma)
        return max(1, min(lengths.most, round(drawn)))

    def any_adapter(self) -> str:
        """Each as likely, whatever the popularity."""
        return self._random.choice(self._names)
