"""The engine against transformers and PEFT, token for token in float32: alone, mixed, preempted, overlapped."""

import random
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from server.engine.messages import AdapterRef
from tests.engine.inprocess import ALL_LINEAR, Driver, make_adapter, oracle_tokens
from tests.model.tiny import FAMILIES, save_tiny

VARIANTS: dict[str, dict[str, Any]] = {
    "all-linear": {},
    "rank 1": {"r": 1, "lora_alpha": 1},
    "q and v": {"target_modules": ["q_proj", "v_proj"]},
    "mlp by pattern": {"target_modules": r".*\.mlp\.(gate|up|down)_proj"},
    "rslora": {"r": 16, "lora_alpha": 8, "use_rslora": True},
    "rank pattern": {"rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\.down_proj": 17}},
    "alpha pattern": {"alpha_pattern": {"o_proj": 40, "layers.0.self_attn.k_proj": 1}},
    "one layer": {"layers_to_transform": [1], "layers_pattern": "layers"},
}


def prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(3, 199), k=length)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_variant_of_adapter_in_one_batch(family: str, tmp_path: Path) -> None:
    model = save_tiny(family, tmp_path / "base")
    driver = Driver(tmp_path / "base")
    adapters: dict[str, AdapterRef | None] = {"base": None}
    for i, (name, config) in enumerate(VARIANTS.items()):
        adapters[name] = make_adapter(model, tmp_path / f"adapter{i}", i, **config)
    prompts = {name: prompt(i, 5 + 7 * i) for i, name in enumerate(adapters)}
    for name, adapter in adapters.items():
        driver.submit(name, prompts[name], 12, adapter)
    driver.run(*adapters)
    base = oracle_tokens(model, prompts["base"], 12, None)
    for name, adapter in adapters.items():
        want = oracle_tokens(model, prompts[name], 12, adapter)
        assert driver.inbox.tokens(name) == want, name
        if adapter is not None:
            assert oracle_tokens(model, prompts["base"], 12, adapter) != base, f"{name} has no effect to be seen"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    directory = tmp_path_factory.mktemp("llama")
    return save_tiny("llama", directory), directory


@pytest.fixture(scope="module")
def eight(llama: tuple[PreTrainedModel, Path], tmp_path_factory: pytest.TempPathFactory) -> list[AdapterRef]:
    """Eight adapters of ranks 4 to 64."""
    root = tmp_path_factory.mktemp("adapters")
    ranks = (4, 64, 8, 16, 5, 32, 12, 48)
    return [
        make_adapter(llama[0], root / f"rank{rank}-{i}", i, r=rank, lora_alpha=2 * rank, target_modules=ALL_LINEAR)
        for i, rank in enumerate(ranks)
    ]


@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("pages", [600, 30], ids=["room", "preempted"])
def test_sixteen_requests_over_eight_adapters(
    overlap: int, pages: int, llama: tuple[PreTrainedModel, Path], eight: list[AdapterRef]
) -> None:
    """Each equals being served alone by transformers and PEFT, however the steps were cut."""
    model, directory = llama
    driver = Driver(directory, overlap, kv_cache_bytes=pages * 8 * 2 * 3 * 2 * 8 * 4)
    requests = {f"r{i}": (prompt(i, 3 + 5 * i), 20, eight[i % 8] if i % 3 else None) for i in range(16)}
    for request_id, (ids, max_tokens, adapter) in requests.items():
        driver.submit(request_id, ids, max_tokens, adapter)
    driver.run(*requests)
    for request_id, (ids, max_tokens, adapter) in requests.items():
        assert driver.inbox.tokens(request_id) == oracle_tokens(model, ids, max_tokens, adapter), request_id
    assert (driver.engine.stats().preemptions > 0) == (pages == 30)
    assert driver.engine.stats().pages_used == 0


@pytest.mark.parametrize("overlap", [0, 1])
def test_a_seed_gives_the_same_tokens_alone_and_in_a_batch(
    overlap: int, llama: tuple[PreTrainedModel, Path], eight: list[AdapterRef]
) -> None:
    settings: dict[str, Any] = {
        "temperature": 0.9,
        "top_p": 0.95,
        "top_k": 50,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.3,
        "seed": 1234,
    }
    alone = Driver(llama[1]).generate(prompt(0, 9), 30, eight[1], **settings)
    driver = Driver(llama[1], overlap, kv_cache_bytes=40 * 8 * 2 * 3 * 2 * 8 * 4)
    for i in range(12):
        driver.submit(f"r{i}", prompt(i, 4 + i), 40, eight[i % 8], temperature=0.7, seed=i)
    driver.submit("same", prompt(0, 9), 30, eight[1], **settings)
    driver.run("same", *(f"r{i}" for i in range(12)))
    assert driver.inbox.tokens("same") == alone
    assert len(set(alone)) > 5, "the draw is not random at all"


def test_the_prefix_cache_is_each_adapters_own(llama: tuple[PreTrainedModel, Path], eight: list[AdapterRef]) -> None:
    model, directory = llama
    driver = Driver(directory)
    ids = prompt(5, 60)
    for adapter in (None, eight[0], eight[1], None, eight[0]):
        assert driver.generate(ids, 8, adapter) == oracle_tokens(model, ids, 8, adapter)
    stats = driver.engine.stats()
    assert stats.prefix_hit_tokens == 2 * 56, "the second visits of base and first adapter reuse seven full pages each"


def test_adapters_beyond_the_room_are_swapped(llama: tuple[PreTrainedModel, Path], eight: list[AdapterRef]) -> None:
    """Room for the largest and little more: adapters come and go, each request still has its own."""
    model, directory = llama
    row_bytes = driver_row_bytes(directory)
    driver = Driver(directory, adapter_cache_bytes=70 * row_bytes)
    requests = {f"r{i}": (prompt(i, 6), 6, eight[i % 8]) for i in range(24)}
    for request_id, (ids, max_tokens, adapter) in requests.items():
        driver.submit(request_id, ids, max_tokens, adapter)
    driver.run(*requests)
    for request_id, (ids, max_tokens, adapter) in requests.items():
        assert driver.inbox.tokens(request_id) == oracle_tokens(model, ids, max_tokens, adapter), request_id
    assert driver.engine.stats().adapter_evictions["device"] > 0


def driver_row_bytes(directory: Path) -> int:
    """Bytes of one rank row, from an engine with one page of rows."""
    memory = Driver(directory, adapter_cache_bytes=1 << 20).engine.stats().memory["adapters"]
    rows = (1 << 20) // memory
    assert rows == 1, "the pool rounds down to whole pages, so it takes nearly all it is given"
    return 3 * 4 * (3 * 48 + 80 + 48 + 48 + 2 * 48 + 160 + 80 + 48)
