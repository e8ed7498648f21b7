"""How a 4-bit product is cut into blocks of threads, by shape and rows. No CUDA here."""

from dataclasses import dataclass

MULTIPROCESSORS = 132  # of a Hopper GPU


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


@dataclass(frozen=True, slots=True)
class WarpgroupPlan:
    """A block of threads takes `row_chunks` x 64 rows of x and `groups` x `feature_tiles` x 64 output features, over
    one of `splits` (1, 2, 4 or 8) parts of the input features, of which `columns` (2 or 4) x 64 at a time are in
    shared memory. A warpgroup has `temps` (1 or 2) chunks of products under way, `resident` blocks share a
    multiprocessor."""

    feature_tiles: int
    row_chunks: int
    groups: int
    columns: int
    temps: int
    resident: int
    splits: int
    early: bool = False


Plan = RowsPlan | TilesPlan | WarpgroupPlan

ROW_STEPS = (8, 16, 32, 64, 384)  # up to so many rows share a plan; beyond, dequantizing first is faster

# Measured on an H200 (benchmarks/results/h200-four-bit.jsonl): (out, in) → a plan for each of ROW_STEPS.
_MEASURED: dict[tuple[int, int], tuple[Plan | None, ...]] = {
    (6144, 4096): (
        RowsPlan(1, 1, 8, 1, 3, 3, 8, True),
        RowsPlan(2, 1, 8, 1, 3, 3, 8, True),
        RowsPlan(4, 2, 4, 1, 3, 2, 5, True),
        RowsPlan(4, 2, 4, 1, 3, 2, 2, True),
        None,
    ),
    (4096, 4096): (
        RowsPlan(1, 1, 4, 1, 3, 4, 8, True),
        RowsPlan(2, 1, 8, 1, 3, 2, 8, True),
        RowsPlan(4, 1, 8, 1, 3, 2, 8, True),
        RowsPlan(4, 1, 8, 1, 3, 2, 4, True),
        None,
    ),
    (28672, 4096): (
        RowsPlan(1, 1, 4, 1, 3, 4, 2, True),
        RowsPlan(2, 2, 8, 1, 3, 1, 1, True),
        RowsPlan(4, 2, 8, 1, 3, 1, 1, True),
        RowsPlan(8, 2, 8, 1, 3, 1, 1, True),
        TilesPlan(1, 2, 2, 1, True),
    ),
    (4096, 14336): (
        RowsPlan(1, 1, 4, 2, 3, 4, 8, True),
        RowsPlan(2, 1, 8, 2, 3, 2, 8, True),
        RowsPlan(4, 1, 8, 1, 3, 2, 8, True),
        RowsPlan(4, 2, 4, 1, 3, 2, 4, True),
        TilesPlan(1, 2, 2, 4, True),
    ),
}


def choose(rows: int, out_features: int, in_features: int) -> Plan | None:
    """The plan of x [rows, in] Wᵀ for W [out, in]. None: dequantize W, then multiply."""
    step = next((i for i, most in enumerate(ROW_STEPS) if 0 < rows <= most), None)
    if step is None:
        return None
    if (plans := _MEASURED.get((out_features, in_features))) is not None:
        return plans[step]
    return _estimate(step, rows, out_features, in_features)


def _estimate(step: int, rows: int, out_features: int, in_features: int) -> Plan | None:
    """What the measured shapes suggest for another: the same tiles, and as many parts as fill the multiprocessors."""
    if step == len(ROW_STEPS) - 1:
        blocks = -(-out_features // 128) * -(-rows // 256)
        parts = _parts(blocks, MULTIPROCESSORS, in_features // 64)
        return TilesPlan(1, 2, 2, parts, True)
    row_tiles, feature_tiles, warps, resident = ((1, 1, 8, 3), (2, 1, 8, 2), (4, 1, 8, 2), (4, 2, 4, 2))[step]
    blocks = -(-out_features // (feature_tiles * warps * 16)) * -(-rows // (row_tiles * 8))
    parts = _parts(blocks, MULTIPROCESSORS * resident, in_features // 256)
    return RowsPlan(row_tiles, feature_tiles, warps, 1, 3, resident, parts, True)


def _parts(blocks: int, room: int, most: int) -> int:
    """Parts of the inputs with which `blocks` blocks of outputs fill room for `room` well; a part costs about 2 %."""
    candidates = range(1, min(8, most) + 1)
    return min(candidates, key=lambda parts: -(-blocks * parts // room) / parts * (1 + 0.02 * parts))
