"""Many clients on many adapters while those are relabelled, unloaded and imported again: every answer is exact, and
nothing is left behind. `make churn` is the same for longer."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.churn.run import Size, run_churn


def test_churn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORIKEET_CACHE", str(tmp_path / "cache"))
    outcome = run_churn(tmp_path, Size(cpu_seconds=4, num_answers=300, max_seconds=150))
    assert outcome.faults == []
    records, calls, metrics = outcome.journal.records, outcome.journal.calls, outcome.metrics
    assert len(records) > 200
    assert outcome.num_swaps > 48
    assert calls["unload"] > 20
    assert metrics["lorikeet_adapter_evictions_total"] > 48

    # The judge would have seen it: under other digests than theirs, (nearly) all answers are wrong.
    digests = [record.digest for record in records[:40]]
    strangers = [replace(r, digest=next(d for d in digests if d != r.digest)) for r in records[:40]]
    verdict = outcome.judge.judge([record for record in strangers if len(record.token_ids) > 8])
    assert len(verdict.mismatches) > 0.8 * verdict.num_distinct > 0
