"""The low-rank term of a mixed batch against an adapter-by-adapter float64 loop, over the parity grid."""

import errno
import fcntl
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from server.base.spec import ModelSpec
from server.kernels.cpu.lora import BlockTables, compiled, lora_add
from server.kernels.lora_blocks import LoraBlocksShape
from server.kernels.lora_rows import LoraRows
from server.lora.batch import LowRankTerm, TokenSpan, build_lora_batch
from server.lora.cpu_batch import build_cpu_lora_batch
from server.lora.pool import AdapterPool, Ranges
from server.lora.weights import PackedAdapter, linear_groups

SPEC = ModelSpec.from_config(
    {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "max_position_embeddings": 64,
    }
)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
ROOT = Path(__file__).parents[2]
POPULARITY = ("distinct", "uniform", "zipf", "identical", "some base")


def random_adapter(rank: int, dtype: torch.dtype, generator: torch.Generator) -> PackedAdapter:
    def tensor(*size: int) -> Tensor:
        return (torch.randn(*size, generator=generator) * 0.3).to(dtype)

    groups = linear_groups(SPEC)
    return PackedAdapter(
        rank,
        {g.name: tensor(SPEC.num_layers, rank, len(g.modules), g.in_features) for g in groups},
        {g.name: tuple(tensor(SPEC.num_layers, rank, width) for width in g.widths) for g in groups},
    )


def choose(popularity: str, count: int, num_adapters: int, rng: random.Random) -> list[int | None]:
    """Which adapter each of `count` sequences has; None is the base."""
    if popularity == "distinct":
        return [i % num_adapters for i in range(count)]
    if popularity == "uniform":
        return [rng.randrange(num_adapters) for _ in range(count)]
    if popularity == "zipf":
        weights = [1 / (i + 1) for i in range(num_adapters)]
        return list(rng.choices(range(num_adapters), weights, k=count))
    if popularity == "identical":
        return [1] * count
    return [rng.choice([None, 0, 2]) for _ in range(count)]


def expected(
    x: Tensor, y: Tensor, adapters: list[PackedAdapter], owner: list[int | None], group: str, layer: int
) -> Tensor:
    """One adapter at a time, in float64."""
    out = y.double().clone()
    for which in {who for who in owner if who is not None}:
        rows = [i for i, who in enumerate(owner) if who == which]
        a, b = adapters[which].a[group][layer].double(), [t[layer].double() for t in adapters[which].b[group]]
        out[rows] += torch.cat([x[rows].double() @ a[:, s].T @ b[s] for s in range(len(b))], dim=1)
    return out


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("ranks", [(8, 8, 8, 8), (1, 3, 4, 17), (64, 2, 16, 5)], ids=str)
@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize("lengths", [(1,) * 9, (1, 1, 1, 5, 2, 11), (40, 1500)], ids=["decode", "mixed", "prefill"])
def test_parity(dtype: torch.dtype, ranks: tuple[int, ...], popularity: str, lengths: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(7)
    rng = random.Random(7)
    pool = AdapterPool(SPEC, 1 << 20, dtype, torch.device("cpu"))
    adapters, rows = [], []
    for rank in ranks:
        adapters.append(random_adapter(rank, dtype, generator))
        rows.append(allocate(pool, rank))
        pool.write(rows[-1], adapters[-1])
    owner = choose(popularity, len(lengths), len(ranks), rng)
    spans = [TokenSpan(n, None if who is None else rows[who]) for n, who in zip(lengths, owner, strict=True)]
    num_decodes = next((i for i, n in enumerate(lengths) if n > 1), len(lengths))
    batch = build_lora_batch(pool, spans[:num_decodes], spans[num_decodes:])
    token_owner = [who for n, who in zip(lengths, owner, strict=True) for _ in range(n)]
    for group in linear_groups(SPEC):
        x = torch.randn(len(token_owner), group.in_features, generator=generator).to(dtype)
        y = torch.randn(len(token_owner), sum(group.widths), generator=generator).to(dtype)
        want = expected(x, y, adapters, token_owner, group.name, 1)
        assert_close(batch, y, x, group.name, want, TOLERANCE[dtype], token_owner)


def assert_close(
    batch: LowRankTerm | None, y: Tensor, x: Tensor, group: str, want: Tensor, tolerance: float, owner: list[int | None]
) -> None:
    before = y.clone()
    if batch is None:
        assert set(owner) <= {None}
    else:
        batch.add(y, x, group, 1)
    assert (y.double() - want).norm() <= tolerance * want.norm(), group
    base = [i for i, who in enumerate(owner) if who is None]
    assert torch.equal(y[base], before[base]), "a base token was changed"


def allocate(pool: AdapterPool, rank: int) -> Ranges:
    rows = pool.allocate(rank)
    assert rows is not None
    return rows


def test_fragmented_rows_give_the_same_result() -> None:
    generator = torch.Generator().manual_seed(1)
    pool = AdapterPool(SPEC, 1 << 18, torch.float32, torch.device("cpu"))
    small = [allocate(pool, 4) for _ in range(pool.num_rows // 4)]
    for rows in small[::2]:
        pool.free(rows)
    adapter = random_adapter(14, torch.float32, generator)
    rows = allocate(pool, 14)
    assert len(rows) == 4, "the rows must lie in several holes for this test to say anything"
    pool.write(rows, adapter)
    spans = [TokenSpan(1, rows), TokenSpan(1, None), TokenSpan(1, rows)]
    batch = build_lora_batch(pool, spans, [])
    assert batch is not None
    x, y = torch.randn(3, 32, generator=generator), torch.zeros(3, 64)
    batch.add(y, x, "qkv", 0)
    assert torch.allclose(y.double(), expected(x, torch.zeros(3, 64), [adapter], [0, None, 0], "qkv", 0), atol=1e-5)


def test_what_other_rows_hold_never_reaches_a_token() -> None:
    """The largest finite values in a neighbour's rows overflow its own product, and nobody else's."""
    generator = torch.Generator().manual_seed(2)
    pool = AdapterPool(SPEC, 1 << 18, torch.float32, torch.device("cpu"))
    adapter = random_adapter(3, torch.float32, generator)
    mine, theirs = allocate(pool, 3), allocate(pool, 8)
    pool.write(mine, adapter)
    for group in pool.groups.values():
        for tensor in (group.a, *group.b):
            tensor[:, theirs[0][0] : theirs[0][1]] = torch.finfo(torch.float32).max
    batch = build_lora_batch(pool, [TokenSpan(1, mine), TokenSpan(1, theirs)], [])
    assert batch is not None
    x, y = torch.randn(2, 32, generator=generator), torch.zeros(2, 64)
    batch.add(y, x, "qkv", 0)
    want = expected(x, torch.zeros(2, 64), [adapter], [0, None], "qkv", 0)
    assert torch.allclose(y[0].double(), want[0], atol=1e-5)
    assert not torch.isfinite(y[1]).all()


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_rounding_is_torchs(dtype: torch.dtype) -> None:
    """y + x · 1 · 1 for every kind of number: ties, infinity and NaN as torch has them."""
    finfo = torch.finfo(dtype)
    edges = [0.0, -0.0, 1.0, 3.0, finfo.tiny, finfo.smallest_normal / 2, finfo.max, -finfo.max, finfo.eps]
    edges += [float("inf"), -float("inf"), float("nan")]
    small = [0.0, finfo.eps / 2, -finfo.eps / 2, finfo.eps, 1.5 * finfo.eps, finfo.max, 2.0**-20]
    pairs = torch.tensor([(a, b) for a in edges for b in small], dtype=torch.float32).to(dtype)
    y, x = pairs[:, :1].clone(), pairs[:, 1:].clone()
    one = torch.ones(1, 1, dtype=dtype)
    packed = torch.tensor([0, len(pairs), 0, 1, *range(len(pairs)), 0, 1], dtype=torch.int32)
    shape = LoraBlocksShape(tokens=len(pairs), rows=1, blocks=1, block_tokens=len(pairs), max_rank=1)
    want = (y.float() + x.float()).to(dtype)
    lora_add(y, x, LoraRows.of(one[None], [one]), BlockTables.of(shape.view(packed)))
    assert torch.equal(y.isnan(), want.isnan())
    assert torch.equal(y.nan_to_num(7.0), want.nan_to_num(7.0))
    assert torch.equal(y.signbit()[~want.isnan()], want.signbit()[~want.isnan()])


def test_a_token_has_the_same_bits_alone_and_in_any_batch() -> None:
    generator = torch.Generator().manual_seed(5)
    pool = AdapterPool(SPEC, 1 << 18, torch.bfloat16, torch.device("cpu"))
    rows = [allocate(pool, rank) for rank in (3, 8, 17)]
    for place, rank in zip(rows, (3, 8, 17), strict=True):
        pool.write(place, random_adapter(rank, torch.bfloat16, generator))
    spans = [TokenSpan(1, place) for place in (rows[1], None, rows[0], rows[2], rows[1], rows[2])]
    x, before = torch.randn(6, 32, generator=generator).bfloat16(), torch.randn(6, 64, generator=generator).bfloat16()
    together = before.clone()
    added(build_lora_batch(pool, spans, [])).add(together, x, "qkv", 0)
    for i, span in enumerate(spans):
        alone = before[i : i + 1].clone()
        if span.rows is not None:
            added(build_lora_batch(pool, [span], [])).add(alone, x[i : i + 1], "qkv", 0)
        assert torch.equal(together[i], alone[0]), i


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("lengths", [(1,) * 9, (1, 1, 30, 1, 7), (64,)], ids=str)
def test_threads_change_no_bit(set_threads: Callable[[int], None], lengths: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(6)
    pool = AdapterPool(SPEC, 1 << 20, torch.float32, torch.device("cpu"))
    owners = [None, *(allocate(pool, rank) for rank in (9, 15, 12))]
    for rows in owners[1:]:
        pool.write(rows, random_adapter(sum(stop - start for start, stop in rows), torch.float32, generator))
    spans = [TokenSpan(length, owners[-1 - i % len(owners)]) for i, length in enumerate(lengths)]
    x, y = torch.randn(sum(lengths), 32, generator=generator), torch.randn(sum(lengths), 64, generator=generator)
    results, teams = [], []
    for count in (1, 2, 3, 5):
        set_threads(count)
        batch = build_cpu_lora_batch(pool, spans)
        assert batch.tables is not None
        assert not batch.segments
        teams.append(batch.tables.num_threads)
        results.append(y.clone())
        batch.add(results[-1], x, "qkv", 0)
    assert teams == [1, 2, 3, 5]
    assert not torch.equal(results[0], y)
    assert all(torch.equal(result, results[0]) for result in results)


FEWER = """
import torch
from tests.kernels.test_lora import random_adapter, SPEC
from server.lora.batch import TokenSpan
from server.lora.cpu_batch import build_cpu_lora_batch
from server.lora.pool import AdapterPool
pool = AdapterPool(SPEC, 1 << 18, torch.float32, torch.device("cpu"))
rows = pool.allocate(9)
pool.write(rows, random_adapter(9, torch.float32, torch.Generator().manual_seed(0)))
x, results = torch.randn(20, 32), []
for count in (4, 1):
    torch.set_num_threads(count)
    batch = build_cpu_lora_batch(pool, [TokenSpan(20, rows)])
    assert batch.tables.num_threads == count
    results.append(torch.zeros(20, 64))
    batch.add(results[-1], x, "qkv", 0)
assert (results[0] != 0).any(dim=1).all() and torch.equal(*results)
"""


def test_fewer_threads_than_were_asked_for_do_all_of_it() -> None:
    environment = {**os.environ, "OMP_THREAD_LIMIT": "2"}
    subprocess.run([sys.executable, "-c", FEWER], check=True, env=environment, cwd=ROOT, timeout=120)


def is_seven(kernel: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether what was compiled for float32 adds 2 · 3 to 1."""
    shape = LoraBlocksShape(tokens=1, rows=1, blocks=1, block_tokens=1, max_rank=1)
    tables = BlockTables.of(shape.view(torch.tensor([0, 1, 0, 1, 0, 0, 1], dtype=torch.int32)))
    rows, y = LoraRows.of(torch.full((1, 1, 1), 2.0), [torch.full((1, 1), 3.0)]), torch.ones(1, 1)
    monkeypatch.setattr("server.kernels.cpu.lora.compiled", lambda dtype: kernel)
    lora_add(y, torch.ones(1, 1), rows, tables)
    return y.item() == 7.0


def is_locked(folder: Path) -> bool:
    with next(folder.rglob("lora.lock")).open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@pytest.mark.parametrize("fault", ["cannot cache", "no room"])
def test_where_no_cache_can_be_written_the_kernel_is_compiled_all_the_same(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where one can, no other process writes at the same time."""

    def save(self: object, key: object, data: object) -> None:
        assert is_locked(tmp_path)
        raise OSError(errno.ENOSPC, fault)

    caplog.set_level("INFO", "server.kernels")
    monkeypatch.setattr("numba.config.CACHE_DIR", str(tmp_path))
    if fault == "cannot cache":  # Numba, without a directory
        monkeypatch.setattr("numba.core.caching.CacheImpl._locator_classes", [])
    monkeypatch.setattr("numba.core.caching.IndexDataCacheFile.save", save)
    assert is_seven(compiled.__wrapped__(torch.float32), monkeypatch)
    assert "is compiled at each start" in caplog.text
    assert fault in caplog.text


def test_machine_code_that_was_cut_short_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("numba.config.CACHE_DIR", str(tmp_path))
    hits = [compiled.__wrapped__(torch.float32).compiled.cache_hits]
    for kind in ("nbc", "nbi"):  # the code, and Numba's index of it
        (entry,) = tmp_path.rglob(f"*.{kind}")
        entry.write_bytes(entry.read_bytes()[:-1] if kind == "nbc" else b"")
        kernels = [compiled.__wrapped__(torch.float32) for _ in range(2)]
        assert all(is_seven(kernel, monkeypatch) for kernel in kernels)
        hits += [kernel.compiled.cache_hits for kernel in kernels]
    assert hits == [0, 0, 1, 0, 1]


def added(batch: LowRankTerm | None) -> LowRankTerm:
    assert batch is not None
    return batch
