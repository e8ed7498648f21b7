"""Plots as pictures of numbers: ticks, places, words."""

import itertools
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.metrics.plot import Series, bars, line_plot, size_text, ticks

SVG = "{http://www.w3.org/2000/svg}"


@given(st.floats(-1e3, 1e3), st.floats(1e-3, 1e9), st.integers(2, 8))
def test_ticks_are_even_round_and_reach_over_what_is_shown(low: float, span: float, about: int) -> None:
    found = ticks(low, low + span, about)
    assert found[0] == pytest.approx(low)
    assert found[-1] >= low + span - 1e-6 * span
    assert 2 <= len(found) <= about + 2
    steps = [after - before for before, after in itertools.pairwise(found)]
    assert steps == pytest.approx([steps[0]] * len(steps), rel=1e-3)


def test_ticks_of_a_range_from_nought_are_the_usual_ones() -> None:
    assert ticks(0, 9.7, 4) == [0, 5, 10]
    assert ticks(0, 130, 4) == [0, 50, 100, 150]
    assert ticks(0, 0, 4)[0] == 0


def test_a_point_is_where_its_numbers_say() -> None:
    drawn = ET.fromstring(line_plot([Series("a", [(0, 0), (10, 50), (20, 100)])], title="t", x_label="x"))
    [line] = drawn.iter(f"{SVG}polyline")
    places = [tuple(map(float, place.split(","))) for place in line.attrib["points"].split()]
    (x0, y0), (x1, y1), (x2, y2) = places
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.2)
    assert y1 == pytest.approx((y0 + y2) / 2, abs=0.2)
    assert y2 < y0, "more is higher"
    grid = sorted(float(rule.attrib["y1"]) for rule in drawn.iter(f"{SVG}line"))
    assert (grid[0], grid[-1]) == pytest.approx((y2, y0), abs=0.2)  # 0 and 100 are ticks


def test_a_stacked_bar_s_parts_are_as_long_as_their_numbers() -> None:
    rows = [("first", [("a", 30.0), ("b", 10.0)]), ("second", [("b", 20.0)])]
    drawn = ET.fromstring(bars(rows, title="t", form=lambda value: f"{value:g}"))
    parts = [rect for rect in drawn.iter(f"{SVG}rect") if rect.attrib.get("class") == "bar"]
    long = [float(part.attrib["width"]) for part in parts]
    assert long == pytest.approx([3 * long[1], long[1], 2 * long[1]], rel=0.01)
    assert float(parts[1].attrib["x"]) == pytest.approx(float(parts[0].attrib["x"]) + long[0], abs=0.2)
    assert parts[1].attrib["fill"] == parts[2].attrib["fill"] != parts[0].attrib["fill"]
    assert {"40", "20"} <= {text.text for text in drawn.iter(f"{SVG}text")}


def test_what_is_written_is_text() -> None:
    drawn = ET.fromstring(line_plot([Series("<b>", [(0, 1)], hints=["&"])], title="<i>", x_label="a & b"))
    assert drawn.attrib["aria-label"] == "<i>"
    ET.fromstring(bars([("<x>", [("<y>", 1.0)])], title="&", form=str))


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (2048, "2 KiB"), (3 << 20, "3.0 MiB"), (200 << 20, "200 MiB"), (5 << 30, "5.0 GiB")],
)
def test_sizes_as_people_read_them(size: int, text: str) -> None:
    assert size_text(size) == text
