"""An issuance record that is looked at again and again: a year of attempts is parsed once, then what is new."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from tokencore import record, store
from tokencore.record import GRANTED, History

if TYPE_CHECKING:
    from datetime import datetime

    from tokencore.record import Attempt, IssuanceRecord, Outcome
    from tokencore.store import Signature


class Ledger:
    """An issuance record, read when its file differs.

    All lines but the last one are settled: while they stay as they were, they are not parsed again.

    Attributes:
        totals: of all attempts, by what became of them; None where the record cannot be read.

    """

    def __init__(self, kept: IssuanceRecord) -> None:
        """Watch `kept`; nothing is opened yet."""
        self._record = kept
        self._seen: Signature | None = None
        self._attempts: list[Attempt] = []
        self.totals: Counter[Outcome] | None = None
        self._forget()

    def read(self, now: datetime) -> list[Attempt]:
        """The attempts that can still matter at `now` (aware), oldest first; none where they cannot be read."""
        seen = store.signature(self._record.path)
        if seen is None or seen != self._seen:
            self._seen, self._attempts, self.totals = None, [], None
            try:
                content = self._record.content()
            except ValueError:
                return []
            self._settle(content, now)
            last = record.parse(content[self._length :])
            self._attempts = _recent(self._settled.attempts + last.attempts, now)
            self._seen, self.totals = seen, self._settled.cut + last.totals()
        return self._attempts

    def _forget(self) -> None:
        self._length, self._hash = 0, hash(b"")
        self._settled = History([], Counter())  # of its attempts the recent ones; all of them are counted in `cut`

    def _settle(self, content: bytes, now: datetime) -> None:
        """Take what stands before the last line."""
        start = content.rfind(b"\n", 0, max(0, len(content) - 1)) + 1
        if start < self._length or hash(content[: self._length]) != self._hash:
            self._forget()
        attempts, cut = record.parse(content[self._length : start])
        counted = self._settled.cut + cut + Counter(attempt.outcome for attempt in attempts)
        self._settled = History(_recent(self._settled.attempts + attempts, now), counted)
        self._length, self._hash = start, hash(content[:start])


def _recent(attempts: list[Attempt], now: datetime) -> list[Attempt]:
    """What the limits can ask for: all of the last two days, and what came since a request was last granted."""
    last = next((n for n in range(len(attempts) - 1, -1, -1) if attempts[n].outcome in GRANTED), 0)
    return [attempt for attempt in attempts[:last] if attempt.at > now - 2 * record.DAY] + attempts[last:]
