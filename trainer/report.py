"""A run on one page: what it was made from, how it went, what came of it. One HTML file that needs no other.

No torch here: a report can be made of a run that is still going on, or that failed.
"""

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainer.checkpoints import writing
from trainer.errors import RunError
from trainer.plots import plot_losses
from trainer.run_directory import RunDirectory

PLOT_FILE = "loss.png"
REPORT_FILE = "report.html"
GIB = 1 << 30
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
img { max-width: 100%; }
table { border-collapse: collapse; } th, td { text-align: left; padding: .15rem 1.5rem .15rem 0; vertical-align: top; }
th { font-weight: 500; color: #666; } td { overflow-wrap: anywhere; }
.tiles { display: flex; flex-wrap: wrap; gap: 1rem; } .tiles div { background: #f3f3f0; padding: .6rem 1rem; }
.tiles b { display: block; font-size: 1.3rem; font-weight: 600; }
"""


def write_report(run: RunDirectory) -> Path:
    """Write the loss plot and the page into the run's directory, and return the page's path. Raises RunError."""
    metrics = list(run.metrics())
    if not any("loss" in line for line in metrics):
        raise RunError(f"{run.path}: has made no step yet, so there is nothing to show")
    png = plot_losses({"": metrics})
    page = run.path / REPORT_FILE
    with writing(page):
        (run.path / PLOT_FILE).write_bytes(png)
        page.write_text(render(run, metrics, png), encoding="utf-8")
    return page


def render(run: RunDirectory, metrics: Sequence[Mapping[str, Any]], png: bytes) -> str:
    """The page."""
    info, settings = run.info(), run.settings()
    title = f"{settings.name or run.path.name}: {settings.method} on {info['base']}"
    picture = base64.b64encode(png).decode("ascii")
    made_from = {name: value for name, value in info.items() if name not in ("counts", "result", "versions", "seconds")}
    sections = [
        ("Data", info.get("counts") or {"read": "streaming"}),
        ("Made from", made_from),
        ("Settings", asdict(settings)),
        ("Versions", info.get("versions", {})),
    ]
    tables = "".join(f"<h2>{html.escape(name)}</h2>\n{_table(values)}" for name, values in sections)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f"<style>{STYLE}</style></head><body>\n<h1>{html.escape(title)}</h1>\n"
        f'<div class="tiles">{_tiles(info, metrics)}</div>\n'
        f'<p><img alt="loss by step" src="data:image/png;base64,{picture}"></p>\n{tables}</body></html>\n'
    )


def _tiles(info: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> str:
    steps = [line for line in metrics if "loss" in line]
    evaluations = [line["eval_loss"] for line in metrics if "eval_loss" in line]
    seconds = sum(line["seconds"] for line in steps)
    tokens = sum(line["tokens"] for line in steps)
    is_done = "result" in info
    numbers = {
        "state": "finished" if is_done else f"step {steps[-1]['step']} of {info['num_steps']}",
        "loss, last epoch": f"{info['result']['final_loss'] if is_done else steps[-1]['loss']:.4f}",
        "evaluation, best": f"{min(evaluations):.4f}" if evaluations else "none",
        "training time": f"{seconds:.0f} s",
        "tokens": f"{tokens:,}",
        "tokens/s": f"{tokens / seconds:,.0f}" if seconds else "",
        "peak memory": f"{max(line['memory_bytes'] for line in steps) / GIB:.2f} GiB",
    }
    return "".join(f"<div>{html.escape(name)}<b>{html.escape(value)}</b></div>" for name, value in numbers.items())


def _table(values: Mapping[str, Any]) -> str:
    rows = (
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(_text(value))}</td></tr>" for name, value in values.items()
    )
    return f"<table>{''.join(rows)}</table>\n"


def _text(value: Any) -> str:
    match value:
        case None:
            return "–"
        case list() | tuple():
            return ", ".join(map(str, value)) or "–"
        case dict():
            return ", ".join(f"{key} = {entry}" for key, entry in value.items()) or "–"
        case _:
            return str(value)
