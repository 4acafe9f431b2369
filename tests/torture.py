"""For `make torture`: a pytest plugin that ends with a table of the fault classes, for docs/faults.md."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pytest

CLASSES = {
    "test_faults_crash.py": "killed at any call",
    "test_faults_calls.py": "calls that fail",
    "test_faults_files.py": "bad files",
    "test_faults_parsers.py": "any bytes",
    "test_faults_time.py": "time",
    "test_faults_kis.py": "KIS",
    "test_faults_concurrency.py": "concurrency",
    "test_secrets.py": "secrets",
    "test_faults_model.py": "model",
}


class _Test(NamedTuple):
    cases: int
    took: float
    outcome: str


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table: class, cases, seconds, result."""
    found = defaultdict(list)
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            file = report.nodeid.partition("::")[0].rpartition("/")[2]
            cases = dict(report.user_properties).get("cases", 1 if outcome != "skipped" else 0)
            found[CLASSES.get(file, file)].append(_Test(cases, report.duration, outcome))
    terminalreporter.write_line("\n| class | cases | seconds | result |\n|---|--:|--:|---|")
    for name, tests in found.items():
        cases, took = sum(one.cases for one in tests), sum(one.took for one in tests)
        terminalreporter.write_line(f"| {name} | {cases:,} | {took:.0f} | {_result(one.outcome for one in tests)} |")


def _result(outcomes: Iterable[str]) -> str:
    counted = list(outcomes)
    bad, skipped = (sum(counted.count(word) for word in words) for words in (("failed", "error"), ("skipped",)))
    told = "all as promised" if not bad else f"{bad} of {len(counted)} tests failed"
    return f"{told}, {skipped} not possible here" if skipped else told
