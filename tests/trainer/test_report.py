"""A run's page says what the run's files say, needs no other file, and shows what anyone named as text."""

import base64
import json
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from trainer.cli import main
from trainer.plots import plot_losses, smoothed
from trainer.run_directory import RunDirectory
from trainer.settings import Settings

STEPS = [
    {"step": step, "loss": 3.0 / step, "seconds": 0.5, "tokens": 100, "memory_bytes": 1 << 30} for step in range(1, 9)
]


class Page(HTMLParser):
    """What a page shows and what it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def run(path: Path, metrics: list[dict[str, Any]], **info: Any) -> RunDirectory:
    settings = Settings(data="rows of <b>me</b>.jsonl", rank=13)
    directory = RunDirectory.create(
        path, settings, {"base": "tiny", "num_steps": 8, "data_digest": "sha256:ab", **info}
    )
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    return directory


def test_a_page_says_everything_and_loads_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = [*STEPS, {"step": 8, "eval_loss": 0.625, "is_best": True}]
    run(tmp_path / "run", metrics, result={"final_loss": 0.375}, seconds=4.0)
    assert main(["report", str(tmp_path / "run")]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path == tmp_path / "run" / "report.html"
    page = Page(path.read_text())
    assert len(page.loads) == 1
    assert (
        base64.b64decode(page.loads[0].removeprefix("data:image/png;base64,"))
        == (path.parent / "loss.png").read_bytes()
    )
    assert imread(path.parent / "loss.png").shape[:2] == (540, 960)
    assert {"finished", "0.3750", "0.6250", "800", "200", "1.00 GiB", "sha256:ab", "13"} <= set(page.texts)
    assert "rows of <b>me</b>.jsonl" in page.texts
    assert page.tags.count("b") == 7  # the numbers on top, and no tag of a file's name
    assert set(asdict(Settings())) <= set(page.texts)


def test_a_run_under_way_has_a_page_too_and_one_without_steps_has_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "going", STEPS[:3])
    assert main(["report", str(tmp_path / "going")]) == 0
    assert "step 3 of 8" in (tmp_path / "going" / "report.html").read_text()
    run(tmp_path / "new", [])
    assert main(["report", str(tmp_path / "new")]) == 2
    assert "has made no step yet" in capsys.readouterr().err
    assert main(["report", str(tmp_path)]) == 2


def test_runs_are_drawn_in_colours_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "two.png").write_bytes(plot_losses({"lora": STEPS, "full": [{**s, "loss": 1.0} for s in STEPS]}))
    pixels = (imread(tmp_path / "two.png")[:, :, :3] * 255).round().astype(int).reshape(-1, 3)
    assert {(42, 111, 151), (224, 122, 95)} <= set(map(tuple, pixels.tolist()))


@given(st.lists(st.floats(-1e3, 1e3), min_size=1))
def test_a_running_mean_stays_within_what_it_has_seen(values: list[float]) -> None:
    means = smoothed(values)
    assert means[0] == pytest.approx(values[0])
    assert all(min(values) - 1e-6 <= mean <= max(values) + 1e-6 for mean in means)
