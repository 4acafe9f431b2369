"""The words of messages in the reader's language: texts by key, times and spans as people write them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from flows.texts import en, ko

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime, timedelta

HOUR = 60  # minutes


class Words(NamedTuple):
    """One language."""

    texts: Mapping[str, str]

    def __call__(self, key: str, **facts: object) -> str:
        """The text of that key, with the facts that it names filled in."""
        return self.texts[key].format(**facts)

    def lasted(self, span: timedelta) -> str:
        """A time span in hours and minutes, a minute at least."""
        hours, minutes = divmod(max(1, round(span.total_seconds() / 60)), HOUR)
        key = "span.minutes" if not hours else "span.hours" if minutes else "span.whole"
        return self(key, hours=hours, minutes=minutes)

    def weekday(self, at: datetime) -> str:
        """A weekday and the time, in the zone of `at`."""
        return f"{self('days').split()[at.weekday()]} {at:%H:%M}"


ENGLISH = Words(en.TEXTS)
LANGUAGES = {"en": ENGLISH, "ko": Words(ko.TEXTS)}
