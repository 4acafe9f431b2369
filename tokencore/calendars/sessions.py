"""When exchanges trade, and when a token must therefore be valid.

Hours come from the table of exchanges, closures and half days from the `holidays` package, and the user's overrides
beat both. A weekday that nobody knows to be closed is open: a needless check is harmless, a missed session is not.
Days are dates in the exchange's zone; datetimes that come out are aware UTC, and those that go in must be aware.
"""

from __future__ import annotations

from datetime import MINYEAR, UTC, date, datetime, time, timedelta
from functools import cache, lru_cache
from typing import TYPE_CHECKING, NamedTuple
from zoneinfo import ZoneInfo

from tokencore.calendars.exchanges import CSAT_DAYS, EXCHANGES, LEAD, Exchange, Extended, exchange

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["EXCHANGES", "Day", "Exchange", "Override", "Session", "certain_until", "closure", "days", "exchange"]
__all__ += ["need", "needs", "session"]

_DAY = timedelta(days=1)
_THURSDAY, _SATURDAY = 3, 5
_COUNTRY = 2  # letters; the names of markets have four


class Session(NamedTuple):
    """One trading day from open to close, breaks included; both aware UTC."""

    open: datetime
    close: datetime


class Day(NamedTuple):
    """An exchange's day with a session, and when a token must be valid for it; aware UTC."""

    session: Session
    need: tuple[datetime, datetime]


class Override(NamedTuple):
    """What the user's settings say about one exchange."""

    closed: frozenset[date] = frozenset()  # days without a session
    hours: Mapping[date, tuple[time, time]] = {}  # of single days in the exchange's zone, open whatever else is said
    extended: bool = False  # whether trading around the regular session counts, where the table knows any


_NONE = Override()


def closure(code: str, day: date, overrides: Mapping[str, Override] = {}) -> str | None:
    """Why the exchange is closed on that day, in words such as `Chung Yeung Festival`; else None."""
    place = exchange(code)
    override = overrides.get(place.code, _NONE)
    if day in override.hours:
        return None
    return "closed by your settings" if day in override.closed else _closure(place, day)


def session(code: str, day: date, overrides: Mapping[str, Override] = {}) -> Session | None:
    """The exchange's session of that day, aware UTC; None on a closed day."""
    found = _day(exchange(code), day, overrides)
    return found and found.session


def need(code: str, day: date, overrides: Mapping[str, Override] = {}) -> tuple[datetime, datetime] | None:
    """From 30 minutes before the open of that day to the close and its pad, aware UTC; None on a closed day."""
    found = _day(exchange(code), day, overrides)
    return found and found.need


def needs(
    codes: Iterable[str], start: datetime, end: datetime, overrides: Mapping[str, Override] = {}
) -> list[tuple[datetime, datetime]]:
    """All needs of these exchanges that overlap [start, end), sorted, aware UTC; those that touch become one.

    They are not cut at `start` and `end`.
    """
    merged: list[tuple[datetime, datetime]] = []
    for begins, ends in sorted([one.need for code in codes for one in days(code, start, end, overrides)]):
        if merged and begins <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(ends, merged[-1][1])
        else:
            merged.append((begins, ends))
    return merged


def days(code: str, start: datetime, end: datetime, overrides: Mapping[str, Override] = {}) -> list[Day]:
    """The exchange's days with a session whose needs overlap [start, end), in order."""
    place = exchange(code)
    zone, known = ZoneInfo(place.zone), place.code in overrides
    first, last = start.astimezone(zone).date(), end.astimezone(zone).date()
    # A need may begin the day before its session's and end the day after, by lead and pad.
    dates = [first + n * _DAY for n in range(-1, (last - first).days + 2)]
    found = [_day(place, day, overrides) if known else _by_calendar(place.code, day) for day in dates]
    return [one for one in found if one and one.need[0] < end and one.need[1] > start]


def certain_until() -> date:
    """The last day of the last year whose official notices have reached the installed `holidays` package.

    After it, China's weekdays all count as open, and other closures are computed from the law. A holiday that is
    declared at a few weeks' notice, as Korea does, costs one needless check until the package or your settings name it.
    """
    return date(_last_announced_year(), 12, 31)


def _day(place: Exchange, day: date, overrides: Mapping[str, Override]) -> Day | None:
    override = overrides.get(place.code, _NONE)
    if day in override.hours:
        return _made(place, day, override.hours[day], place.pad)  # meant as they are
    return None if day in override.closed else _by_calendar(place.code, day, extended=override.extended)


@lru_cache(maxsize=16_384)  # days; every run asks for the same weeks again and again
def _by_calendar(code: str, day: date, *, extended: bool = False) -> Day | None:
    place = EXCHANGES[code]
    longer = place.extended if extended and place.extended and day >= place.extended.since else None
    return None if _closure(place, day) else _made(place, day, _hours(place, day, longer), (longer or place).pad)


def _closure(place: Exchange, day: date) -> str | None:
    if day.weekday() >= _SATURDAY:
        return "weekend"
    if day < place.since:
        return f"{place.code} trades since {place.since}"
    return _year(place.calendar, day.year, by_notice=place.by_notice).closures.get(day)


def _made(place: Exchange, day: date, hours: tuple[time, time], pad: timedelta) -> Day:
    zone = ZoneInfo(place.zone)
    opens, closes = [datetime.combine(day, hour, zone).astimezone(UTC) for hour in hours]
    return Day(Session(opens, closes), (opens - LEAD, closes + pad))


def _hours(place: Exchange, day: date, extended: Extended | None) -> tuple[time, time]:
    opens, closes = place.open, place.close
    year = _year(place.calendar, day.year, by_notice=place.by_notice)
    if place.earlier_close and day < place.earlier_close[0]:
        closes = place.earlier_close[1]
    # A test after the table's end: all since 2016 were on the Thursday from the 13th, except two that were postponed.
    thursday = day.weekday() == _THURSDAY and (11, 13) <= (day.month, day.day) <= (11, 19) and day > max(CSAT_DAYS)
    if place.csat and (day in CSAT_DAYS or thursday):  # which covers both hours
        opens, closes = place.csat[0] if day in CSAT_DAYS else opens, place.csat[1]
    elif place.first_open and day == year.first_session:
        opens = place.first_open
    half = place.half_close if day in year.half_days else None
    if extended:
        return min(opens, extended.open), (half and extended.half_close) or extended.close
    return opens, half or closes


class _Year(NamedTuple):
    closures: Mapping[date, str] = {}  # with their names
    half_days: frozenset[date] = frozenset()
    first_session: date = date.min


@cache
def _year(calendar: str, year: int, *, by_notice: bool) -> _Year:
    """That year of the calendar; empty where it would be a guess."""
    if by_notice and year > _last_announced_year():
        return _Year()
    from holidays import country_holidays, financial_holidays  # 0.05 s, off the path of a cached token

    load = country_holidays if len(calendar) == _COUNTRY else financial_holidays
    known = load(calendar)
    # The English of the place, if there is one: Hong Kong says Chung Yeung, not Double Ninth.
    language = min((name for name in known.supported_languages if name.startswith("en")), default=None)
    closures = dict(load(calendar, years=year, language=language).items())
    kept = "half_day" in known.supported_categories
    half_days = load(calendar, years=year, categories=("half_day",)) if kept else ()
    first = date(year, 1, 1)
    while first.weekday() >= _SATURDAY or first in closures:
        first += _DAY
    return _Year(closures, frozenset(half_days), first)


@cache
def _last_announced_year() -> int:
    """China's: its notice for a year comes in the November before, later than others', with days off by no rule."""
    from holidays import financial_holidays

    return max(getattr(financial_holidays("XSHG"), "special_public_holidays", ()), default=MINYEAR)
