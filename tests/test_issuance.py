"""What is known of a key's requests where the record is lost: its marks, and its lock file's time."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
from builders import KEY, NOW, make_url

from tokencore.cache import Cache
from tokencore.issuance import with_marks
from tokencore.limits import cooldown_until
from tokencore.lock import KeyLock
from tokencore.market import ISSUE_INTERVAL
from tokencore.record import Attempt, Outcome, issued_within

if TYPE_CHECKING:
    from pathlib import Path

LATER = NOW + timedelta(hours=8)


def test_a_mark_in_whole_seconds_ends_no_minute_early(folder: Path) -> None:
    """After a loss of the record the key rests the whole minute of a request that was made late in its second."""
    asked = NOW + timedelta(milliseconds=999)
    cache = Cache(str(folder), make_url(), "real", KEY, ["us_"])
    cache.mark_issued(asked)
    attempts = with_marks([], cache, KeyLock(str(folder), cache.fingerprint))
    until = cooldown_until(attempts, asked + timedelta(seconds=30), ISSUE_INTERVAL)
    assert until is not None
    assert timedelta(seconds=ISSUE_INTERVAL) <= until - asked <= timedelta(seconds=ISSUE_INTERVAL + 1)


@pytest.mark.parametrize(("begun", "issues"), [(False, 2), (True, 1)], ids=["no line", "no outcome"])
def test_a_full_disk_hides_neither_the_minute_nor_an_issue(begun: bool, issues: int, folder: Path) -> None:  # noqa: FBT001 - a case
    """After a killed attempt: one without a line counts as an issue of its own, one without an outcome as that one."""
    cache = Cache(str(folder), make_url(), "real", KEY, ["us_"])
    lock = KeyLock(str(folder), cache.fingerprint)
    with lock.hold(wait=1):
        lock.mark_unrecorded(LATER, begun=begun)
    recorded = [Attempt(NOW - timedelta(hours=1), Outcome.ISSUED), Attempt(NOW, Outcome.SENT)]
    attempts = with_marks(recorded, cache, lock)
    assert len(issued_within(attempts, LATER)) == issues
    until = cooldown_until(attempts, LATER + timedelta(seconds=30), ISSUE_INTERVAL)
    assert until is not None
    assert until >= LATER + timedelta(seconds=ISSUE_INTERVAL)
