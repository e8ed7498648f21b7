"""The recording and alert rules: their own unit tests, and that each alert has one."""

import subprocess
from typing import Any

import pytest
import yaml

from tests.support.prometheus import DEPLOY

RULES = sorted((DEPLOY / "prometheus/rules").glob("*.yml"))


def named(kind: str) -> set[str]:
    groups: list[dict[str, Any]] = [group for file in RULES for group in yaml.safe_load(file.read_text())["groups"]]
    return {rule[kind] for group in groups for rule in group["rules"] if kind in rule}


@pytest.mark.prometheus
def test_the_rules_do_what_their_tests_say() -> None:
    for command in (
        ["promtool", "check", "config", "prometheus/prometheus.yml"],
        ["promtool", "test", "rules", "prometheus/tests/rules_test.yml"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, cwd=DEPLOY, check=False, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


def test_each_rule_has_a_test() -> None:
    tests = yaml.safe_load((DEPLOY / "prometheus/tests/rules_test.yml").read_text())["tests"]
    fired = {test["alertname"] for case in tests for test in case.get("alert_rule_test", ()) if test["exp_alerts"]}
    assert fired == named("alert"), "each alert fires in a test"
    asked = " ".join(test["expr"] for case in tests for test in case.get("promql_expr_test", ()))
    untested = {name for name in named("record") if name not in asked}
    assert untested == {"instance:lorikeet_refusals:ratio_rate5m"}, "which the alert on it tests"
