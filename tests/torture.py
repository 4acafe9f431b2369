"""For `make torture`: a pytest plugin that ends with a table of what was tried, by kind."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table: kind of fault, cases, seconds, result."""
    found = defaultdict(list)
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            file, _, test = report.nodeid.rpartition("/")[2].partition("::")
            name, _, parameters = test.rstrip("]").partition("[")
            kind = parameters.rpartition("-")[2] if name == "test_whatever_happens_before_any_call" else file
            cases = dict(report.user_properties).get("cases", int(outcome != "skipped"))
            found[kind].append((cases, report.duration, outcome))
    terminalreporter.write_line("\n| kind | cases | seconds | result |\n|---|--:|--:|---|")
    for kind, tests in found.items():
        cases, seconds, outcomes = zip(*tests, strict=True)
        bad, skipped = sum(one in ("failed", "error") for one in outcomes), outcomes.count("skipped")
        result = f"{bad} of {len(tests)} tests failed" if bad else "all as promised"
        result += f", {skipped} not possible here" if skipped else ""
        terminalreporter.write_line(f"| {kind} | {sum(cases):,} | {sum(seconds):.0f} | {result} |")
