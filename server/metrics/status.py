"""The server's status page: what it does and holds, for people, made anew for each look."""

from collections.abc import Callable, Sequence
from html import escape

from adapters.errors import LorikeetError
from adapters.registry import AdapterEntry
from server.engine.messages import ResidentAdapter, Stats
from server.metrics.history import MINUTES, History, Moment, rates
from server.metrics.labels import BASE_LABEL, OTHER_LABEL
from server.metrics.metrics import Metrics, Traffic
from server.metrics.plot import STYLE, Series, bars, line_plot, size_text
from server.version import lorikeet_version

REFRESH_SECONDS = 5
MAX_ROWS = 200

Published = Callable[[], Sequence[AdapterEntry]]

_OWN_STYLE = ".pinned { color: var(--c1); }"
_TEXTS = ("adapter", "labels", "version", "in memory")
_NUMBERS = ("running", "requests", "tokens", "TTFT p50", "TTFT p95", "TPOT p50")


class StatusPage:
    """`published` lists the adapters; it may wait, and raise LorikeetError."""

    def __init__(self, metrics: Metrics, history: History, published: Published) -> None:
        self._metrics = metrics
        self._history = history
        self._published = published

    def render(self) -> str:
        """The page as HTML that needs nothing else."""
        stats, moments = self._metrics.stats, self._history.moments()
        parts = [
            f"<h1>Lorikeet {escape(lorikeet_version())}</h1>{_summary(stats)}",
            f'<div class="plots">{_throughput(moments)}{_queue(moments)}</div>',
            "<h2>Memory</h2>",
            f'<div class="wide">{_memory(stats)}</div>' if stats is not None else "",
            f"<h2>Adapters</h2>{self._adapters(stats)}",
            '<p class="soft">Traffic and latencies are since the start. <a href="/metrics">/metrics</a> has all.</p>',
        ]
        head = '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Lorikeet</title>'
        head += f'<meta http-equiv="refresh" content="{REFRESH_SECONDS}">'
        head += '<meta name="viewport" content="width=device-width, initial-scale=1">'
        return f"{head}<style>{STYLE}{_OWN_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"

    def _adapters(self, stats: Stats | None) -> str:
        traffic = self._metrics.traffic()
        rows = [_row("the base", "", "", "", "", traffic.get(BASE_LABEL))]
        note = ""
        try:
            entries = sorted(self._published(), key=lambda entry: (-self._requests(entry, traffic), entry.name))
        except LorikeetError as error:
            return f"{_table(rows)}<p>The store cannot be read: {escape(error.message)}</p>"
        for entry in entries[:MAX_ROWS]:
            resident = [] if stats is None else [found for found in stats.adapters if found.digest in entry.digests]
            labels = ", ".join(sorted(entry.labels))
            leases = sum(found.leases for found in resident if found.tier == "device")
            label = self._metrics.label_of(entry.name)
            known = None if label == OTHER_LABEL else traffic.get(label)
            version = entry.version.digest.removeprefix("sha256:")[:12]
            rows.append(_row(entry.name, labels, version, _tiers(resident), str(leases or ""), known))
        if OTHER_LABEL in traffic:
            rows.append(_row("all others", "", "", "", "", traffic[OTHER_LABEL]))
        if len(entries) > MAX_ROWS:
            note = f"<p>Of {len(entries)} adapters, the {MAX_ROWS} with most requests.</p>"
        return _table(rows) + note

    def _requests(self, entry: AdapterEntry, traffic: dict[str, Traffic]) -> int:
        label = self._metrics.label_of(entry.name)
        return traffic[label].requests if label != OTHER_LABEL and label in traffic else 0


def _summary(stats: Stats | None) -> str:
    if stats is None:
        return "<p>The engine is not running, or has not yet said anything.</p>"
    kv = stats.pages_used / stats.pages_total if stats.pages_total else 0.0
    on_device = sum(adapter.tier == "device" for adapter in stats.adapters)
    return (
        f"<p><b>{stats.num_running}</b> running, <b>{stats.num_waiting}</b> waiting, KV cache <b>{kv:.0%}</b> full, "
        f"<b>{on_device}</b> adapters on the device.</p>"
    )


def _throughput(moments: list[Moment]) -> str:
    series = [Series("tokens/s", rates(moments))]
    return _over_time("Output tokens a second", series, moments)


def _queue(moments: list[Moment]) -> str:
    now = moments[-1].at
    running = [(moment.at - now, float(moment.running)) for moment in moments]
    waiting = [(moment.at - now, float(moment.waiting)) for moment in moments]
    return _over_time("Requests", [Series("running", running, 0), Series("waiting", waiting, 1)], moments)


def _over_time(title: str, series: list[Series], moments: list[Moment]) -> str:
    """Over the minutes that there are, at most MINUTES, and at least one."""
    minutes = max(1.0, (moments[-1].at - moments[0].at) / 60)
    lines = [Series(line.name, [(x / 60, y) for x, y in line.points], line.color) for line in series]
    return line_plot(
        lines, title=title, x_label="minutes", x_from=-min(minutes, MINUTES), x_to=0.0, marks=False, size=(480, 230)
    )


def _memory(stats: Stats) -> str:
    rows = [("device", [(kind, float(size)) for kind, size in stats.memory.items()])]
    return bars(rows, title="Memory that the engine has set aside, by kind", form=size_text, width=980)


def _tiers(resident: Sequence[ResidentAdapter]) -> str:
    parts = []
    for found in sorted(resident, key=lambda adapter: adapter.tier):
        pinned = ' <span class="pinned">pinned</span>' if found.pinned else ""
        parts.append(f"{escape(found.tier)} {size_text(found.size_bytes)}{pinned}")
    return ", ".join(parts)


def _row(name: str, labels: str, version: str, tiers: str, leases: str, traffic: Traffic | None) -> str:
    """`tiers` is HTML, all else text."""
    texts = (
        f"<td>{escape(name)}</td><td class=text>{escape(labels)}</td><td class=text><code>{escape(version)}</code></td>"
    )
    texts += f"<td class=text>{tiers}</td><td>{leases}</td>"
    if traffic is None:
        return f"<tr>{texts}{'<td></td>' * 5}</tr>"
    times = (*traffic.first_token, traffic.per_token)
    numbers = (f"{traffic.requests:,}", f"{traffic.generated:,}", *(_milliseconds(seconds) for seconds in times))
    return f"<tr>{texts}{''.join(f'<td>{number}</td>' for number in numbers)}</tr>"


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.2f} s"


def _table(rows: list[str]) -> str:
    head = "".join(f"<th class=text>{name}</th>" for name in _TEXTS)
    head += "".join(f"<th>{name}</th>" for name in _NUMBERS)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
