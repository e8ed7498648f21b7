"""The Triton low-rank kernels against an adapter-by-adapter float64 loop: interpreted here, compiled on a GPU."""

from tests.kernels import triton_device  # isort: skip  (first: it sets the interpreter up)

import random
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from server.kernels.lora_blocks import LoraBlocks, LoraBlocksShape, Ranges, count_blocks
from server.kernels.reference import lora as reference
from server.kernels.triton import layer as triton_layer
from server.kernels.triton import lora
from server.kernels.triton.plans import (
    AnyPlan,
    DecodePlan,
    ExpandPlan,
    LoraPlan,
    ShrinkPlan,
    lora_plan,
    lora_plans,
    lora_scratch_size,
)

DEVICE = torch.device(triton_device.DEVICE)
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
POPULARITY = ("distinct", "uniform", "zipf", "identical", "some base")
MAX_RANK = 64
# Small tiles, so that small shapes have several splits, tiles and slices with tails.
SMALL = LoraPlan(
    ShrinkPlan(block_k=16, block_r=16, programs=2, splits=3, num_warps=4, num_stages=2),
    ExpandPlan(block_n=16, num_warps=4, num_stages=2, most_tiles=2),
    ExpandPlan(block_n=16, num_warps=4, num_stages=2, most_tiles=2),
)

# Fewer programs than there is to do, and so many that they share tiles.
SMALL_DECODE = DecodePlan(block_k=16, shrink_warps=4, block_n=32, expand_warps=4, dot_n=16, programs=7)
MANY_PROGRAMS = replace(SMALL_DECODE, programs=2000)
PLANS = pytest.mark.parametrize(
    "plan", [SMALL, SMALL_DECODE, MANY_PROGRAMS], ids=["prefill", "decode", "many programs"]
)


class Product(NamedTuple):
    in_features: int
    widths: tuple[int, ...]


class Pool(NamedTuple):
    """One layer's rows of one product, and which of them each adapter has."""

    a: Tensor
    b: tuple[Tensor, ...]
    adapters: list[Ranges]

    @property
    def max_rank(self) -> int:
        """Of its adapters, rounded up as tables want it."""
        return -(-max(sum(stop - start for start, stop in ranges) for ranges in self.adapters) // 16) * 16


def make_pool(
    product: Product,
    ranks: tuple[int, ...],
    dtype: torch.dtype,
    generator: torch.Generator,
    device: torch.device = DEVICE,
) -> Pool:
    """Adapters lie in pages of 4 rows that are dealt out in turn, so that each is in as many pieces as it can be.
    Rows that nobody owns hold the largest finite value."""
    left = list(ranks)
    pieces: list[list[tuple[int, int]]] = [[] for _ in ranks]
    used: list[int] = []
    num_rows = 0
    while any(left):
        for i, count in enumerate(left):
            if count:
                take = min(4, count)
                pieces[i].append((num_rows, num_rows + take))
                used.extend(range(num_rows, num_rows + take))
                left[i] -= take
                num_rows += 4
    slices = len(product.widths)
    owned = torch.zeros(num_rows, dtype=torch.bool, device=device)
    owned[used] = True

    def tensor(*size: int) -> Tensor:
        values = (torch.randn(*size, generator=generator, device=generator.device) * size[-1] ** -0.25).to(
            device, dtype
        )
        values[~owned] = torch.finfo(dtype).max
        return values

    a = tensor(num_rows, slices, product.in_features)
    return Pool(a, tuple(tensor(num_rows, width) for width in product.widths), [tuple(p) for p in pieces])


def choose(popularity: str, count: int, num_adapters: int, rng: random.Random) -> list[int | None]:
    """Which adapter each of `count` sequences has; None is the base."""
    if popularity == "distinct":
        return [i % num_adapters for i in range(count)]
    if popularity == "uniform":
        return [rng.randrange(num_adapters) for _ in range(count)]
    if popularity == "zipf":
        return list(rng.choices(range(num_adapters), [1 / (i + 1) for i in range(num_adapters)], k=count))
    if popularity == "identical":
        return [1] * count
    return [rng.choice([None, 0, 2]) for _ in range(count)]


def make_blocks(
    lengths: tuple[int, ...], owner: list[int | None], pool: Pool, block_tokens: int, spare: int = 0
) -> LoraBlocks:
    """Tables of just the size the batch needs, or with `spare` room in each. The base's tokens have blocks, too."""
    rows = [None if who is None else pool.adapters[who] for who in owner]
    blocks = count_blocks(lengths, rows, block_tokens)
    base = -(-sum(n for n, ranges in zip(lengths, rows, strict=True) if ranges is None) // block_tokens)
    shape = LoraBlocksShape(
        sum(lengths) + spare, len(pool.a) + spare, blocks + spare, block_tokens, pool.max_rank, base and base + spare
    )
    packed = np.full(shape.size, -1, dtype=np.int32)
    assert shape.fill(packed, lengths, rows) == blocks
    return shape.view(torch.from_numpy(packed).to(pool.a.device))


def make_scratch(blocks: LoraBlocks, product: Product, plan: AnyPlan) -> Tensor:
    size = plan.parts(product.in_features) * blocks.token_index.shape[0] * len(product.widths) * blocks.max_rank
    return torch.full((size,), torch.nan, device=blocks.start.device)


def expected(x: Tensor, y: Tensor, pool: Pool, token_owner: list[int | None]) -> Tensor:
    """One adapter at a time, in float64."""
    out = y.double().clone()
    for which in {who for who in token_owner if who is not None}:
        tokens = [i for i, who in enumerate(token_owner) if who == which]
        rows = [row for start, stop in pool.adapters[which] for row in range(start, stop)]
        a, b = pool.a[rows].double(), [weight[rows].double() for weight in pool.b]
        out[tokens] += torch.cat([x[tokens].double() @ a[:, s].T @ b[s] for s in range(len(b))], dim=1)
    return out


def assert_close(got: Tensor, before: Tensor, want: Tensor, tolerance: float, token_owner: list[int | None]) -> None:
    assert (got.double() - want).norm() <= tolerance * want.norm()
    base = [i for i, who in enumerate(token_owner) if who is None]
    assert torch.equal(got[base], before[base]), "a base token was changed"


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("ranks", [(8, 8, 8), (1, 3, 17), (70, 2, 16)], ids=str)
@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize(
    ("lengths", "block_tokens"), [((1,) * 9, 16), ((1, 1, 5, 2, 37), 32)], ids=["decode", "ragged"]
)
def test_parity(
    dtype: torch.dtype, ranks: tuple[int, ...], popularity: str, lengths: tuple[int, ...], block_tokens: int
) -> None:
    generator = torch.Generator(DEVICE).manual_seed(7)
    product = Product(40, (48, 16, 16))
    pool = make_pool(product, ranks, dtype, generator)
    owner = choose(popularity, len(lengths), len(ranks), random.Random(7))
    token_owner = [who for n, who in zip(lengths, owner, strict=True) for _ in range(n)]
    blocks = make_blocks(lengths, owner, pool, block_tokens)
    x = torch.randn(len(token_owner), product.in_features, generator=generator, device=DEVICE).to(dtype)
    y = torch.randn(len(token_owner), sum(product.widths), generator=generator, device=DEVICE).to(dtype)
    want = expected(x, y, pool, token_owner)
    plan = SMALL_DECODE if block_tokens == 16 else SMALL
    for operation, arguments in ((lora.lora_add, {"plan": plan}), (reference.lora_add, {})):
        got, scratch = y.clone(), make_scratch(blocks, product, plan)
        operation(got, x, pool.a, pool.b, blocks, product.widths, scratch, **arguments)
        assert_close(got, y, want, TOLERANCE[dtype], token_owner)


@pytest.mark.parametrize("product", [Product(32, (64,)), Product(48, (56, 56)), Product(16, (20, 4, 8))], ids=str)
@pytest.mark.parametrize("block_tokens", [16, 64])
def test_the_plan_of_the_table_serves_any_product(product: Product, block_tokens: int) -> None:
    """Widths and inputs that no tile divides, with the plan and the scratch that the tables give."""
    generator = torch.Generator(DEVICE).manual_seed(3)
    pool = make_pool(product, (5, 20), torch.float32, generator)
    lengths, owner = (3, 1, 2), [1, None, 0]
    blocks = make_blocks(lengths, owner, pool, block_tokens)
    x = torch.randn(6, product.in_features, generator=generator, device=DEVICE)
    y = torch.randn(6, sum(product.widths), generator=generator, device=DEVICE)
    token_owner = [1, 1, 1, None, 0, 0]
    shape = LoraBlocksShape(blocks.token_index.shape[0], 1, blocks.num_blocks, block_tokens, pool.max_rank)
    scratch = torch.full((lora_scratch_size(shape, [product], DEVICE),), torch.nan, device=DEVICE)
    got = y.clone()
    lora.lora_add(got, x, pool.a, pool.b, blocks, product.widths, scratch)
    assert_close(got, y, expected(x, y, pool, token_owner), 1e-6, token_owner)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("popularity", ["uniform", "some base"])
@pytest.mark.parametrize(("plan", "width"), [(SMALL, 64), (SMALL, 56), (SMALL_DECODE, 48)])
def test_silu_mul_with_the_term(dtype: torch.dtype, popularity: str, plan: AnyPlan, width: int) -> None:
    """Of every token, the base's too: bit for bit the expand and then SiLU × up, and right."""
    generator = torch.Generator(DEVICE).manual_seed(9)
    product = Product(40, (width, width))
    pool = make_pool(product, (8, 17, 33), dtype, generator)
    lengths = (1,) * 12 if isinstance(plan, DecodePlan) else (1, 9, 20, 2, 37, 16)
    owner = choose(popularity, len(lengths), 3, random.Random(8))
    token_owner = [who for n, who in zip(lengths, owner, strict=True) for _ in range(n)]
    blocks = make_blocks(lengths, owner, pool, 16)
    x = torch.randn(len(token_owner), product.in_features, generator=generator, device=DEVICE).to(dtype)
    y = torch.randn(len(token_owner), 2 * width, generator=generator, device=DEVICE).to(dtype)
    apart = y.clone()
    lora.lora_add(apart, x, pool.a, pool.b, blocks, product.widths, make_scratch(blocks, product, plan), plan)
    scratch = make_scratch(blocks, product, plan)
    got = lora.lora_silu_mul(y.clone(), x, pool.a, pool.b, blocks, scratch, plan)
    assert torch.equal(got, triton_layer.silu_mul(apart))
    gate, up = expected(x, y, pool, token_owner).split(width, dim=1)
    want = torch.nn.functional.silu(gate) * up
    assert (got.double() - want).norm() <= 3 * TOLERANCE[dtype] * want.norm()


@PLANS
def test_the_same_bits_every_time_and_wherever_the_tokens_stand(plan: AnyPlan) -> None:
    """A token's result depends neither on its neighbours nor on its place in the batch."""
    generator = torch.Generator(DEVICE).manual_seed(4)
    product = Product(64, (48, 48))
    pool = make_pool(product, (8, 17, 3), torch.bfloat16, generator)
    x = torch.randn(20, product.in_features, generator=generator, device=DEVICE).bfloat16()
    y = torch.randn(20, sum(product.widths), generator=generator, device=DEVICE).bfloat16()
    owner = choose("uniform", 20, 3, random.Random(1))

    def run(order: list[int]) -> Tensor:
        blocks = make_blocks((1,) * 20, [owner[i] for i in order], pool, 16)
        got = y[order]
        scratch = make_scratch(blocks, product, plan)
        lora.lora_add(got, x[order], pool.a, pool.b, blocks, product.widths, scratch, plan)
        return got

    order = random.Random(2).sample(range(20), 20)
    first = run(list(range(20)))
    assert torch.equal(first, run(list(range(20))))
    assert torch.equal(first[order], run(order))


@PLANS
@pytest.mark.parametrize("spare", [1, 3, 7])
def test_rows_of_a_larger_buffer_and_unused_room_in_the_tables(plan: AnyPlan, spare: int) -> None:
    """x and y may be parts of wider rows; blocks beyond the batch's do nothing of their own, whatever their other
    entries say."""
    generator = torch.Generator(DEVICE).manual_seed(5)
    product = Product(32, (32, 16))
    pool = make_pool(product, (4, 6), torch.float32, generator)
    wide_x = torch.randn(5, 50, generator=generator, device=DEVICE)
    wide_y = torch.randn(5, 64, generator=generator, device=DEVICE)
    x, y = wide_x[:, 3:35], wide_y[:, 8:56]
    owner = [0, None, 1, 0, 0]
    blocks = make_blocks((1,) * 5, owner, pool, 16, spare=spare)
    want, before = expected(x, y, pool, owner), wide_y.clone()
    lora.lora_add(y, x, pool.a, pool.b, blocks, product.widths, make_scratch(blocks, product, plan), plan)
    assert_close(y, before[:, 8:56], want, 1e-6, owner)
    assert torch.equal(wide_y[:, :8], before[:, :8])
    assert torch.equal(wide_y[:, 56:], before[:, 56:])


def test_tables_group_tokens_by_adapter_in_blocks() -> None:
    shape = LoraBlocksShape(tokens=12, rows=8, blocks=5, block_tokens=4, max_rank=8)
    first, second = ((0, 4), (12, 13)), ((20, 22),)
    packed = np.full(shape.size, 99, dtype=np.int32)
    assert shape.fill(packed, [1, 5, 2, 1, 3], [first, second, None, first, first]) == 4
    blocks = shape.view(torch.from_numpy(packed))
    assert blocks.length.tolist() == [4, 1, 4, 1, 0]
    assert blocks.start[:4].tolist() == [0, 4, 5, 9]
    assert blocks.first_row[:4].tolist() == [0, 0, 5, 5]
    assert blocks.rank[:4].tolist() == [5, 5, 2, 2]
    assert blocks.token_index[:10].tolist() == [0, 8, 9, 10, 11, 1, 2, 3, 4, 5]
    assert blocks.row_index[:7].tolist() == [0, 1, 2, 3, 12, 20, 21]
    assert blocks.count.tolist() == [4]
    assert shape.fill(packed, [7], [None]) == 0
    assert blocks.count.tolist() == [0]
    assert blocks.length.tolist() == [0] * 5


def test_blocks_of_the_base_come_after_all_others() -> None:
    shape = LoraBlocksShape(tokens=12, rows=8, blocks=3, block_tokens=4, max_rank=8, base_blocks=3)
    packed = np.full(shape.size, 99, dtype=np.int32)
    assert shape.fill(packed, [2, 1, 5, 3], [None, ((0, 4),), None, ((0, 4),)]) == 1
    blocks = shape.view(torch.from_numpy(packed))
    assert blocks.length.tolist() == [4, 0, 0, 4, 3, 0]
    assert (blocks.num_blocks, blocks.base_blocks, blocks.count.tolist()) == (3, 3, [1])
    assert blocks.rank[3:5].tolist() == [0, 0]
    tokens = blocks.token_index.tolist()
    assert tokens[:4] == [2, 8, 9, 10]
    assert [tokens[blocks.start[i] :][: blocks.length[i]] for i in (3, 4)] == [[0, 1, 3, 4], [5, 6, 7]]


def test_tables_too_small_for_a_batch_are_refused() -> None:
    rows: list[Ranges | None] = [((0, 4),), ((4, 8),)]
    lengths, rows = [4, 2, 5], [*rows, None]
    fits = LoraBlocksShape(tokens=11, rows=8, blocks=2, block_tokens=4, max_rank=4, base_blocks=2)
    fits.fill(np.zeros(fits.size, dtype=np.int32), lengths, rows)
    for short in ({"tokens": 10}, {"rows": 7}, {"blocks": 1}, {"max_rank": 3}, {"base_blocks": 1}):
        shape = replace(fits, **short)
        with pytest.raises(AssertionError):
            shape.fill(np.zeros(shape.size, dtype=np.int32), lengths, rows)


@pytest.mark.parametrize("product", [Product(4096, (4096, 1024, 1024)), Product(576, (576,))], ids=str)
@pytest.mark.parametrize("block_tokens", [16, 64])
def test_no_batch_needs_a_plan_that_is_not_known_ahead(product: Product, block_tokens: int) -> None:
    """What is compiled at start-up is all that serving needs, and is little."""
    known = lora_plans(*product, block_tokens, DEVICE)
    assert len(known) <= 4
    assert {lora_plan(*product, count, block_tokens, DEVICE) for count in range(1, 3000)} <= known


LLAMA_8B = {
    "qkv": Product(4096, (4096, 1024, 1024)),
    "o": Product(4096, (4096,)),
    "gate_up": Product(4096, (14336, 14336)),
    "down": Product(14336, (4096,)),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", list(LLAMA_8B))
@pytest.mark.parametrize("batch", ["decode", "prefill"])
def test_real_shapes_on_a_gpu(dtype: torch.dtype, name: str, batch: str) -> None:
    generator = torch.Generator(DEVICE).manual_seed(11)
    product = LLAMA_8B[name]
    ranks = (16, 8, 64, 5)
    pool = make_pool(product, ranks, dtype, generator)
    lengths = (1,) * 61 if batch == "decode" else (300, 1, 77, 512, 130)
    owner = choose("some base", len(lengths), len(ranks), random.Random(3))
    token_owner = [who for n, who in zip(lengths, owner, strict=True) for _ in range(n)]
    blocks = make_blocks(lengths, owner, pool, 16 if batch == "decode" else 64)
    plan = lora_plan(*product, blocks.num_blocks, blocks.block_tokens, DEVICE)
    x = torch.randn(len(token_owner), product.in_features, generator=generator, device=DEVICE).to(dtype)
    y = torch.randn(len(token_owner), sum(product.widths), generator=generator, device=DEVICE).to(dtype)
    scratch = make_scratch(blocks, product, plan)

    def summed() -> Tensor:
        got = y.clone()
        lora.lora_add(got, x, pool.a, pool.b, blocks, product.widths, scratch)
        return got

    got = summed()
    assert_close(got, y, expected(x, y, pool, token_owner), TOLERANCE[dtype], token_owner)
    assert torch.equal(summed(), got)
    if name == "gate_up":
        gated = lora.lora_silu_mul(y.clone(), x, pool.a, pool.b, blocks, scratch)
        assert torch.equal(gated, triton_layer.silu_mul(got))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", list(LLAMA_8B))
@pytest.mark.parametrize("early", [False, True], ids=["in turn", "early"])
def test_a_graph_replays_with_other_tables(dtype: torch.dtype, name: str, early: bool) -> None:
    """One capture for 32 tokens, of the base's product and the low-rank term, serves batches of other adapters, ranks
    and popularity, bit for bit as launched one by one."""
    generator = torch.Generator(DEVICE).manual_seed(12)
    product = LLAMA_8B[name]
    ranks = (16, 8, 64, 5)
    pool = make_pool(product, ranks, dtype, generator)
    shape = LoraBlocksShape(tokens=32, rows=sum(ranks), blocks=32, block_tokens=16, max_rank=MAX_RANK)
    packed = np.zeros(shape.size, dtype=np.int32)
    tables = torch.from_numpy(packed).to(DEVICE)
    blocks = shape.view(tables)
    scratch = torch.full((lora_scratch_size(shape, [product], DEVICE),), torch.nan, device=DEVICE)
    plan = replace(lora_plan(*product, blocks.num_blocks, blocks.block_tokens, DEVICE), early=early)
    weight = torch.randn(product.in_features, sum(product.widths), generator=generator, device=DEVICE).to(dtype)
    x = torch.randn(32, product.in_features, generator=generator, device=DEVICE).to(dtype)
    base = torch.empty(32, sum(product.widths), dtype=dtype, device=DEVICE)
    y = torch.empty_like(base)

    def forward() -> None:
        torch.mm(x, weight, out=base)
        torch.mm(x, weight, out=y)
        lora.lora_add(y, x, pool.a, pool.b, blocks, product.widths, scratch, plan)

    forward()  # compiled before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward()
    for popularity in (*POPULARITY, "base"):
        owner = choose(popularity, 32, len(ranks), random.Random(5)) if popularity != "base" else [None] * 32
        shape.fill(packed, [1] * 32, [None if who is None else pool.adapters[who] for who in owner])
        tables.copy_(torch.from_numpy(packed))
        x.copy_(torch.randn(32, product.in_features, generator=generator, device=DEVICE))
        graph.replay()
        replayed = y.clone()
        y.fill_(torch.nan)
        got = base.clone()
        lora.lora_add(got, x, pool.a, pool.b, blocks, product.widths, scratch, replace(plan, early=False))
        assert torch.equal(replayed, got), popularity
        assert_close(replayed, base, expected(x, base, pool, owner), TOLERANCE[dtype], owner)
