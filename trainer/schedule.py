"""The learning rate over a run."""

import math
from typing import Literal


def lr_factor(
    index: int,
    num_steps: int,
    warmup: float,
    schedule: Literal["cosine", "linear", "constant"] = "cosine",
    final: float = 0.1,
) -> float:
    """The share of the peak learning rate at step `index` of `num_steps`, counted from 0.

    It rises linearly over the first share `warmup` of the steps, then falls to `final` by a cosine or a line, or stays.
    """
    warmup_steps = math.ceil(num_steps * warmup)
    if index < warmup_steps:
        return (index + 1) / (warmup_steps + 1)
    progress = (index - warmup_steps) / max(1, num_steps - warmup_steps)
    match schedule:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - (1.0 - final) * progress
        case "cosine":
            return final + (1.0 - final) / 2 * (1 + math.cos(math.pi * progress))
