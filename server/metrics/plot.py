"""Small plots as inline SVG, of numbers alone: no script, no file, no font but the reader's.

Colours are CSS variables, so that one picture is for a light and a dark page; `STYLE` defines them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1b1f24; --soft: #59636e; --line: #d1d9e0; --card: #f6f8fa;
  --c0: #2563c9; --c1: #c2570c; --c2: #18794e; --c3: #8a3fc0; --c4: #b3261e; --c5: #59636e; }
@media (prefers-color-scheme: dark) {
  :root { --page: #12161b; --ink: #e6e9ed; --soft: #9aa5b1; --line: #3a424c; --card: #1b2128;
    --c0: #7db1ff; --c1: #f7a35c; --c2: #5fd08f; --c3: #cf9bff; --c4: #ff8a80; --c5: #9aa5b1; } }
body { background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif;
  margin: 0 auto; padding: 1.5rem; max-width: 72rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { color: var(--soft); font-weight: 600; }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; } th.text, td.text { text-align: left; }
.wide { overflow-x: auto; max-width: 100%; } .soft { color: var(--soft); }
code, pre { font: .9em/1.5 ui-monospace, monospace; }
pre { background: var(--card); padding: .75rem; overflow-x: auto; }
svg text { fill: var(--ink); font: 12px system-ui, "DejaVu Sans", sans-serif; } svg .soft { fill: var(--soft); }
svg .title { font-weight: 600; font-size: 13px; } svg .grid { stroke: var(--line); stroke-width: 1; }
"""

NUM_COLORS = 6
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 16, 52, 44
_LETTER = 7.2  # pixels, of a 12 px letter, amply
_ROW = 22

Format = Callable[[float], str]


@dataclass(frozen=True, slots=True)
class Series:
    """A line; `hints` tell of each point when it is pointed at. `color` counts from 0."""

    name: str
    points: Sequence[tuple[float, float]]
    color: int = 0
    dashed: bool = False
    hints: Sequence[str] = ()


def line_plot(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str = "",
    x_from: float = 0.0,
    x_to: float | None = None,
    x_format: Format = lambda value: f"{value:g}",
    marks: bool = True,
    size: tuple[int, int] = (620, 340),
) -> str:
    """Lines over two linear axes, the vertical one from 0. Names are in a legend where there are two or more."""
    width, height = size
    legend = _legend([(line.name, line.color, line.dashed) for line in series], width) if len(series) > 1 else []
    top = _TOP + _ROW * max(0, len({y for _, y in legend}) - 1) - (0 if legend else 18)
    points = [point for line in series for point in line.points]
    x_ticks = ticks(x_from, max((x for x, _ in points), default=1.0) if x_to is None else x_to, 6)
    y_ticks = ticks(0.0, max((y for _, y in points), default=1.0), 4)

    def at(x: float, y: float) -> tuple[float, float]:
        right = _LEFT + (x - x_from) / (x_ticks[-1] - x_from) * (width - _LEFT - _RIGHT)
        return right, height - _BOTTOM - y / y_ticks[-1] * (height - top - _BOTTOM)

    parts = [f'<text class="title" x="8" y="18">{escape(title)}</text>']
    parts += [_legend_entry(entry, place) for entry, place in zip(series, legend, strict=False)]
    for tick in y_ticks:
        x, y = at(x_from, tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{width - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="soft" text-anchor="end" x="{x - 6:.1f}" y="{y + 4:.1f}">{tick:g}</text>')
    for tick in x_ticks:
        x, y = at(tick, 0)
        label = escape(x_format(tick))
        parts.append(f'<text class="soft" text-anchor="middle" x="{x:.1f}" y="{y + 17:.1f}">{label}</text>')
    middle = (_LEFT + width - _RIGHT) / 2
    parts.append(f'<text class="soft" text-anchor="middle" x="{middle:.1f}" y="{height - 8}">{escape(x_label)}</text>')
    if y_label:
        turned = f'transform="translate(14 {(top + height - _BOTTOM) / 2:.1f}) rotate(-90)"'
        parts.append(f'<text class="soft" text-anchor="middle" {turned}>{escape(y_label)}</text>')
    for line in series:
        parts.append(_line(line, [at(x, y) for x, y in line.points], marks))
    return _svg("plot", title, width, height, parts)


def bars(rows: Sequence[tuple[str, Sequence[tuple[str, float]]]], *, title: str, form: Format, width: int = 620) -> str:
    """A horizontal bar for each row, stacked of its named parts, with its sum; names in a legend, told by colour."""
    names = list(dict.fromkeys(name for _, row in rows for name, _ in row))
    places = _legend([(name, i, False) for i, name in enumerate(names)], width)
    top = 30 + _ROW * len({y for _, y in places})
    left = 16 + _LETTER * max((len(label) for label, _ in rows), default=0)
    most = max((sum(value for _, value in row) for _, row in rows), default=0.0) or 1.0
    room = width - left - 14 - _LETTER * len(form(most)) - 8
    parts = [f'<text class="title" x="8" y="18">{escape(title)}</text>']
    for i, (name, (x, y)) in enumerate(zip(names, places, strict=True)):
        parts.append(f'<rect x="{x}" y="{y - 9}" width="10" height="10" fill="var(--c{i % NUM_COLORS})"/>')
        parts.append(f'<text x="{x + 16}" y="{y}">{escape(name)}</text>')
    for i, (label, row) in enumerate(rows):
        y, right = top + i * 26, left
        parts.append(f'<text x="8" y="{y + 14}">{escape(label)}</text>')
        for name, value in row:
            long, color = value / most * room, names.index(name) % NUM_COLORS
            hint = f"<title>{escape(f'{label} {name}: {form(value)}'.strip())}</title>"
            parts.append(
                f'<rect class="bar" x="{right:.1f}" y="{y}" width="{long:.1f}" height="18" fill="var(--c{color})">'
                f"{hint}</rect>"
            )
            right += long
        parts.append(f'<text x="{right + 8:.1f}" y="{y + 14}">{escape(form(sum(value for _, value in row)))}</text>')
    return _svg("bars", title, width, top + 26 * len(rows) + 6, parts)


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers from `low` (itself) to `high` or past it, roughly `about` of them."""
    if high <= low:
        high = low + 1.0
    raw = (high - low) / about
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= raw * 0.999)
    count = math.ceil((high - low) / step - 1e-9)
    return [float(f"{low + i * step:.12g}") for i in range(count + 1)]


def size_text(size: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit != "MiB" or size >= 10 else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def _svg(kind: str, title: str, width: int, height: int, parts: Sequence[str]) -> str:
    head = f'<svg class="{kind}" role="img" aria-label="{escape(title)}" width="{width}" height="{height}"'
    return f'{head} viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'


def _legend(entries: Sequence[tuple[str, int, bool]], width: int) -> list[tuple[int, int]]:
    """Where each name goes: left to right, in as many rows as it takes."""
    places, x, y = [], 8, 40
    for name, _, _ in entries:
        long = int(30 + _LETTER * len(name) + 14)
        if x > 8 and x + long > width:
            x, y = 8, y + _ROW
        places.append((x, y))
        x += long
    return places


def _legend_entry(line: Series, place: tuple[int, int]) -> str:
    x, y = place
    stroke = f'stroke="var(--c{line.color % NUM_COLORS})" stroke-width="2"' + _dash(line)
    name = f'<text x="{x + 28}" y="{y}">{escape(line.name)}</text>'
    return f'<line x1="{x}" x2="{x + 22}" y1="{y - 4}" y2="{y - 4}" {stroke}/>{name}'


def _line(line: Series, places: Sequence[tuple[float, float]], marks: bool) -> str:
    color = f"var(--c{line.color % NUM_COLORS})"
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts = [f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"{_dash(line)}/>']
    for i, (x, y) in enumerate(places if marks else ()):
        hint = line.hints[i] if i < len(line.hints) else line.name
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{color}"><title>{escape(hint)}</title></circle>')
    return "".join(parts)


def _dash(line: Series) -> str:
    return ' stroke-dasharray="6 4"' if line.dashed else ""
