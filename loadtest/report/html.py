"""A comparison as one page that needs nothing else: plots as SVG, light and dark."""

from collections.abc import Callable, Mapping
from html import escape
from typing import Any

from loadtest.report.markdown import FOUR_BITS, GENERATOR, environment_of, paragraph_of, title_of
from loadtest.report.tables import Report, Table, costs, device_memory, four_bits, generator, memory, speed
from server.metrics.plot import STYLE, Series, bars, line_plot, size_text

COLORS = {"base": 0, "adapters": 1, "merged": 2}

Number = Callable[[Mapping[str, Any]], float | None]


def html_report(report: Report) -> str:
    title = title_of(report)
    left_out = [f"<li>{escape(mode['title'])}: {escape(mode['why'])}</li>" for mode in report["left_out"]]
    changed, narrow = costs(report), four_bits(report)
    commands = "\n".join([report["command"], *(mode["command"] for mode in report["modes"])])
    parts = [
        f"<h1>{escape(title)}</h1><p>{escape(paragraph_of(report)).replace('`', '')}</p>",
        "<h2>Throughput against latency</h2><p class=soft>Each point is a load; up and to the left is slower, ",
        "to the right is more. Dashed: 4 bits.</p>",
        f'<div class="plots">{"".join(plots(report))}</div>',
        f"<h2>Percentiles</h2>{_table(speed(report))}",
        f"<h2>What each way costs</h2><p class=soft>At the same load.</p>{_table(changed)}" if changed.rows else "",
        f"<h2>Is 4-bit slower?</h2><p class=soft>{FOUR_BITS}</p>{_table(narrow)}" if narrow.rows else "",
        "<h2>Memory</h2>",
        f'<div class="wide">{bars(device_memory(report), title="On the device, by kind", form=size_text)}</div>',
        _table(memory(report)),
        f"<h2>The load generator itself</h2><p class=soft>{GENERATOR.replace('`', '')}</p>{_table(generator(report))}"
        if report["echo"]
        else "",
        f"<h2>Left out</h2><ul>{''.join(left_out)}</ul>" if left_out else "",
        f"<h2>To repeat it</h2><pre>{escape(commands)}</pre><p class=soft>{escape(environment_of(report))}</p>",
    ]
    head = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
    head += '<meta name="viewport" content="width=device-width, initial-scale=1">'
    return f"{head}<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"


def plots(report: Report) -> list[str]:
    """Two against throughput, two against the number of users."""
    tokens: Number = lambda load: load["output_tokens_per_second"]  # noqa: E731
    users: Number = lambda load: load["users"]  # noqa: E731
    drawn = [
        ("Time per output token, median", "output tokens/s, all users", "ms", tokens, _time("tpot_seconds", "p50")),
        ("Time to first token, p95", "output tokens/s, all users", "ms", tokens, _time("ttft_seconds", "p95")),
        ("Throughput", "users", "output tokens/s", users, tokens),
        ("Time per output token, p95", "users", "ms", users, _time("tpot_seconds", "p95")),
    ]
    pictures = [
        line_plot(_lines(report, x, y), title=title, x_label=x_label, y_label=y_label, size=(550, 340))
        for title, x_label, y_label, x, y in drawn
    ]
    return [f'<div class="wide">{picture}</div>' for picture in pictures]


def _lines(report: Report, x: Number, y: Number) -> list[Series]:
    lines = []
    for mode in report["modes"]:
        found = [(x(load), y(load), load["users"]) for load in mode["loads"]]
        points = [(across, up, users) for across, up, users in found if across is not None and up is not None]
        hints = [f"{mode['title']}, {users} users: {across:.4g}, {up:.4g}" for across, up, users in points]
        is_dashed = mode["bits"] == 4
        line = [(across, up) for across, up, _ in points]
        lines.append(Series(mode["title"], line, COLORS[mode["use"]], is_dashed, hints))
    return lines


def _time(key: str, share: str) -> Number:
    def milliseconds(load: Mapping[str, Any]) -> float | None:
        value: float | None = load[key].get(share)
        return None if value is None else value * 1000

    return milliseconds


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.head)
    rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in table.rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
