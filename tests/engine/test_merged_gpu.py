"""Merged serving on a GPU: captured steps compute with the weights that are there now."""

import random
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from server.engine.messages import AdapterRef, MergeAdapter, SamplingParams, Serving, StopParams, Submit, UnmergeAdapter
from tests.engine.inprocess import Driver, make_adapter
from tests.engine.test_gpu import TOLERANCE, oracle_logprobs, random_llama

pytestmark = pytest.mark.gpu

PROBE = random.Random(9).choices(range(1000), k=64)
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    return random_llama(tmp_path_factory.mktemp("base"), heads=8, kv_heads=2, head_dim=64)


@pytest.fixture(scope="module")
def adapters(llama: tuple[PreTrainedModel, Path], tmp_path_factory: pytest.TempPathFactory) -> list[AdapterRef]:
    root = tmp_path_factory.mktemp("adapters")
    return [make_adapter(llama[0], root / f"a{i}", i, std=0.06, r=rank) for i, rank in enumerate((16, 24, 100))]


def make_driver(directory: Path, **settings: Any) -> Driver:
    """Without what a run leaves for the next: two runs are then the same steps, whose bits are the same."""
    defaults: dict[str, Any] = {
        "max_batch_tokens": 96,
        "kv_cache_bytes": 4 << 20,
        "compensates_merged": True,
        "prefix_caching": False,
    }
    return Driver(directory, overlap=None, device="cuda", **(defaults | settings))


def run(driver: Driver, adapters: list[AdapterRef | None], tag: str) -> dict[str, tuple[list[int], list[float]]]:
    """Tokens and log-probabilities of four requests for each, all at once."""
    rng = random.Random(1)
    names = []
    for i in range(4 * len(adapters)):
        names.append(f"{tag}{i}")
        sampling = SamplingParams(temperature=0.0, seed=0, logprobs=0)
        ids = rng.choices(range(1000), k=3 + 5 * i)
        stopping = StopParams(NUM_TOKENS, ignore_eos=True)
        driver.engine.handle(Submit(names[-1], ids, sampling, stopping, adapters[i % len(adapters)]))
    driver.run(*names)
    found = {}
    for name in names:
        drawn = [lp.logprob for out in driver.inbox.outputs[name] for lp in out.logprobs or []]
        found[name] = (driver.inbox.tokens(name), drawn)
    return found


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_merged_and_compensated_answers_are_pefts(
    dtype: str, llama: tuple[PreTrainedModel, Path], adapters: list[AdapterRef]
) -> None:
    model, directory = llama
    driver = make_driver(directory, dtype=dtype)
    asked: list[AdapterRef | None] = [None, *adapters]
    run(driver, asked, "loads the adapters ")
    before, unmerged = driver.engine._merged._merger.digest(), run(driver, asked, "u")
    for turn in range(2):
        done = driver.call(MergeAdapter(f"m{turn}", adapters[turn], PROBE, 1e9))
        assert done.error is None, done.error
        assert driver.engine._merged._merger.digest() != before
        rng = random.Random(1)
        for i, (name, (tokens, drawn)) in enumerate(run(driver, asked, f"m{turn}-").items()):
            ids, adapter = rng.choices(range(1000), k=3 + 5 * i), asked[i % len(asked)]
            want = oracle_logprobs(model, ids, tokens, adapter)
            worst = max(abs(a - b) for a, b in zip(drawn, want, strict=True))
            assert worst < TOLERANCE[dtype], f"{name}: {worst}"
            serving = Serving.MERGED if adapter is adapters[turn] else Serving.COMPENSATED
            assert driver.inbox.outputs[name][-1].serving is serving
        assert driver.call(UnmergeAdapter(f"b{turn}", adapters[turn].digest, 1e9)).error is None
        assert driver.engine._merged._merger.digest() == before
    again = run(driver, asked, "a")
    assert [tokens for tokens, _ in again.values()] == [tokens for tokens, _ in unmerged.values()]


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_four_bits_come_back_bit_for_bit(
    quant_type: str, llama: tuple[PreTrainedModel, Path], adapters: list[AdapterRef]
) -> None:
    driver = make_driver(llama[1], dtype="bfloat16", quantization=quant_type)
    run(driver, [None, adapters[0]], "loads the adapter ")
    before, unmerged = driver.engine._merged._merger.digest(), run(driver, [None, adapters[0]], "u")
    done = driver.call(MergeAdapter("merge", adapters[0], PROBE, 1e9, force=True))
    assert done.report is not None
    assert done.report.held_bytes > 0
    assert driver.engine._merged._merger.digest() != before
    run(driver, [None, adapters[0]], "m")
    assert driver.call(UnmergeAdapter("unmerge", adapters[0].digest, 1e9)).error is None
    assert driver.engine._merged._merger.digest() == before
    again = run(driver, [None, adapters[0]], "a")
    assert [tokens for tokens, _ in again.values()] == [tokens for tokens, _ in unmerged.values()]
