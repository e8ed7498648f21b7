"""How a 4-bit product is cut into blocks of threads, by shape and rows. No CUDA here."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RowsPlan:
    """A block of threads takes `row_tiles` x 8 rows of x and `warps` x `feature_tiles` x 16 output features, over one
    of `splits` parts of the input features. A warp has `depth` groups of 256 of them on their way, x `stages`.
    `resident` blocks share a multiprocessor. `early`: programmatic dependent launch."""

    row_tiles: int
    feature_tiles: int
    warps: int
    depth: int
    stages: int
    resident: int
    splits: int
    early: bool = False


@dataclass(frozen=True, slots=True)
class TilesPlan:
    """A block of threads takes `row_tiles` x 128 rows of x and `groups` x `feature_tiles` x 64 output features, over
    one of `splits` parts of the input features."""

    feature_tiles: int
    row_tiles: int
    groups: int
    splits: int
    early: bool = False
