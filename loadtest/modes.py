"""The ways to serve that are compared, as data: options of `lorikeet serve`, and whose requests they get."""

import re
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

import msgspec

from loadtest.errors import LoadTestFailed
from loadtest.scenario import Adapters, Scenario


@dataclass(frozen=True, slots=True)
class Mode:
    """`use`: requests are for the base, for adapters (as the scenario draws them), or all for the one merged adapter,
    whose name takes the place of {adapter}."""

    name: str
    title: str
    bits: int
    use: Literal["base", "adapters", "merged"]
    options: tuple[str, ...] = ()

    def scenario(self, scenario: Scenario) -> Scenario:
        """What this mode is asked: the same lengths and arrivals."""
        popularity = {"base": "base", "adapters": scenario.adapters.popularity, "merged": "one"}[self.use]
        adapters = msgspec.to_builtins(scenario.adapters) | {"popularity": popularity}
        return msgspec.structs.replace(scenario, adapters=msgspec.convert(adapters, Adapters))

    def options_for(self, adapter: str) -> list[str]:
        return [option.format(adapter=adapter) for option in self.options]

    def missing(self, known: frozenset[str]) -> list[str]:
        """The options that it needs and a server does not know."""
        return [option for option in self.options if option.startswith("--") and option not in known]


NF4 = ("--quantization", "nf4")
MERGE = ("--merge", "{adapter}")

MODES = (
    Mode("base-16", "base, 16-bit", 16, "base"),
    Mode("lora-16", "LoRA on 16-bit", 16, "adapters"),
    Mode("merged-16", "merged, 16-bit", 16, "merged", MERGE),
    Mode("base-4", "base, 4-bit", 4, "base", NF4),
    Mode("lora-4", "QLoRA (4-bit)", 4, "adapters", NF4),
    Mode("merged-4", "merged, 4-bit", 4, "merged", (*NF4, *MERGE)),
)


def select(names: str) -> list[Mode]:
    """Modes by their names, with commas between; none of an empty text. Raises LoadTestFailed."""
    known = {mode.name: mode for mode in MODES}
    wanted = names.split(",") if names else []
    for name in wanted:
        if name not in known:
            raise LoadTestFailed(f"--modes {name!r}: no such mode; known are {', '.join(known)}")
    return [known[name] for name in wanted]


def server_options() -> frozenset[str]:
    """Those that the installed `lorikeet serve` takes."""
    command = [sys.executable, "-m", "server.cli", "serve", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return frozenset(re.findall(r"--[a-z][a-z-]+", shown))
