"""What docs/operations.md says exists: alerts, settings, metrics, and whatever it and its neighbours link to."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from loadtest.modes import server_options
from tests.support.prometheus import DEPLOY

ROOT = DEPLOY.parent
PAGE = ROOT / "docs/operations.md"
PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])


def headings(page: Path, level: str = "#+") -> list[str]:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    return re.findall(rf"^{level} (.+)$", text, re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings(page)}


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load((DEPLOY / "prometheus/rules/alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def test_each_alert_has_its_section_and_leads_there() -> None:
    named = [rule["alert"] for rule in alerts()]
    assert headings(PAGE, "###") == named
    for rule in alerts():
        page, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert anchor == rule["alert"].lower()
        assert anchor in anchors(ROOT / page), rule["alert"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_anchors_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def test_settings_are_options_of_serve() -> None:
    table = PAGE.read_text().split("## Settings")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    options = {option for row in rows for option in re.findall(r"--[a-z0-9-]+", row)}
    assert len(options) > 10
    assert options <= server_options()


def test_metrics_are_those_of_the_server() -> None:
    source = "".join(file.read_text() for file in (ROOT / "server/metrics").glob("*.py"))
    named = set(re.findall(r"`lorikeet_([a-z_]+?)(?:_total)?`", PAGE.read_text()))
    assert len(named) > 4
    assert {name for name in named if f'"{name}"' not in source} == set()
