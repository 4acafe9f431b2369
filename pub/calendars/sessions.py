"""When exchanges trade, and when a token must therefore be valid.

Hours come from the table of exchanges, closures and half days from the `holidays` package; the user's overrides take
precedence over both. A weekday not known to be closed counts as open: a needless check is harmless, a missed session is
not. Days are dates in the exchange's zone; datetimes that come out are aware UTC, and those that go in must be aware.
Exchanges go by any name that `exchange` knows; it raises ConfigurationError for any other.
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
_COUNTRY = 2  # letters in the name of a country's calendar; those of markets have four


class Session(NamedTuple):
    """One trading day from open to close, breaks included; both aware UTC."""

    open: datetime
    close: datetime


class Day(NamedTuple):
    """An exchange's session of one day, and the time in which a token must be valid for it; aware UTC."""

    session: Session
    need: tuple[datetime, datetime]


class Override(NamedTuple):
    """What the user's settings say about one exchange."""

    closed: frozenset[date] = frozenset()  # days without a session
    hours: Mapping[date, tuple[time, time]] = {}  # for single days, in the exchange's zone; they overrule any closure
    extended: bool = False  # whether trading around the regular session counts, if the table has any


_NONE = Override()


def closure(code: str, day: date, overrides: Mapping[str, Override] = {}) -> str | None:
    """Return why the exchange is closed on that day, such as `Chung Yeung Festival`; None if it is open."""
    place = exchange(code)
    override = overrides.get(place.code, _NONE)
    if day in override.hours:
        return None
    return "closed by your settings" if day in override.closed else _closure(place, day)


def session(code: str, day: date, overrides: Mapping[str, Override] = {}) -> Session | None:
    """Return the exchange's session on that day, aware UTC; None if it is closed."""
    found = _day(exchange(code), day, overrides)
    return found and found.session


def need(code: str, day: date, overrides: Mapping[str, Override] = {}) -> tuple[datetime, datetime] | None:
    """Return that day's need, from 30 minutes before the open to the close plus the pad, aware UTC; None if closed."""
    found = _day(exchange(code), day, overrides)
    return found and found.need


def needs(
    codes: Iterable[str], start: datetime, end: datetime, overrides: Mapping[str, Override] = {}
) -> list[tuple[datetime, datetime]]:
    """Return the needs of these exchanges that overlap [start, end), sorted, aware UTC; those that touch are merged.

    They are not cut off at `start` and `end`.
    """
    merged: list[tuple[datetime, datetime]] = []
    for begins, ends in sorted([one.need for code in codes for one in days(code, start, end, overrides)]):
        if merged and begins <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(ends, merged[-1][1])
        else:
            merged.append((begins, ends))
    return merged


def days(code: str, start: datetime, end: datetime, overrides: Mapping[str, Override] = {}) -> list[Day]:
    """Return the exchange's days whose needs overlap [start, end), in order."""
    place = exchange(code)
    zone, known = ZoneInfo(place.zone), place.code in overrides
    first, last = start.astimezone(zone).date(), end.astimezone(zone).date()
    # Because of lead and pad, a need may begin the day before its session or end the day after.
    dates = [first + n * _DAY for n in range(-1, (last - first).days + 2)]
    found = [_day(place, day, overrides) if known else _by_calendar(place.code, day) for day in dates]
    return [one for one in found if one and one.need[0] < end and one.need[1] > start]


def certain_until(_code: str = "") -> date:
    """Return the last day of the last year whose official notices are in the installed `holidays` package.

    After that day all of China's weekdays count as open, and other closures are computed from the law. A holiday
    declared at a few weeks' notice, as in Korea, costs one needless check until the package or your settings have it.
    Version 0.1 asked for an exchange.
    """
    return date(_last_announced_year(), 12, 31)


def _day(place: Exchange, day: date, overrides: Mapping[str, Override]) -> Day | None:
    override = overrides.get(place.code, _NONE)
    if day in override.hours:
        return _made(place, day, override.hours[day], place.pad)  # the user's hours are taken as given
    return None if day in override.closed else _by_calendar(place.code, day, extended=override.extended)


@lru_cache(maxsize=16_384)  # days; each run asks for the same weeks many times
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
    # CSAT days after the table's end: since 2016 all were on the Thursday from the 13th on, except two postponed ones.
    thursday = day.weekday() == _THURSDAY and (11, 13) <= (day.month, day.day) <= (11, 19) and day > max(CSAT_DAYS)
    if place.csat and (day in CSAT_DAYS or thursday):  # a guessed day keeps the usual open, to cover both cases
        opens, closes = place.csat[0] if day in CSAT_DAYS else opens, place.csat[1]
    elif place.first_open and day == year.first_session:
        opens = place.first_open
    half = place.half_close if day in year.half_days else None
    if extended:
        return min(opens, extended.open), (half and extended.half_close) or extended.close
    return opens, half or closes


class _Year(NamedTuple):
    closures: Mapping[date, str] = {}  # the names of the holidays by day
    half_days: frozenset[date] = frozenset()
    first_session: date = date.min


@cache
def _year(calendar: str, year: int, *, by_notice: bool) -> _Year:
    """Return one year of a calendar; empty if it would only be a guess."""
    if by_notice and year > _last_announced_year():
        return _Year()
    from holidays import country_holidays, financial_holidays  # 0.05 s that a cached token does not pay

    load = country_holidays if len(calendar) == _COUNTRY else financial_holidays
    known = load(calendar)
    # Prefer the local English name, if there is one: Hong Kong says Chung Yeung, not Double Ninth.
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
    """Return the last year of China's notices, which come last of all, in the November before, and follow no rule."""
    from holidays import financial_holidays

    return max(getattr(financial_holidays("XSHG"), "special_public_holidays", ()), default=MINYEAR)
