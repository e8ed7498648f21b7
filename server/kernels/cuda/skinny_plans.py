"""Which products of a few dozen rows run on `skinny` rather than cuBLAS, and how they are cut. No CUDA here."""

from collections.abc import Mapping
from dataclasses import dataclass

MIN_ROWS, MAX_ROWS = 33, 64
ROWS = 64  # of x, that a block of threads takes


@dataclass(frozen=True, slots=True)
class SkinnyPlan:
    """A block of threads takes ROWS rows of x and `groups` × `feature_tiles` × 64 output features (at most 256), over
    one of `splits` (1, 2, 4 or 8) parts of the input features, of which `columns` × 64 make one of
    `stages` in shared memory. `early`: programmatic dependent launch."""

    feature_tiles: int
    groups: int
    columns: int
    stages: int
    splits: int
    early: bool = True

    @property
    def width(self) -> int:
        """Output features of a block of threads."""
        return self.groups * self.feature_tiles * 64

    @property
    def shared_bytes(self) -> int:
        """Stages, a barrier for each, and room to align."""
        return self.stages * (self.columns * (self.width + ROWS) * 128 + 8) + 1024


# Measured on an H200 in bf16, in decode steps of 64 rows: (input features, output features) → plan. Blocks leave room
# for others on their multiprocessor: the next product's first stages are on their way before this one has ended. What
# is not here is cuBLAS's; at 4096 × 4096 it is as fast.
_HOPPER: Mapping[tuple[int, int], SkinnyPlan] = {
    (4096, 6144): SkinnyPlan(1, 1, 1, 6, splits=2),
    (4096, 28672): SkinnyPlan(1, 2, 2, 2, splits=1),
    (14336, 4096): SkinnyPlan(1, 1, 2, 6, splits=2),
    (4096, 128256): SkinnyPlan(1, 2, 1, 4, splits=1),
}


def skinny_plan(rows: int, in_features: int, out_features: int) -> SkinnyPlan | None:
    """The plan of x [rows, in] Wᵀ for a 16-bit W [out, in] on a Hopper GPU; None: cuBLAS."""
    if not MIN_ROWS <= rows <= MAX_ROWS:
        return None
    return _HOPPER.get((in_features, out_features))
