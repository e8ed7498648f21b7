"""How a 4-bit product is cut into blocks of threads, by shape and rows. No CUDA here."""

from dataclasses import dataclass, replace

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
class WarpgroupPlan:
    """A block of threads takes `row_chunks` x 64 rows of x and `groups` x `feature_tiles` x 64 output features, over
    one of `splits` (1, 2, 4 or 8) parts of the input features, of which `columns` (2 or 4) x 64 at a time are in
    shared memory. A warpgroup has `temps` (1 or 2) chunks of products under way, `resident` blocks share a
    multiprocessor. `shared_out`: as many blocks as fit at once share all tiles out evenly (stream-K), `splits` is 1."""

    feature_tiles: int
    row_chunks: int
    groups: int
    columns: int
    temps: int
    resident: int
    splits: int
    early: bool = False
    shared_out: bool = False


Plan = RowsPlan | WarpgroupPlan

ROW_STEPS = (8, 16, 32, 64, 128, 256, 384)  # up to so many rows share a plan; beyond, dequantizing first is faster


def _shared_out(row_chunks: int, groups: int, columns: int, temps: int, resident: int) -> WarpgroupPlan:
    return WarpgroupPlan(1, row_chunks, groups, columns, temps, resident, splits=1, early=True, shared_out=True)


# Measured on an H200 (benchmarks/results/h200-four-bit.jsonl): (out, in) → a plan for each of ROW_STEPS.
_MEASURED: dict[tuple[int, int], tuple[Plan | None, ...]] = {
    (6144, 4096): (
        RowsPlan(row_tiles=1, feature_tiles=1, warps=8, depth=1, stages=3, resident=3, splits=8, early=True),
        RowsPlan(row_tiles=2, feature_tiles=1, warps=8, depth=1, stages=3, resident=3, splits=8, early=True),
        WarpgroupPlan(feature_tiles=1, row_chunks=1, groups=2, columns=2, temps=1, resident=2, splits=4, early=True),
        WarpgroupPlan(feature_tiles=1, row_chunks=1, groups=2, columns=2, temps=1, resident=2, splits=4, early=True),
        WarpgroupPlan(feature_tiles=1, row_chunks=1, groups=3, columns=4, temps=1, resident=1, splits=2, early=True),
        WarpgroupPlan(feature_tiles=1, row_chunks=2, groups=3, columns=2, temps=1, resident=1, splits=2, early=True),
        _shared_out(row_chunks=2, groups=2, columns=4, temps=2, resident=1),
    ),
    (4096, 4096): (
        RowsPlan(row_tiles=1, feature_tiles=1, warps=4, depth=1, stages=3, resident=4, splits=8, early=True),
        RowsPlan(row_tiles=2, feature_tiles=1, warps=8, depth=1, stages=3, resident=2, splits=8, early=True),
        WarpgroupPlan(feature_tiles=1, row_chunks=1, groups=3, columns=4, temps=1, resident=1, splits=4, early=True),
        WarpgroupPlan(feature_tiles=1, row_chunks=1, groups=3, columns=4, temps=1, resident=1, splits=4, early=True),
        _shared_out(row_chunks=1, groups=3, columns=4, temps=1, resident=1),
        WarpgroupPlan(feature_tiles=1, row_chunks=2, groups=2, columns=2, temps=2, resident=1, splits=2, early=True),
        WarpgroupPlan(feature_tiles=1, row_chunks=2, groups=3, columns=2, temps=1, resident=1, splits=2, early=True),
    ),
    (28672, 4096): (
        RowsPlan(row_tiles=1, feature_tiles=1, warps=4, depth=1, stages=3, resident=4, splits=2, early=True),
        RowsPlan(row_tiles=2, feature_tiles=2, warps=8, depth=1, stages=3, resident=1, splits=1, early=True),
        WarpgroupPlan(feature_tiles=1, row_chunks=1, groups=2, columns=2, temps=1, resident=2, splits=1, early=True),
        _shared_out(row_chunks=1, groups=2, columns=2, temps=1, resident=2),
        _shared_out(row_chunks=2, groups=3, columns=4, temps=1, resident=1),
        _shared_out(row_chunks=4, groups=2, columns=2, temps=2, resident=1),
        _shared_out(row_chunks=2, groups=3, columns=4, temps=1, resident=1),
    ),
    (4096, 14336): (
        RowsPlan(row_tiles=1, feature_tiles=1, warps=4, depth=2, stages=3, resident=4, splits=8, early=True),
        RowsPlan(row_tiles=2, feature_tiles=1, warps=8, depth=1, stages=3, resident=2, splits=8, early=True),
        RowsPlan(row_tiles=4, feature_tiles=1, warps=8, depth=1, stages=3, resident=2, splits=8, early=True),
        _shared_out(row_chunks=1, groups=2, columns=4, temps=1, resident=1),
        _shared_out(row_chunks=2, groups=2, columns=4, temps=2, resident=1),
        WarpgroupPlan(feature_tiles=1, row_chunks=2, groups=2, columns=2, temps=2, resident=1, splits=2, early=True),
        _shared_out(row_chunks=2, groups=3, columns=4, temps=1, resident=1),
    ),
}

# Rows up to these → what other shapes choose from, given parts. At the measured shapes the choice takes as long as
# the table's plan, but for qkv at 65 to 128 rows (13 % longer) and down at 17 to 32 (16 %).
_WARPGROUPS: tuple[tuple[int, tuple[WarpgroupPlan, ...]], ...] = (
    (64, (WarpgroupPlan(1, 1, 2, 2, 1, 2, 1, True), WarpgroupPlan(1, 1, 3, 4, 1, 1, 1, True))),
    (128, (WarpgroupPlan(1, 2, 2, 2, 2, 1, 1, True), WarpgroupPlan(1, 2, 3, 2, 1, 1, 1, True))),
    (
        256,
        (
            WarpgroupPlan(1, 4, 2, 2, 2, 1, 1, True),
            WarpgroupPlan(1, 2, 2, 2, 2, 1, 1, True),
            WarpgroupPlan(1, 2, 3, 2, 1, 1, 1, True),
        ),
    ),
)
# Parts → the share of the multiprocessors that clusters of so many blocks are taken to reach at once, as those of one
# cluster are neighbours. 32 clusters of four on 132 multiprocessors took twice as long as 22, those of two no longer.
_REACHED = {1: 1.0, 2: 1.0, 4: 0.9, 8: 0.75}


def choose(rows: int, out_features: int, in_features: int) -> Plan | None:
    """The plan of x [rows, in] Wᵀ for W [out, in]. None: dequantize W, then multiply."""
    step = next((i for i, most in enumerate(ROW_STEPS) if 0 < rows <= most), None)
    if step is None:
        return None
    if (plans := _MEASURED.get((out_features, in_features))) is not None:
        return plans[step]
    if rows <= 16:
        return _few_rows(rows, out_features, in_features)
    families = next((plans for most, plans in _WARPGROUPS if rows <= most), ())
    candidates = [_with_parts(plan, rows, out_features, in_features) for plan in families]
    return max(candidates, key=lambda plan: _used(plan, rows, out_features), default=None)


def _few_rows(rows: int, out_features: int, in_features: int) -> RowsPlan:
    """The blocks of the measured shapes, in as many parts as fill the multiprocessors; a part costs about 2 %."""
    row_tiles, resident = (1, 3) if rows <= 8 else (2, 2)
    blocks, room = -(-out_features // 128), MULTIPROCESSORS * resident
    parts = min(
        range(1, min(8, in_features // 256) + 1),
        key=lambda parts: -(-blocks * parts // room) / parts * (1 + 0.02 * parts),
    )
    return RowsPlan(row_tiles, 1, 8, 1, 3, resident, parts, True)


def _blocks(plan: WarpgroupPlan, rows: int, out_features: int) -> int:
    """Blocks of outputs, each of `splits` blocks of threads."""
    return -(-out_features // (plan.groups * plan.feature_tiles * 64)) * -(-rows // (plan.row_chunks * 64))


def _with_parts(plan: WarpgroupPlan, rows: int, out_features: int, in_features: int) -> WarpgroupPlan:
    """In the most parts that all run at once."""
    blocks, room = _blocks(plan, rows, out_features), MULTIPROCESSORS * plan.resident
    fitting = (
        parts
        for parts, share in _REACHED.items()
        if blocks * parts <= share * room and parts * plan.columns * 64 <= in_features
    )
    return replace(plan, splits=max(fitting, default=1))


def _used(plan: WarpgroupPlan, rows: int, out_features: int) -> float:
    """The share of the multiprocessors' time that is used, if all blocks take as long."""
    blocks, room = _blocks(plan, rows, out_features) * plan.splits, MULTIPROCESSORS * plan.resident
    return blocks / (-(-blocks // room) * room)
