"""The alert rules and the dashboard in docs/ ask for metrics that exist, and the alerts fire when they should."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tokencore.metrics import TokenCollector
from tokencore.record import Outcome
from tokencore.vitals import Watch

DOCS = Path(__file__).resolve().parent.parent / "docs"
RULES = DOCS / "alerts.rules.yml"
ALERTS: list[dict[str, Any]] = [
    rule for group in yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"] for rule in group["rules"]
]
DASHBOARD: dict[str, Any] = json.loads((DOCS / "grafana.json").read_text(encoding="utf-8"))
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
EXPRESSIONS = [*(alert["expr"] for alert in ALERTS), *QUERIES]

PROMETHEUS_OWN = {"up"}
LABELS = {"market", "outcome", "key", "environment", "job", "instance"}
WORDS = {"and", "or", "unless", "by", "without", "on", "ignoring", "group_left", "group_right", "bool", "offset"}
TOKEN = re.compile(
    r"""(?P<text>"[^"]*"|'[^']*') | (?P<span>\[[^]]*\]) | (?P<number>\d[\w.]*)
      | (?P<name>[a-zA-Z_:][\w:]*) | (?P<sign>[=!]~|[=!<>]=|[-+*/%^<>=(){},]) | (?P<space>\s+)""",
    re.VERBOSE,
)


def named(expression: str) -> tuple[set[str], set[tuple[str, str]]]:
    """The metrics of a PromQL expression, and its label matchers; functions, groupings and texts are neither."""
    tokens, at = [], 0
    while at < len(expression):
        found = TOKEN.match(expression, at)
        assert found, f"no PromQL at {expression[at:]!r}"
        tokens += [found] if found.lastgroup != "space" else []
        at = found.end()
    metrics, matchers, braces, grouping = set(), set(), 0, 0
    for n, token in enumerate(tokens):
        text, after = token[0], tokens[n + 1][0] if n + 1 < len(tokens) else ""
        braces += {"{": 1, "}": -1}.get(text, 0)
        if text in ("by", "without", "on", "ignoring", "group_left", "group_right") and after == "(":
            grouping = 1
        elif text == ")":
            grouping = 0
        if token.lastgroup != "name" or text in WORDS:
            continue
        if braces or grouping:
            matchers.add((text, tokens[n + 2][0].strip("\"'") if braces else ""))
        elif after != "(" and after not in ("by", "without"):
            metrics.add(text)
    return metrics, matchers


@pytest.fixture
def known(gateway: object) -> set[str]:  # noqa: ARG001 - for its settings
    """The names of all samples that the collector can give."""
    return {
        f"{family.name}_total" if family.type == "counter" else family.name
        for family in TokenCollector(Watch()).collect()
    }


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_every_metric_and_label_that_is_asked_for_exists(expression: str, known: set[str]) -> None:
    """Each name in an expression is a metric of ours or Prometheus' own, each label one that they have."""
    metrics, matchers = named(expression)
    assert metrics
    assert metrics <= known | PROMETHEUS_OWN
    assert {label for label, _ in matchers} <= LABELS
    outcomes = {value for label, text in matchers if label == "outcome" for value in text.split("|")} - {""}
    assert outcomes <= set(Outcome)


def test_the_reader_of_expressions_tells_metrics_from_the_rest() -> None:
    """Functions, groupings, labels, texts and durations are no metrics: else the test above proves nothing."""
    text = (
        'max by (key, outcome) (increase(a_total{market=~"b|c", key="d"}[1h])) > 0 and on(market) e - time() < 5 * 60'
    )
    assert named(text) == (
        {"a_total", "e"},
        {("key", ""), ("outcome", ""), ("market", ""), ("market", "b|c"), ("key", "d")},
    )


def test_every_metric_is_shown_or_watched(known: set[str]) -> None:
    """Nothing is exported that neither the dashboard nor an alert looks at."""
    assert known - {name for expression in EXPRESSIONS for name in named(expression)[0]} == set()


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: str(alert["alert"]))
def test_every_alert_says_how_bad_it_is_and_what_to_do(alert: dict[str, Any]) -> None:
    """A severity, one line of what happened and one of what to do; its cure stands in docs/monitoring.md too."""
    assert alert["labels"]["severity"] in ("critical", "warning")
    assert alert["annotations"].keys() == {"summary", "description"}
    assert f"`{alert['alert']}`" in (DOCS / "monitoring.md").read_text(encoding="utf-8")


def test_the_dashboard_hangs_together() -> None:
    """Panels have their own ids and places in the grid, and ask the data source that is chosen above."""
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (column, row)
        for panel in panels
        for column in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for row in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(column for column, _ in cells) < 24
    assert {variable["name"] for variable in DASHBOARD["templating"]["list"]} == {"datasource", "market"}
    assert all(panel["datasource"]["uid"] == "${datasource}" for panel in panels)


def case(alert: str, series: dict[str, str], *, fires: bool, at: str = "20m") -> dict[str, Any]:
    """A test for promtool: with these series, from 0 s on each minute, the alert fires at that time, or does not."""
    return {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {"expr": f'count(ALERTS{{alertname="{alert}",alertstate="firing"}}) or vector(0)', "eval_time": at,
             "exp_samples": [{"labels": "{}", "value": 1 if fires else 0}]}
        ],
    }  # fmt: skip


def of(name: str, values: str, labels: str = 'market="us"') -> dict[str, str]:
    """One series."""
    return {f"kis_{name}{{{labels}}}": values}


SESSION = of("token_need_start_timestamp_seconds", "600x60") | of("token_need_end_timestamp_seconds", "6000x60")
LATER = of("token_need_start_timestamp_seconds", "60000x60") | of("token_need_end_timestamp_seconds", "66000x60")
BAD = 'market="us",outcome="bad_key"'
CASES = [
    case("KISTokenMissingInSession", SESSION | of("token_valid", "0x60"), fires=True),
    case("KISTokenMissingInSession", SESSION | of("token_valid", "1x60"), fires=False),
    case("KISTokenMissingInSession", LATER | of("token_valid", "0x60"), fires=False),
    case("KISTokenDoesNotCoverNextNeed", SESSION | of("token_covers_next_need", "0x60"), fires=True, at="5m"),
    case("KISTokenDoesNotCoverNextNeed", LATER | of("token_covers_next_need", "0x60"), fires=False),
    case("KISTokenDoesNotCoverNextNeed", SESSION | of("token_covers_next_need", "1x60"), fires=False),
    case(
        "KISTokenIssuesAboveCeiling",
        of("issuance_last_day_issues", "3x60") | of("issuance_last_day_ceiling", "2x60"), fires=True,
    ),
    case(
        "KISTokenIssuesAboveCeiling",
        of("issuance_last_day_issues", "2x60") | of("issuance_last_day_ceiling", "2x60"), fires=False,
    ),
    case("KISCredentialsRefused", of("issuance_attempts_total", "0x10 1x50", BAD), fires=True),
    case("KISCredentialsRefused", of("issuance_attempts_total", "1x60", BAD), fires=False),
    case("KISStateUnreadable", of("issuance_record_readable", "0x60"), fires=True),
    case("KISStateUnreadable", of("market_readable", "1x60"), fires=False),
    case("KISExporterDown", {'up{job="tokencore"}': "0x60"}, fires=True),
    case("KISExporterDown", {'up{job="tokencore"}': "1x60"}, fires=False),
    case("KISMetricsStale", {"kis_metrics_collection_timestamp_seconds": "0x60"}, fires=True),
    case("KISMetricsStale", {"kis_metrics_collection_timestamp_seconds": "0+60x60"}, fires=False),
    case("KISMetricsAbsent", {"up": "1x60"}, fires=True),
    case("KISMetricsAbsent", of("token_valid", "0x60"), fires=False),
]  # fmt: skip


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool comes with the package prometheus")
def test_alerts_fire_when_they_should(tmp_path: Path) -> None:
    """Prometheus' own tool takes the rules, and each fires on its case and not on the case beside it."""
    tests = tmp_path / "tests.yml"
    tests.write_text(json.dumps({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": CASES}))
    for command in (("check", "rules", str(RULES)), ("test", "rules", str(tests))):
        ran = subprocess.run(
            [shutil.which("promtool") or "", *command], capture_output=True, text=True, check=False, timeout=60
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr


def test_every_alert_has_a_case_for_and_one_against() -> None:
    """No alert is left out of what promtool is asked."""
    asked = [
        (str(one["promql_expr_test"][0]["expr"]).split('"')[1], one["promql_expr_test"][0]["exp_samples"][0]["value"])
        for one in CASES
    ]
    assert (
        {alert["alert"] for alert in ALERTS}
        == {name for name, fires in asked if fires}
        == {name for name, fires in asked if not fires}
    )
