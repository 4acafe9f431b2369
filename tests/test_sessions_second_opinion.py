"""Our sessions beside those of `exchange_calendars`, from 2016 to the day this was written.

The range is fixed: an answer about the past must not change with the day of the test's run.
"""

from __future__ import annotations

from datetime import date, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import exchange_calendars
import pytest

from tokencore.sessions import EXCHANGES, session

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # pandas, about itself

FIRST, LAST = date(2016, 1, 4), date(2026, 11, 20)

# Vietnam and Nextrade are missing there; Nasdaq, NYSE American and Shenzhen go by a neighbour's.
THEIR_NAMES = {
    "KRX": "XKRX",
    "NASD": "XNYS",
    "NYSE": "XNYS",
    "AMEX": "XNYS",
    "SEHK": "XHKG",
    "SHAA": "XSHG",
    "SZAA": "XSHG",
    "TKSE": "XTKS",
}

CSAT = "they have no CSAT days after 2020; KRX traded from 10:00 to 16:30"

# exchange, day, our hours, theirs, why
DIFFERENCES = [
    ("KRX", "2021-11-18", "10:00-16:30", "09:00-15:30", CSAT),
    ("KRX", "2022-11-17", "10:00-16:30", "09:00-15:30", CSAT),
    ("KRX", "2023-11-16", "10:00-16:30", "09:00-15:30", CSAT),
    ("KRX", "2024-11-14", "10:00-16:30", "09:00-15:30", CSAT),
    ("KRX", "2025-11-13", "10:00-16:30", "09:00-15:30", CSAT),
    ("KRX", "2026-11-19", "10:00-16:30", "09:00-15:30", CSAT),
    ("KRX", "2026-06-03", "closed", "09:00-15:30", "local elections, which they miss"),
    ("KRX", "2026-07-17", "closed", "09:00-15:30", "Constitution Day, a holiday again since 2026"),
    ("SEHK", "2023-09-01", "closed", "09:30-16:00", "no trading at all under typhoon Saola"),
    ("SEHK", "2023-09-08", "closed", "09:30-16:00", "no trading at all under the black rainstorm"),
    ("TKSE", "2020-10-01", "09:00-15:00", "closed", "a session that opened to a broken system"),
]


@pytest.fixture(scope="module")
def theirs() -> dict[str, Any]:
    """Their calendar of each exchange that they know, loaded once."""
    loaded = {name: exchange_calendars.get_calendar(name, start=FIRST, end=LAST) for name in set(THEIR_NAMES.values())}
    return {code: loaded[name] for code, name in THEIR_NAMES.items()}


def their_hours(code: str, calendar: Any) -> dict[date, str]:  # noqa: ANN401 - it ships no types
    """Open and close of all their sessions in the exchange's zone."""
    zone = ZoneInfo(EXCHANGES[code].zone)
    opens, closes = (edges.dt.tz_convert(zone).dt.strftime("%H:%M") for edges in (calendar.opens, calendar.closes))
    return {day.date(): f"{opens[day]}-{closes[day]}" for day in calendar.sessions}


def our_hours(code: str) -> dict[date, str]:
    """Open and close of all our sessions in the exchange's zone."""
    zone = ZoneInfo(EXCHANGES[code].zone)
    days = (FIRST + timedelta(days=n) for n in range((LAST - FIRST).days + 1))
    return {
        day: "-".join(f"{edge.astimezone(zone):%H:%M}" for edge in found)
        for day in days
        if (found := session(code, day))
    }


@pytest.mark.parametrize("code", THEIR_NAMES)
def test_every_difference_is_listed_with_its_reason(code: str, theirs: dict[str, Any]) -> None:
    """Sessions, opens and closes are theirs, except on the listed days and in the listed way."""
    ours, others = our_hours(code), their_hours(code, theirs[code])
    found = {
        (str(day), ours.get(day, "closed"), others.get(day, "closed"))
        for day in ours.keys() | others.keys()
        if ours.get(day) != others.get(day)
    }
    assert len(others) > 2600
    assert found == {row[1:4] for row in DIFFERENCES if row[0] == code}


@pytest.mark.parametrize("code", THEIR_NAMES)
def test_lunch_breaks_are_the_same(code: str, theirs: dict[str, Any]) -> None:
    """The breaks in our table are those that they know of the last session."""
    zone, calendar = ZoneInfo(EXCHANGES[code].zone), theirs[code]
    edges = calendar.session_break_start(str(LAST)), calendar.session_break_end(str(LAST))
    known = [edge.tz_convert(zone).time() for edge in edges if str(edge) != "NaT"]
    assert [edge for pause in EXCHANGES[code].breaks for edge in pause] == known
