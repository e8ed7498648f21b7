"""Pictures of runs and comparisons, as PNG. No torch, and none of matplotlib's global state."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from trainer.compare import Comparison

SIZE = (8.0, 4.5)  # inches
DPI = 120
GIB = 1 << 30
SMOOTHING = 0.04  # of a run: after so much of it the drawn mean has forgotten all but 1/e
COLOURS = ("#2a6f97", "#e07a5f", "#588157", "#8d6a9f", "#b08900", "#4f5d75")


def plot_losses(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes:
    """The loss by step of one or several runs' metrics: every step faint, their running mean strong, evaluations as
    points."""
    figure, axes = _figure()
    for colour, (name, lines) in zip(_colours(len(runs)), runs.items(), strict=True):
        steps = [line for line in lines if "loss" in line]
        evaluations = [line for line in lines if "eval_loss" in line]
        places, losses = [line["step"] for line in steps], [line["loss"] for line in steps]
        axes.plot(places, losses, color=colour, alpha=0.25, linewidth=1)
        axes.plot(places, smoothed(losses), color=colour, linewidth=2, label=name)
        if evaluations:
            label = f"{name}, evaluation" if name else "evaluation"
            places, losses = [line["step"] for line in evaluations], [line["eval_loss"] for line in evaluations]
            axes.plot(places, losses, "o--", color=colour, linewidth=1, markersize=5, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token)")
    axes.set_ylim(bottom=0)
    if len(runs) > 1 or any("eval_loss" in line for lines in runs.values() for line in lines):
        axes.legend(frameon=False)
    return _png(figure)


def plot_comparison(comparison: "Comparison") -> bytes:
    """Exact match, peak memory and speed by method: bars for the means, points for the seeds."""
    figure, _ = _figure(columns=3)
    panels = figure.axes
    _bars(panels[0], comparison, "exact match (%)", lambda trial: 100 * trial.score.exact_match)
    panels[0].axhline(100 * comparison.base.exact_match, color="black", linestyle=":", linewidth=1)
    panels[0].annotate(
        "base", (0, 100 * comparison.base.exact_match), xytext=(2, 2), textcoords="offset points", fontsize=8
    )
    panels[0].set_ylim(0, 100)
    _bars(panels[1], comparison, "peak memory (GiB)", lambda trial: trial.peak_bytes / GIB)
    _bars(panels[2], comparison, "tokens/s", lambda trial: trial.tokens_per_second)
    return _png(figure)


def smoothed(values: Sequence[float]) -> list[float]:
    """An exponential running mean that owes nothing to a start at zero."""
    keep = math.exp(-1 / max(1.0, SMOOTHING * len(values)))
    mean = weight = 0.0
    result: list[float] = []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        result.append(mean / weight)
    return result


def _bars(axes: "Axes", comparison: "Comparison", title: str, value: "Any") -> None:
    methods = comparison.methods
    for place, (method, colour) in enumerate(zip(methods, _colours(len(methods)), strict=True)):
        values: list[float] = [value(trial) for trial in comparison.of(method)]
        axes.bar(place, comparison.mean(method, value), color=colour, alpha=0.7, width=0.6)
        axes.plot([place] * len(values), values, ".", color="black", markersize=5)
    axes.set_xticks(range(len(methods)), methods)
    axes.set_title(title, fontsize=10)


def _colours(count: int) -> list[str]:
    return [COLOURS[number % len(COLOURS)] for number in range(count)]


def _figure(columns: int = 1) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    panels = figure.subplots(1, columns, squeeze=False)[0]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
    return figure, panels[0]


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
