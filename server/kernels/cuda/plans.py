"""How a 4-bit product is cut into blocks of threads, by shape and rows. No CUDA here."""

from dataclasses import dataclass, replace

MULTIPROCESSORS = 132  # of a Hopper GPU
TABLE_BYTES = 256 * 32 * 4  # what each byte of codes decodes to, a copy for each bank of shared memory


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
    """A block of threads takes `row_chunks` x `chunk` (64 or 128) rows of x and `groups` x 64 output features, over one
    of `splits` (1, 2, 4 or 8) parts of the input features, in steps of `columns` (2 or 4) x 64. `stages` x 64 inputs of
    x are in shared memory or on their way, `resident` blocks share a multiprocessor. `early`: programmatic dependent
    launch. `shared_out`: as many blocks as fit at once share all tiles out evenly (stream-K), `splits` is 1."""

    row_chunks: int
    chunk: int
    groups: int
    columns: int
    stages: int
    resident: int
    splits: int
    early: bool = True
    shared_out: bool = False

    @property
    def rows(self) -> int:
        """Rows of x that a block of threads takes."""
        return self.row_chunks * self.chunk

    @property
    def width(self) -> int:
        """Output features that it takes."""
        return self.groups * 64

    @property
    def shared_bytes(self) -> int:
        """Of a block: the table, x, codes and absmax of two steps, or sums of parts; and two barriers a stage."""
        operands = TABLE_BYTES + self.stages * self.rows * 128 + 2 * self.columns * self.groups * 128 * 24
        sums = self.rows * (self.width * 4 + 16) if self.splits > 1 else 0
        return max(operands, sums) + self.stages * 16


Plan = RowsPlan | WarpgroupPlan

ROW_STEPS = (8, 16, 32, 64, 128, 256, 384)  # up to so many rows share a plan; beyond, dequantizing first is faster


def _shared_out(row_chunks: int, chunk: int, groups: int, columns: int, stages: int) -> WarpgroupPlan:
    return WarpgroupPlan(row_chunks, chunk, groups, columns, stages, resident=1, splits=1, shared_out=True)


# Measured on an H200 (benchmarks/results/h200-four-bit.jsonl): (out, in) → a plan for each of ROW_STEPS.
_MEASURED: dict[tuple[int, int], tuple[Plan | None, ...]] = {
    (6144, 4096): (
        RowsPlan(row_tiles=1, feature_tiles=1, warps=8, depth=1, stages=3, resident=3, splits=8, early=True),
        RowsPlan(row_tiles=2, feature_tiles=1, warps=8, depth=1, stages=3, resident=3, splits=8, early=True),
        WarpgroupPlan(row_chunks=1, chunk=64, groups=2, columns=2, stages=6, resident=2, splits=4),
        WarpgroupPlan(row_chunks=1, chunk=64, groups=2, columns=2, stages=6, resident=2, splits=4),
        WarpgroupPlan(row_chunks=1, chunk=64, groups=3, columns=4, stages=8, resident=1, splits=2),
        WarpgroupPlan(row_chunks=2, chunk=64, groups=3, columns=4, stages=6, resident=1, splits=2),
        _shared_out(row_chunks=2, chunk=64, groups=3, columns=2, stages=8),
    ),
    (4096, 4096): (
        RowsPlan(row_tiles=1, feature_tiles=1, warps=4, depth=1, stages=3, resident=4, splits=8, early=True),
        RowsPlan(row_tiles=2, feature_tiles=1, warps=8, depth=1, stages=3, resident=2, splits=8, early=True),
        WarpgroupPlan(row_chunks=1, chunk=64, groups=3, columns=4, stages=8, resident=1, splits=4),
        WarpgroupPlan(row_chunks=1, chunk=64, groups=3, columns=4, stages=8, resident=1, splits=4),
        _shared_out(row_chunks=1, chunk=64, groups=3, columns=4, stages=8),
        WarpgroupPlan(row_chunks=1, chunk=128, groups=2, columns=2, stages=8, resident=1, splits=2),
        _shared_out(row_chunks=2, chunk=64, groups=3, columns=4, stages=6),
    ),
    (28672, 4096): (
        RowsPlan(row_tiles=1, feature_tiles=1, warps=4, depth=1, stages=3, resident=4, splits=2, early=True),
        RowsPlan(row_tiles=2, feature_tiles=2, warps=8, depth=1, stages=3, resident=1, splits=1, early=True),
        WarpgroupPlan(row_chunks=1, chunk=64, groups=2, columns=2, stages=6, resident=2, splits=1),
        WarpgroupPlan(row_chunks=1, chunk=64, groups=2, columns=2, stages=6, resident=2, splits=1),
        _shared_out(row_chunks=2, chunk=64, groups=3, columns=4, stages=6),
        _shared_out(row_chunks=2, chunk=128, groups=2, columns=2, stages=4),
        _shared_out(row_chunks=2, chunk=64, groups=3, columns=2, stages=8),
    ),
    (4096, 14336): (
        RowsPlan(row_tiles=1, feature_tiles=1, warps=4, depth=2, stages=3, resident=4, splits=8, early=True),
        RowsPlan(row_tiles=2, feature_tiles=1, warps=8, depth=1, stages=3, resident=2, splits=8, early=True),
        RowsPlan(row_tiles=4, feature_tiles=1, warps=8, depth=1, stages=3, resident=2, splits=8, early=True),
        _shared_out(row_chunks=1, chunk=64, groups=3, columns=4, stages=8),
        _shared_out(row_chunks=1, chunk=128, groups=2, columns=2, stages=8),
        WarpgroupPlan(row_chunks=1, chunk=128, groups=2, columns=2, stages=8, resident=1, splits=2),
        _shared_out(row_chunks=2, chunk=64, groups=3, columns=4, stages=6),
    ),
}

# Rows up to these → what other shapes choose from, given parts.
_WARPGROUPS: tuple[tuple[int, tuple[WarpgroupPlan, ...]], ...] = (
    (64, (WarpgroupPlan(1, 64, 2, 2, 6, 2, 1), WarpgroupPlan(1, 64, 3, 4, 8, 1, 1))),
    (128, (WarpgroupPlan(1, 128, 2, 2, 8, 1, 1), WarpgroupPlan(2, 64, 3, 2, 8, 1, 1))),
    (
        256,
        (
            WarpgroupPlan(2, 128, 2, 2, 4, 1, 1),
            WarpgroupPlan(1, 128, 2, 2, 8, 1, 1),
            WarpgroupPlan(2, 64, 3, 2, 8, 1, 1),
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
    return -(-out_features // plan.width) * -(-rows // plan.rows)


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
