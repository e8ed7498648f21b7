"""Adapters come, stay and go on request while sequences run, by the engine's messages."""

import shutil
import threading
import time
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from server.engine.messages import AdapterRef, Cancel, LoadAdapter, UnloadAdapter, UnpinAdapter
from server.lora.pool import AdapterPool, Ranges
from server.lora.weights import PackedAdapter
from tests.engine.inprocess import Driver, make_adapter, oracle_tokens
from tests.engine.test_parity import driver_row_bytes, prompt
from tests.model.tiny import save_tiny


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    directory = tmp_path_factory.mktemp("llama")
    return save_tiny("llama", directory), directory


@pytest.fixture(scope="module")
def adapters(llama: tuple[PreTrainedModel, Path], tmp_path_factory: pytest.TempPathFactory) -> list[AdapterRef]:
    """Four of rank 8."""
    root = tmp_path_factory.mktemp("adapters")
    return [make_adapter(llama[0], root / f"a{i}", i) for i in range(4)]


@pytest.fixture(scope="module")
def row_bytes(llama: tuple[PreTrainedModel, Path]) -> int:
    return driver_row_bytes(llama[1])


def tiers(driver: Driver, adapter: AdapterRef) -> list[str]:
    return [entry.tier for entry in driver.engine.stats().adapters if entry.digest == adapter.digest]


def test_a_load_tells_its_stages_and_then_its_end(
    llama: tuple[PreTrainedModel, Path],
    adapters: list[AdapterRef],
    row_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    may_copy = threading.Event()

    def write(pool: AdapterPool, ranges: Ranges, adapter: PackedAdapter) -> None:
        may_copy.wait()
        copy(pool, ranges, adapter)

    copy = AdapterPool.write
    monkeypatch.setattr(AdapterPool, "write", write)
    driver = Driver(llama[1], host_adapter_bytes=1 << 20)
    driver.engine.handle(LoadAdapter("call", adapters[0]))
    try:
        driver.step_until(lambda: len(driver.inbox.progress) == 2)
    finally:
        may_copy.set()
    assert driver.answer("call").error is None
    seen = [(progress.stage, progress.total_bytes) for progress in driver.inbox.progress]
    assert seen[:2] == [("reading", 0), ("copying", 8 * row_bytes)]
    assert seen[2:] in ([], [("checking", 8 * row_bytes)])
    assert all(progress.call_id == "call" for progress in driver.inbox.progress)
    assert tiers(driver, adapters[0]) == ["host", "device"]
    assert driver.inbox.stats[-1].adapters == driver.engine.stats().adapters, "told before the call ended"
    driver.inbox.progress.clear()
    assert driver.call(LoadAdapter("again", adapters[0])).error is None
    assert driver.inbox.progress == []


def test_statistics_count_by_tier(
    llama: tuple[PreTrainedModel, Path], adapters: list[AdapterRef], row_bytes: int
) -> None:
    driver = Driver(llama[1], adapter_cache_bytes=8 * row_bytes, host_adapter_bytes=1 << 20)
    for adapter in (adapters[0], adapters[1], adapters[0], adapters[0]):
        driver.generate(prompt(0, 5), 2, adapter)
    driver.generate(prompt(0, 5), 2)
    stats = driver.engine.stats()
    assert stats.adapter_loads == {"host": 2, "device": 3}
    assert stats.adapter_hits == {"host": 1, "device": 1}
    assert stats.adapter_misses == {"host": 2, "device": 3}
    assert stats.adapter_evictions == {"host": 0, "device": 2}
    assert stats.adapter_bytes == {"host": 16 * row_bytes, "device": 8 * row_bytes}
    driver.call(LoadAdapter("call", adapters[0]))  # has the statistics sent
    told = [load for sent in driver.inbox.stats for load in sent.adapter_load_times]
    assert sorted((load.tier_from, load.tier_to) for load in told) == [("disk", "host")] * 2 + [("host", "device")] * 3
    assert all(load.seconds > 0 for load in told)


def test_sequences_that_wait_are_counted_by_adapter(
    llama: tuple[PreTrainedModel, Path], adapters: list[AdapterRef]
) -> None:
    driver = Driver(llama[1], max_num_seqs=1)
    for i, adapter in enumerate((None, adapters[0], adapters[1], adapters[1])):
        driver.submit(f"r{i}", prompt(i, 4), 3, adapter)
    assert driver.engine.stats().waiting_by_adapter == {adapters[0].digest: 1, adapters[1].digest: 2}
    driver.run("r0", "r1", "r2", "r3")
    assert driver.engine.stats().waiting_by_adapter == {}


def test_an_adapter_comes_back_from_the_host_without_its_files(
    llama: tuple[PreTrainedModel, Path], tmp_path: Path, row_bytes: int
) -> None:
    model, base = llama
    driver = Driver(base, adapter_cache_bytes=8 * row_bytes, host_adapter_bytes=1 << 20)
    first, second = (make_adapter(model, tmp_path / name, i) for i, name in enumerate(("first", "second")))
    want = oracle_tokens(model, prompt(1, 9), 6, first)
    assert driver.generate(prompt(1, 9), 6, first) == want
    driver.generate(prompt(2, 9), 6, second)
    assert tiers(driver, first) == ["host"]
    shutil.rmtree(first.path)
    assert driver.generate(prompt(1, 9), 6, first) == want


def test_a_pinned_adapter_stays_until_it_is_unpinned(
    llama: tuple[PreTrainedModel, Path], adapters: list[AdapterRef], row_bytes: int
) -> None:
    driver = Driver(llama[1], adapter_cache_bytes=16 * row_bytes, host_adapter_bytes=0)
    assert driver.call(LoadAdapter("pin", adapters[0], pin=True)).error is None
    assert [entry.pinned for entry in driver.engine.stats().adapters] == [True]
    for adapter in adapters[1:]:
        driver.generate(prompt(0, 5), 2, adapter)
    assert tiers(driver, adapters[0]) == ["device"]
    error = driver.call(LoadAdapter("too many", adapters[1], pin=True)).error
    assert error is not None
    assert error.reason == "ADAPTER_PIN_REFUSED"
    assert driver.call(UnpinAdapter("unpin", adapters[0].digest)).error is None
    for adapter in adapters[1:3]:
        driver.generate(prompt(0, 5), 2, adapter)
    assert tiers(driver, adapters[0]) == []


def test_unload_refuses_while_sequences_run(llama: tuple[PreTrainedModel, Path], adapters: list[AdapterRef]) -> None:
    driver = Driver(llama[1])
    driver.generate(prompt(0, 5), 2, adapters[0])
    driver.submit("runs", prompt(0, 5), 5, adapters[0])
    driver.engine.step()
    error = driver.call(UnloadAdapter("refused", adapters[0].digest)).error
    assert error is not None
    assert error.reason == "ADAPTER_IN_USE"
    driver.run("runs")
    assert driver.call(UnloadAdapter("done", adapters[0].digest)).error is None
    assert tiers(driver, adapters[0]) == []


def test_unload_drains_what_runs_and_who_comes_later_has_it_loaded_anew(
    llama: tuple[PreTrainedModel, Path], adapters: list[AdapterRef]
) -> None:
    model, base = llama
    driver = Driver(base, host_adapter_bytes=1 << 20)
    driver.generate(prompt(0, 5), 2, adapters[0])
    driver.submit("runs", prompt(1, 5), 20, adapters[0])
    driver.engine.step()
    driver.engine.handle(UnloadAdapter("drain", adapters[0].digest, drain=True))
    assert [(progress.call_id, progress.stage) for progress in driver.inbox.progress] == [("drain", "draining")]
    driver.submit("later", prompt(2, 5), 4, adapters[0])
    while not driver.inbox.ended("runs"):
        assert "drain" not in driver.inbox.calls, "a sequence still holds it"
        assert not driver.inbox.outputs.get("later"), "it was given to another while it drains"
        driver.engine.step()
    driver.run("later")
    assert driver.inbox.calls["drain"].error is None
    assert driver.inbox.tokens("runs") == oracle_tokens(model, prompt(1, 5), 20, adapters[0])
    assert driver.inbox.tokens("later") == oracle_tokens(model, prompt(2, 5), 4, adapters[0])
    assert driver.engine.stats().adapter_loads["host"] == 2, "it was read again"


def test_an_unload_that_finds_nobody_ends_the_drains_before_it(
    llama: tuple[PreTrainedModel, Path], adapters: list[AdapterRef]
) -> None:
    driver = Driver(llama[1])
    driver.generate(prompt(0, 5), 2, adapters[0])
    driver.submit("runs", prompt(1, 5), 4, adapters[0])
    driver.engine.step()
    driver.engine.handle(UnloadAdapter("drain", adapters[0].digest, drain=True))
    driver.run("runs")
    driver.engine.handle(UnloadAdapter("now", adapters[0].digest))
    for call in ("now", "drain"):
        assert driver.answer(call).error is None
    assert tiers(driver, adapters[0]) == []


def test_a_load_that_is_unloaded_before_it_ends_is_cancelled(
    llama: tuple[PreTrainedModel, Path], adapters: list[AdapterRef]
) -> None:
    driver = Driver(llama[1])
    driver.engine.handle(LoadAdapter("load", adapters[0]))
    assert driver.call(UnloadAdapter("unload", adapters[0].digest)).error is None
    error = driver.inbox.calls["load"].error
    assert error is not None
    assert error.reason == "ADAPTER_LOAD_CANCELLED"
    driver.generate(prompt(0, 5), 2)
    assert driver.call(LoadAdapter("again", adapters[0])).error is None
    assert "device" in tiers(driver, adapters[0])


def test_cancelled_requests_leave_their_adapters_rows_to_others(
    llama: tuple[PreTrainedModel, Path], adapters: list[AdapterRef], row_bytes: int
) -> None:
    """The one row for sequences is taken: an adapter that arrives is claimed until its request is cancelled."""
    driver = Driver(llama[1], adapter_cache_bytes=8 * row_bytes, host_adapter_bytes=0, max_num_seqs=1)
    driver.submit("runs", prompt(0, 5), 60)
    driver.submit("first", prompt(0, 5), 2, adapters[0])
    driver.submit("second", prompt(0, 5), 2, adapters[1])
    driver.engine.step()
    while not driver.engine.stats().adapters:
        driver.engine._poll_adapters()
        time.sleep(0.001)  # leave the interpreter to the thread that reads it
    arrived = driver.engine.stats().adapters[0].digest
    driver.engine.handle(Cancel("first" if arrived == adapters[0].digest else "second"))
    left = "second" if arrived == adapters[0].digest else "first"
    driver.run("runs", left)
    assert driver.inbox.tokens(left)


def test_a_digest_in_two_directories_is_one_adapter(
    llama: tuple[PreTrainedModel, Path], adapters: list[AdapterRef], tmp_path: Path
) -> None:
    """Names move; what is loaded is keyed by content."""
    driver = Driver(llama[1])
    want = driver.generate(prompt(0, 5), 6, adapters[0])
    moved = AdapterRef(adapters[0].digest, str(tmp_path / "gone"))
    assert driver.generate(prompt(0, 5), 6, moved) == want
