"""Merging and unmerging under load: every token is transformers' and PEFT's, and the weights come back."""

import random
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from server.engine.messages import AdapterRef, LoadAdapter, MergeAdapter, Serving, UnloadAdapter, UnmergeAdapter
from tests.engine.inprocess import Driver, make_adapter, oracle_tokens
from tests.engine.test_parity import driver_row_bytes, prompt
from tests.model.tiny import save_tiny

PROBE = prompt(99, 32)
NEVER = 1e9  # seconds


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    directory = tmp_path_factory.mktemp("llama")
    return save_tiny("llama", directory), directory


@pytest.fixture(scope="module")
def adapters(llama: tuple[PreTrainedModel, Path], tmp_path_factory: pytest.TempPathFactory) -> list[AdapterRef]:
    root = tmp_path_factory.mktemp("adapters")
    return [make_adapter(llama[0], root / f"a{i}", i, r=r) for i, r in enumerate((8, 5, 16))]


def merge(call_id: str, adapter: AdapterRef, drain_seconds: float = NEVER) -> MergeAdapter:
    return MergeAdapter(call_id, adapter, PROBE, drain_seconds)


def digest(driver: Driver) -> str:
    return driver.engine._merged._merger.digest()


def serving(driver: Driver, request_id: str) -> Serving:
    first, *_, last = driver.inbox.outputs[request_id]
    assert first.serving == last.serving
    return first.serving


@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("pages", [600, 12], ids=["room", "preempted"])
@pytest.mark.parametrize("compensates", [False, True], ids=["refuse", "compensate"])
def test_no_token_is_wrong_while_adapters_are_merged_and_unmerged_under_load(
    overlap: int,
    pages: int,
    compensates: bool,
    llama: tuple[PreTrainedModel, Path],
    adapters: list[AdapterRef],
) -> None:
    model, directory = llama
    driver = Driver(
        directory, overlap, kv_cache_bytes=pages * 8 * 2 * 3 * 2 * 8 * 4, compensates_merged=compensates, max_num_seqs=8
    )
    before = digest(driver)
    rng = random.Random(f"{overlap} {pages} {compensates}")
    requests: dict[str, tuple[list[int], int, AdapterRef | None]] = {}

    def submit(count: int) -> None:
        for _ in range(count):
            request_id = f"r{len(requests)}"
            ids = prompt(rng.randrange(4), rng.choice((3, 9, 20, 30)))
            requests[request_id] = ids, rng.randrange(1, 40), rng.choice([None, *adapters])
            driver.submit(request_id, *requests[request_id])

    merged: AdapterRef | None = None
    digests = {before}
    for turn in range(8):
        submit(6)
        for _ in range(rng.randrange(12)):
            driver.engine.step()
        there_already = [request_id for request_id in requests if not driver.inbox.ended(request_id)]
        if merged is None:
            merged = rng.choice(adapters)
            driver.engine.handle(merge(f"c{turn}", merged))
        else:
            driver.engine.handle(UnmergeAdapter(f"c{turn}", merged.digest, NEVER))
            merged = None
        submit(6)
        assert driver.answer(f"c{turn}").error is None
        assert all(driver.inbox.ended(request_id) for request_id in there_already), "those that ran ended first"
        assert not set(there_already) & driver.inbox.failed.keys(), "and none was dropped"
        assert (digest(driver) == before) == (merged is None)
        digests.add(digest(driver))
    driver.run(*requests)
    assert digest(driver) == before
    assert len(digests) > 1
    for request_id, (ids, max_tokens, adapter) in requests.items():
        if request_id in driver.inbox.failed:
            error = driver.inbox.failed[request_id].error
            assert (error.code, error.reason) == ("FAILED_PRECONDITION", "BASE_MERGED")
            continue
        assert driver.inbox.tokens(request_id) == oracle_tokens(model, ids, max_tokens, adapter), request_id
    assert bool(driver.inbox.failed) != compensates
    stats = driver.engine.stats()
    assert (stats.merges, stats.unmerges, stats.merge_held_bytes) == (4, 4, 0)
    served = {serving.value for serving in Serving if compensates or serving is not Serving.COMPENSATED}
    assert set(stats.served) == served
    assert sum(stats.served.values()) == len(requests) - len(driver.inbox.failed)
    assert (stats.preemptions > 0) == (pages == 12)
    assert not any(resident.merged for resident in stats.adapters)


def test_answers_say_how_they_were_served(llama: tuple[PreTrainedModel, Path], adapters: list[AdapterRef]) -> None:
    model, directory = llama
    driver = Driver(directory, compensates_merged=True)
    for name, adapter in (("base", None), ("a0", adapters[0])):
        driver.submit(f"{name} unmerged", prompt(0, 9), 4, adapter)
    driver.run("base unmerged", "a0 unmerged")
    done = driver.call(merge("merge", adapters[0]))
    assert done.report is not None
    assert done.report.kl < 1e-6
    assert done.report.held_bytes == driver.engine.stats().merge_held_bytes > 0
    for name, adapter in (("base", None), ("a0", adapters[0]), ("a1", adapters[1])):
        driver.submit(f"{name} after", prompt(0, 9), 4, adapter)
        driver.run(f"{name} after")
        assert driver.inbox.tokens(f"{name} after") == oracle_tokens(model, prompt(0, 9), 4, adapter)
    assert [
        serving(driver, name) for name in ("base unmerged", "a0 unmerged", "base after", "a0 after", "a1 after")
    ] == [
        *[Serving.UNMERGED] * 2,
        Serving.COMPENSATED,
        Serving.MERGED,
        Serving.COMPENSATED,
    ]


def test_merged_requests_run_without_a_low_rank_term(
    llama: tuple[PreTrainedModel, Path], adapters: list[AdapterRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(llama[1])
    assert driver.call(merge("merge", adapters[0])).error is None
    terms: list[object] = []
    forward = driver.engine._runner._model.forward

    def watched(batch, cache):
        terms.append(batch.lora)
        return forward(batch, cache)

    monkeypatch.setattr(driver.engine._runner._model, "forward", watched)
    driver.generate(prompt(0, 9), 4, adapters[0])
    assert terms == [None] * 4


def test_kv_is_not_shared_between_ways_of_serving(
    llama: tuple[PreTrainedModel, Path], adapters: list[AdapterRef]
) -> None:
    """The same prompt for the base and the adapter: unmerged, merged or compensated, and unmerged again."""
    model, directory = llama
    driver = Driver(directory, compensates_merged=True)
    ids = prompt(5, 60)

    def hits() -> list[int]:
        found = []
        for adapter in (None, adapters[0], adapters[1]):
            before = driver.engine.stats().prefix_hit_tokens
            assert driver.generate(ids, 8, adapter) == oracle_tokens(model, ids, 8, adapter)
            found.append(driver.engine.stats().prefix_hit_tokens - before)
        return found

    assert hits() == [0, 0, 0]
    assert driver.call(merge("merge", adapters[0])).error is None
    assert hits() == [0, 0, 0]
    assert hits() == [56, 56, 56]
    assert driver.call(UnmergeAdapter("unmerge", adapters[0].digest, NEVER)).error is None
    assert hits() == [56, 56, 56]
    assert driver.call(merge("other", adapters[1])).error is None
    assert hits() == [0, 0, 0]


def test_progress_tells_of_the_load_the_draining_and_the_writing(
    llama: tuple[PreTrainedModel, Path], adapters: list[AdapterRef]
) -> None:
    driver = Driver(llama[1])
    assert driver.call(merge("cold", adapters[1])).error is None
    stages = [progress.stage for progress in driver.inbox.progress]
    assert (stages[0], stages[-1]) == ("reading", "merging")
    assert driver.call(UnmergeAdapter("unmerge", adapters[1].digest, NEVER)).error is None
    driver.call(LoadAdapter("load", adapters[0]))
    driver.submit("runs", prompt(0, 5), 10)
    driver.engine.step()
    driver.inbox.progress.clear()
    assert driver.call(merge("merge", adapters[0])).error is None
    stages = [progress.stage for progress in driver.inbox.progress]
    assert stages == ["draining"] + ["merging"] * 12
    written = [(each.done_bytes, each.total_bytes) for each in driver.inbox.progress if each.stage == "merging"]
    assert len(written) == 3 * 4
    assert written[-1][0] == written[-1][1] == driver.engine.stats().merge_held_bytes


def test_a_probe_may_be_longer_than_the_context(
    llama: tuple[PreTrainedModel, Path], adapters: list[AdapterRef]
) -> None:
    driver = Driver(llama[1], max_model_len=len(PROBE) - 1)
    done = driver.call(merge("merge", adapters[0]))
    assert done.error is None
    assert done.report is not None


def test_a_merged_adapter_stays(llama: tuple[PreTrainedModel, Path], adapters: list[AdapterRef]) -> None:
    driver = Driver(llama[1], adapter_cache_bytes=32 * driver_row_bytes(llama[1]), compensates_merged=True)
    assert driver.call(merge("merge", adapters[0])).error is None
    for drain in (False, True):
        error = driver.call(UnloadAdapter("unload", adapters[0].digest, drain)).error
        assert error is not None
        assert (error.code, error.reason) == ("FAILED_PRECONDITION", "ADAPTER_IN_USE")
        assert "unmerge" in error.message
    for adapter in (adapters[2], adapters[1], adapters[2]):  # room for one of them beside it
        driver.generate(prompt(0, 5), 2, adapter)
    on_device = {entry.digest: entry.merged for entry in driver.engine.stats().adapters if entry.tier == "device"}
    assert on_device[adapters[0].digest]
    assert driver.call(UnmergeAdapter("unmerge", adapters[0].digest, NEVER)).error is None
    assert driver.call(UnloadAdapter("unload", adapters[0].digest)).error is None


def test_a_second_adapter_is_not_merged_beside_the_first(
    llama: tuple[PreTrainedModel, Path], adapters: list[AdapterRef]
) -> None:
    driver = Driver(llama[1])
    assert driver.call(merge("first", adapters[0])).error is None
    error = driver.call(merge("second", adapters[1])).error
    assert error is not None
    assert (error.reason, error.metadata) == ("BASE_MERGED", {"merged_adapter_digest": adapters[0].digest})
    again = driver.call(merge("again", adapters[0]))
    assert again.error is None, "it is merged"
    assert driver.call(UnmergeAdapter("not merged", adapters[1].digest, NEVER)).error is None
    assert driver.engine._merged.digest == adapters[0].digest


def test_a_merge_that_cannot_drain_in_time_is_given_up(
    llama: tuple[PreTrainedModel, Path], adapters: list[AdapterRef]
) -> None:
    model, directory = llama
    driver = Driver(directory)
    driver.call(LoadAdapter("load", adapters[0]))
    before = digest(driver)
    driver.submit("runs", prompt(0, 5), 30)
    driver.engine.step()
    driver.engine.handle(merge("merge", adapters[0], drain_seconds=0.0))
    driver.submit("comes", prompt(1, 5), 5)
    error = driver.answer("merge").error
    assert error is not None
    assert (error.code, error.reason) == ("ABORTED", "ADAPTER_MERGE_ABORTED")
    assert error.retry_after is not None
    driver.run("runs", "comes")
    assert driver.inbox.tokens("comes") == oracle_tokens(model, prompt(1, 5), 5, None)
    assert digest(driver) == before
    assert driver.call(UnloadAdapter("unload", adapters[0].digest)).error is None


def test_an_unmerge_that_cannot_drain_in_time_leaves_it_merged(
    llama: tuple[PreTrainedModel, Path], adapters: list[AdapterRef]
) -> None:
    driver = Driver(llama[1])
    assert driver.call(merge("merge", adapters[0])).error is None
    driver.submit("runs", prompt(0, 5), 30, adapters[0])
    driver.engine.step()
    driver.engine.handle(UnmergeAdapter("unmerge", adapters[0].digest, 0.0))
    driver.submit("other", prompt(0, 5), 3)  # would be served if it were unmerged
    error = driver.answer("unmerge").error
    assert error is not None
    assert error.reason == "ADAPTER_MERGE_ABORTED"
    assert driver.inbox.failed["other"].error.reason == "BASE_MERGED"
    driver.run("runs")
    assert driver.engine._merged.digest == adapters[0].digest


def test_unmerging_ends_a_merge_that_still_waits(
    llama: tuple[PreTrainedModel, Path], adapters: list[AdapterRef]
) -> None:
    driver = Driver(llama[1])
    driver.submit("runs", prompt(0, 5), 30)
    driver.engine.step()
    driver.engine.handle(merge("merge", adapters[0]))
    driver.engine.handle(merge("joins", adapters[0]))
    driver.engine.handle(merge("other", adapters[1]))
    assert driver.call(UnmergeAdapter("unmerge", adapters[0].digest, NEVER)).error is None
    reasons = {call_id: driver.inbox.calls[call_id].error for call_id in ("merge", "joins", "other")}
    assert {error.reason for error in reasons.values() if error is not None} == {"ADAPTER_MERGE_ABORTED"}
    driver.run("runs")
    assert driver.engine._merged.digest is None
    assert driver.call(merge("anew", adapters[0])).error is None


def test_a_merge_fails_with_its_adapter(llama: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    driver = Driver(llama[1])
    error = driver.call(merge("merge", AdapterRef("sha256:" + "0" * 64, str(tmp_path / "nowhere")))).error
    assert error is not None
    assert error.reason in ("ADAPTER_INVALID", "STORE_UNAVAILABLE")
    driver.generate(prompt(0, 5), 2)


def test_weights_are_not_written_while_a_loader_computes(
    llama: tuple[PreTrainedModel, Path], adapters: list[AdapterRef]
) -> None:
    """The canary runs the model, on a loader's thread."""
    driver = Driver(llama[1])
    driver.call(LoadAdapter("load", adapters[0]))
    before = digest(driver)
    with driver.engine._merged._pace:
        driver.engine.handle(merge("merge", adapters[0]))
        for _ in range(20):
            driver.engine.step()
        assert digest(driver) == before
    assert driver.answer("merge").error is None
    assert digest(driver) != before
