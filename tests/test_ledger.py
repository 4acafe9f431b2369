"""A record that is looked at again and again: the same facts as from reading all of it, at the price of what is new."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import pytest

from tokencore import record
from tokencore.ledger import Ledger
from tokencore.record import LINE, TRIM_AT, Attempt, IssuanceRecord, Outcome

if TYPE_CHECKING:
    from collections.abc import Callable

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)


def attempt(outcome: Outcome, days: float = 0) -> Attempt:
    """One of so many days ago."""
    return Attempt(NOW - timedelta(days=days), outcome)


@pytest.fixture
def kept(tmp_path: Path) -> IssuanceRecord:
    """A record with two months of daily issues."""
    made = IssuanceRecord(str(tmp_path), "0" * 16)
    for day in range(60, 0, -1):
        made.begin(attempt(Outcome.ISSUED, day))
    return made


def _completed(kept: IssuanceRecord) -> None:
    kept.complete(kept.begin(attempt(Outcome.SENT)), attempt(Outcome.ISSUED))


def _edited(kept: IssuanceRecord) -> None:
    content = Path(kept.path).read_bytes()
    Path(kept.path).write_bytes(content.replace(b"issued", b"denied", 7))


def _trimmed(kept: IssuanceRecord) -> None:
    Path(kept.path).write_bytes(Path(kept.path).read_bytes()[:LINE] * (TRIM_AT + 1))
    kept.begin(attempt(Outcome.LIMIT))


def _shortened(kept: IssuanceRecord) -> None:
    Path(kept.path).write_bytes(Path(kept.path).read_bytes()[: 3 * LINE])


CHANGES: dict[str, Callable[[IssuanceRecord], object]] = {
    "nothing": lambda _: None,
    "a request is under way": lambda kept: kept.begin(attempt(Outcome.SENT)),
    "it is completed": _completed,
    "lines are edited": _edited,
    "it is trimmed": _trimmed,
    "it is shortened": _shortened,
    "it is emptied": lambda kept: Path(kept.path).write_bytes(b""),
    "it is removed": lambda kept: Path(kept.path).unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_ledger_says_what_reading_all_of_it_says(kept: IssuanceRecord, change: str) -> None:
    """After every change, of its end or of all of it, totals and recent attempts are those of a new ledger."""
    ledger = Ledger(kept)
    ledger.read(NOW)
    for _ in range(2):  # also from what the change left behind
        CHANGES[change](kept)
        assert ledger.read(NOW) == Ledger(kept).read(NOW)
        assert ledger.totals == kept.read().totals()
        _completed(kept)
        assert ledger.read(NOW)[-1] == attempt(Outcome.ISSUED)
        assert ledger.totals == kept.read().totals()


def test_a_renewal_costs_the_lines_that_it_wrote(kept: IssuanceRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two months of attempts none is parsed again."""
    ledger = Ledger(kept)
    ledger.read(NOW)
    _completed(kept)
    parsed = mock.Mock(wraps=record.parse)
    monkeypatch.setattr(record, "parse", parsed)
    assert len(ledger.read(NOW)) == 2
    pieces = [call.args[0].count(b"\n") for call in parsed.call_args_list]
    assert sum(pieces) == 2  # the one that was the last so far, and the new one
