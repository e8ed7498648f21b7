"""One uniform number per (seed, step): counter-based, so a draw depends on nothing that happened before it.

The generator is splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014)
with its state set from the step instead of carried along. Plain integers: no device, no state.
"""

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15


def _mix(z: int) -> int:
    """splitmix64's output function: a bijection of 64-bit integers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def splitmix64(state: int, index: int) -> int:
    """The `index`-th (from 0) 64-bit output of the generator that starts at `state`."""
    return _mix((state + (index + 1) * _GAMMA) & _MASK)


def uniform(seed: int, step: int) -> float:
    """A uniform number in [0, 1), a multiple of 2**-52, for draw number `step` under `seed` (any integer).

    The seed is mixed before it becomes a state: neighbouring seeds give unrelated streams. 52 bits and not 53,
    so that `uniform * total < total` holds after rounding for every normal double.
    """
    return (splitmix64(_mix((seed + _GAMMA) & _MASK), step) >> 12) * 2.0**-52
