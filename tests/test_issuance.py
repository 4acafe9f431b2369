"""What is known of a key's requests where the record is lost: its marks, and its lock file's time."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from builders import KEY, NOW, make_url

from tokencore.cache import Cache
from tokencore.issuance import with_marks
from tokencore.limits import cooldown_until
from tokencore.lock import KeyLock
from tokencore.market import ISSUE_INTERVAL

if TYPE_CHECKING:
    from pathlib import Path


def test_a_mark_in_whole_seconds_ends_no_minute_early(folder: Path) -> None:
    """After a loss of the record the key rests the whole minute of a request that was made late in its second."""
    asked = NOW + timedelta(milliseconds=999)
    cache = Cache(str(folder), make_url(), "real", KEY, ["us_"])
    cache.mark_issued(asked)
    attempts = with_marks([], cache, KeyLock(str(folder), cache.fingerprint))
    until = cooldown_until(attempts, asked + timedelta(seconds=30), ISSUE_INTERVAL)
    assert until is not None
    assert timedelta(seconds=ISSUE_INTERVAL) <= until - asked <= timedelta(seconds=ISSUE_INTERVAL + 1)
