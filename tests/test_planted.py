"""The tests find bugs: each of a list is planted, and the test that is named beside it fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from planted import BUGS
from stepping import FULL

if TYPE_CHECKING:
    from collections.abc import Callable

TESTS = Path(__file__).parent
FAILED = pytest.ExitCode.TESTS_FAILED


@pytest.mark.parametrize("name", [name for name, bug in BUGS.items() if FULL or bug.quick])
def test_a_planted_bug_is_found(name: str, record_property: Callable[[str, object], None]) -> None:
    """The named test fails, by an assertion of its own and not because it cannot be run."""
    options = ["-p", "planted", "--numprocesses=0", "--override-ini=addopts=", "--quiet", "--exitfirst"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(TESTS / BUGS[name].found_by)],
        env={**os.environ, "PLANTED": name, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == FAILED, done.stdout[-2000:] + done.stderr[-2000:]
    assert "1 failed" in done.stdout
    record_property("cases", 1)
