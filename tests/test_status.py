"""The status page: what it says of a server, its adapters and its last minutes."""

import re
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import pytest

from adapters.errors import StoreUnavailable
from adapters.manifest import Manifest
from adapters.registry import AdapterEntry
from adapters.versions import Version
from server.engine.messages import Ready, ResidentAdapter, Stats
from server.metrics import Metrics, MetricsPage
from server.metrics.history import History, Moment, rates
from server.metrics.status import MAX_ROWS, StatusPage

READY = Ready("cpu", "bfloat16", 1024, 8, 256, 16, 64)


def entry(name: str, *digests: str, **labels: str) -> AdapterEntry:
    manifest: Manifest = None  # type: ignore[assignment]  # the page does not look at it
    version = Version(name, digests[0], Path(), (), manifest)
    return AdapterEntry(name, version, {"latest": digests[0], **labels}, digests, True)


def stats() -> Stats:
    adapters = [
        ResidentAdapter("sha256:new", "device", 3 << 20, 2, True),
        ResidentAdapter("sha256:old", "host", 5 << 20, 0),
    ]
    return Stats(3, 1, 16, 64, adapters, {"weights": 200 << 20, "kv": 100 << 20})


def cells(page: str, name: str) -> list[str]:
    """The texts of an adapter's row."""
    [row] = [row for row in re.findall("<tr>(.*?)</tr>", page) if f"<td>{name}</td>" in row]
    return [re.sub("<[^>]*>", "", cell) for cell in re.findall("<td.*?>(.*?)</td>", row)]


def rendered(metrics: Metrics, *entries: AdapterEntry) -> str:
    return StatusPage(metrics, History(metrics.moment), lambda: entries).render()


def test_an_adapter_s_row_tells_where_it_is_and_what_it_did() -> None:
    metrics = Metrics()
    metrics.engine_started(READY)
    metrics.engine_stats(stats(), {})
    for seconds in (0.015, 0.015, 0.015):
        metrics.first_token(adapter="pirate", residency="device", seconds=seconds)
    metrics.output_tokens(adapter="pirate", count=9, seconds=0.009 * 2)
    metrics.generation_tokens(adapter="pirate", count=1200)
    page = rendered(metrics, entry("json", "sha256:x"), entry("pirate", "sha256:new", "sha256:old", prod="sha256:old"))
    found = cells(page, "pirate")
    assert found[:5] == ["pirate", "latest, prod", "new", "device 3.0 MiB pinned, host 5.0 MiB", "2"]
    assert found[5:7] == ["3", "1,200"]
    assert found[7:] == ["15 ms", "19.5 ms", "1.75 ms"]  # within their buckets, as PromQL has it
    assert cells(page, "json") == ["json", "latest", "x", "", "", "", "", "", "", ""]
    assert page.index("<td>pirate<") < page.index("<td>json<"), "those with traffic first"
    assert "<b>3</b> running, <b>1</b> waiting, KV cache <b>25%</b> full" in page
    assert "weights: 200 MiB" in page


def test_without_an_engine_or_a_store_it_says_so() -> None:
    def away() -> Sequence[AdapterEntry]:
        raise StoreUnavailable("the <bucket> is away")

    metrics = Metrics()
    page = StatusPage(metrics, History(metrics.moment), away).render()
    assert "The engine is not running" in page
    assert "The store cannot be read: the &lt;bucket&gt; is away" in page


def test_names_past_the_cap_of_labels_are_not_given_each_other_s_traffic() -> None:
    metrics = Metrics(max_adapters=1)
    for adapter in ("a", "b", "c"):
        metrics.first_token(adapter=adapter, residency="device", seconds=0.1)
    page = rendered(metrics, entry("a", "sha256:1"), entry("b", "sha256:2"), entry("c", "sha256:3"))
    assert cells(page, "a")[5] == "1"
    assert cells(page, "b")[5] == ""
    assert cells(page, "all others")[5] == "2"


def test_an_adapter_that_is_named_as_the_base_s_label_is_not_counted_as_the_base() -> None:
    metrics = Metrics()
    metrics.first_token(adapter="", residency="device", seconds=0.1)
    for _ in range(2):
        metrics.first_token(adapter="base", residency="device", seconds=0.1)
    page = rendered(metrics, entry("base", "sha256:1"))
    assert [cells(page, name)[5] for name in ("the base", "base", "all others")] == ["1", "", "2"]


def test_of_many_adapters_it_shows_some_and_says_so() -> None:
    page = rendered(Metrics(), *(entry(f"a{i}", f"sha256:{i}") for i in range(MAX_ROWS + 5)))
    assert page.count("<tr>") == 1 + 1 + MAX_ROWS  # the head, the base
    assert f"Of {MAX_ROWS + 5} adapters, the {MAX_ROWS} with most requests." in page


def test_rates_are_of_the_tokens_between_two_moments() -> None:
    moments = [Moment(100.0, 0, 0, 0), Moment(102.0, 1, 0, 50), Moment(104.0, 1, 0, 50), Moment(104.1, 1, 0, 60)]
    assert rates(moments) == [(pytest.approx(-2.1), 25.0), (pytest.approx(-0.1), 0.0)], "too short a time says nothing"


def test_the_last_minutes_are_drawn() -> None:
    clock = iter(float(2 * i) for i in range(1000))
    metrics = Metrics(clock=lambda: next(clock))
    history = History(metrics.moment)
    for tokens in (0, 100, 100, 300):
        metrics.generation_tokens(adapter="", count=tokens)
        history.take()
    assert [rate for _, rate in rates(history.moments())] == [0, 50, 50, 150, 0]
    for _ in range(500):
        history.take()
    kept = history.moments()
    assert kept[-1].at - kept[0].at == pytest.approx(600, abs=2), "ten minutes, no more"
    assert StatusPage(metrics, history, lambda: ()).render().count("<polyline") == 3


def test_the_page_is_at_the_root_and_loads_nothing() -> None:
    served = MetricsPage(Metrics(), "127.0.0.1", 0, lambda: (entry("pirate", "sha256:new"),))
    with urllib.request.urlopen(f"http://127.0.0.1:{served.port}/") as answer:
        page = answer.read().decode()
        assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")
        assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert "<td>pirate</td>" in page
    for outside in ("http:", "https:", "src=", "<script", "url("):
        assert outside not in page.replace("http://www.w3.org/2000/svg", "")
    with pytest.raises(urllib.error.HTTPError, match="405"):
        urllib.request.urlopen(f"http://127.0.0.1:{served.port}/", data=b"post")
    served.close()
