"""Sessions and needs of the exchanges that KIS trades, against known days and against `exchange_calendars`."""

from collections.abc import Iterator
from datetime import UTC, date, datetime, time, timedelta
from zoneinfo import ZoneInfo

import pytest

from tokencore.calendars import sessions
from tokencore.calendars.exchanges import CSAT_DAYS
from tokencore.calendars.sessions import EXCHANGES, Override, closure, exchange, need, needs, session
from tokencore.errors import ConfigurationError

DAY = timedelta(days=1)
FIRST, LAST = date(2016, 1, 4), date(2026, 11, 20)  # fixed: answers about the past must not depend on today


def utc(text: str) -> datetime:
    """An aware time from ISO text without offset, read as UTC."""
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def days(first: date, last: date) -> Iterator[date]:
    """Every day from the first to the last."""
    return (first + n * DAY for n in range((last - first).days + 1))


def local_hours(code: str, day: date, override: Override = Override()) -> str:  # noqa: B008 - immutable
    """The session's hours in the exchange's own time, such as `09:30-16:00`; `closed` on a closed day."""
    found = session(code, day, {code: override})
    zone = ZoneInfo(exchange(code).zone)
    return "-".join(f"{edge.astimezone(zone):%H:%M}" for edge in found) if found else "closed"


HOURS = {  # the exchange's own hours on days that `exchange_calendars`, used below, does not cover or has otherwise
    "KRX": "2016-07-29 09:00-15:00, 2016-08-01 09:00-15:30, 2026-01-02 10:00-15:30,"
    "2026-12-31 closed, 2027-01-04 10:00-15:30, 2027-11-18 10:00-16:30,"
    "2028-11-16 09:00-16:30",  # a guessed CSAT day covers both hours
    "NXT": "2025-02-28 closed, 2025-03-04 08:00-20:00, 2025-12-31 closed, 2026-01-02 10:00-20:00,"
    "2026-11-19 10:00-20:00, 2026-11-20 08:00-20:00",
    "NYSE": "2026-11-26 closed, 2026-11-27 09:30-13:00, 2026-11-30 09:30-16:00",
    "SEHK": "2026-12-24 09:30-12:00",
    "SHAA": "2026-10-10 closed",  # a Saturday of work
    "TKSE": "2024-11-01 09:00-15:00, 2024-11-05 09:00-15:30",
    "VNSE": "2025-01-27 closed, 2025-05-02 closed, 2026-02-16 closed, 2026-11-20 09:00-15:00",
    "HASE": "2026-08-31 closed, 2026-09-02 closed, 2026-11-20 09:00-15:00",
    # Where the settings ask for extended hours, with half days; Hong Kong has none.
    "KRX extended": "2026-09-11 09:00-15:30, 2026-09-14 09:00-20:00, 2026-11-19 10:00-20:00",
    "NASD extended": "2026-11-25 04:00-20:00, 2026-11-27 04:00-17:00",
    "SEHK extended": "2026-11-25 09:30-16:00",
}


@pytest.mark.parametrize("key", HOURS)
def test_hours_of_known_days(key: str) -> None:
    """A session has the hours that the exchange really kept on that day, and a closed day has no session."""
    (code, *extended), known = key.split(), dict(row.split() for row in HOURS[key].split(","))
    override = Override(extended=bool(extended))
    assert {day: local_hours(code, date.fromisoformat(day), override) for day in known} == known


def test_a_need_reaches_from_before_the_open_to_the_pad() -> None:
    """A need is the session with 30 minutes before it and the pad after it: the exchange's own, or the evening's."""
    known = "KRX 19T23:30 20T07:30, KRX 19T23:30 20T11:10 extended, NXT 19T22:30 20T11:10, SEHK 20T01:00 20T08:10"
    for row in (*known.split(", "), "NYSE 20T14:00 20T21:00", "NYSE 20T08:30 21T01:00 extended"):
        code, begins, ends, *extended = row.split()
        found = need(code, date(2026, 11, 20), {code: Override(extended=bool(extended))})
        assert found == (utc(f"2026-11-{begins}"), utc(f"2026-11-{ends}")), row


def test_the_known_horizon_is_the_last_year_that_was_announced() -> None:
    """After that year China's weekdays all count as open until its next notice; others' holidays by law still count."""
    end = sessions.certain_until("KRX")  # as 0.1 had it
    assert end == sessions.certain_until()
    assert date(2026, 12, 31) <= end <= date(datetime.now(UTC).year + 1, 12, 31)
    assert closure("SHAA", date(end.year, 10, 2))
    weekdays = [day for day in days(date(end.year + 1, 1, 1), date(end.year + 1, 12, 31)) if day.weekday() < 5]
    assert not any(closure(code, day) for day in weekdays for code in ("SHAA", "SZAA"))
    assert all(sum(bool(closure(code, day)) for day in weekdays) > 5 for code in ("KRX", "NYSE", "SEHK", "TKSE"))


def test_overrides_close_and_open_days_of_their_exchange() -> None:
    """A day closed by the settings is closed for that exchange alone; hours in the settings open even a closed day."""
    thursday, sunday = date(2026, 11, 19), date(2026, 11, 22)
    overrides = {"SEHK": Override(closed=frozenset({thursday}))}
    assert closure("HKS", thursday, overrides) == "closed by your settings"
    assert (closure("SHAA", thursday, overrides), closure("SHAA", sunday, overrides)) == (None, "weekend")
    hours = dict.fromkeys((thursday, sunday), (time(11), time(17, 15)))
    overrides = {"KRX": Override(frozenset(hours), hours, extended=True)}
    for day in hours:
        assert closure("KRX", day, overrides) is None
        assert session("KRX", day, overrides) == (utc(f"{day}T02:00"), utc(f"{day}T08:15"))
        assert need("KRX", day, overrides) == (utc(f"{day}T01:30"), utc(f"{day}T09:15"))


def test_needs_merge_where_they_overlap_or_touch() -> None:
    """Needs that overlap or touch become one; those with a gap between them stay apart."""
    start, end = utc("2026-11-19T20:00"), utc("2026-11-20T20:00")
    touching = {"TKSE": Override(hours={date(2026, 11, 20): (time(17), time(18))})}  # its need starts as KRX's ends
    asian, american = ("19T23:30", "20T09:00"), [("19T14:00", "19T21:00"), ("20T14:00", "20T21:00")]
    expected = [(utc(f"2026-11-{begins}"), utc(f"2026-11-{ends}")) for begins, ends in sorted([asian, *american])]
    assert needs(["KRX", "TKSE", "SEHK", "NYSE"], start, end, touching) == expected


def test_the_range_of_needs_is_half_open_and_reaches_over_midnight() -> None:
    """A need that ends at the range's start or starts at its end is outside; lead and pad may be on another day."""
    begins, ends, second = utc("2026-11-19T23:30"), utc("2026-11-20T07:30"), timedelta(seconds=1)
    assert needs(["KRX"], ends, ends + 3 * second) == needs(["KRX"], begins - second, begins) == []
    assert needs(["KRX"], ends - second, ends) == needs(["KRX"], begins, begins + second) == [(begins, ends)]
    overrides = {"KRX": Override(hours={date(2026, 11, 20): (time(0, 10), time(23, 30))})}
    whole = [(utc("2026-11-19T14:40"), utc("2026-11-20T15:30"))]
    for at in (utc("2026-11-19T14:45"), utc("2026-11-20T15:20")):
        assert needs(["KRX"], at, at + 300 * second, overrides) == whole


def test_exchanges_answer_to_all_their_names() -> None:
    """Order code, quote code, MIC and alias name the same exchange in any case; an unknown name lists the codes."""
    names = "KRX krx XKRX, NXT nxt, NASD NAS XNAS NASDAQ Nasdaq, NYSE NYS XNYS, AMEX AMS XASE, SEHK HKS XHKG, "
    names += "SHAA SHS XSHG, SZAA SZS XSHE, TKSE TSE XTKS, VNSE HSX XSTC, HASE HNX XHNX"
    rows = [row.split() for row in names.split(",")]
    assert [row[0] for row in rows] == list(EXCHANGES)
    assert all(exchange(f" {name} ") is EXCHANGES[row[0]] for row in rows for name in row)
    with pytest.raises(ConfigurationError, match=r"'LSE'.*KRX, NXT, .*HASE"):
        exchange("LSE")


# `exchange_calendars` lacks Vietnam and Nextrade; Nasdaq, NYSE American and Shenzhen keep the days of a neighbour.
THEIR_NAMES = {"KRX": "XKRX", "NASD": "XNYS", "NYSE": "XNYS", "AMEX": "XNYS"}
THEIR_NAMES |= {"SEHK": "XHKG", "SHAA": "XSHG", "SZAA": "XSHG", "TKSE": "XTKS"}
SINCE = {"KRX": date(2016, 8, 1), "TKSE": date(2024, 11, 5)}  # since then they close at the present time
DIFFERENCES = {  # exchange and day: our hours, theirs
    # `exchange_calendars` has no CSAT days after 2020; KRX traded from 10:00 to 16:30.
    **{("KRX", day.isoformat()): ("10:00-16:30", "09:00-15:30") for day in CSAT_DAYS if date(2021, 1, 1) < day < LAST},
    ("KRX", "2026-06-03"): ("closed", "09:00-15:30"),  # local elections
    ("KRX", "2026-07-17"): ("closed", "09:00-15:30"),  # Constitution Day, a holiday again since 2026
    ("SEHK", "2023-09-01"): ("closed", "09:30-16:00"),  # typhoon Saola: no trading at all
    ("SEHK", "2023-09-08"): ("closed", "09:30-16:00"),  # black rainstorm, the same
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # pandas warns about itself
def test_every_difference_from_a_second_opinion_is_listed_with_its_reason() -> None:
    """Since they have their present hours, the exchanges keep the days of `exchange_calendars`, except those listed."""
    import exchange_calendars  # takes seconds, and only this test needs it

    found = {}
    calendars = {name: exchange_calendars.get_calendar(name, start=FIRST, end=LAST) for name in THEIR_NAMES.values()}
    for code, name in THEIR_NAMES.items():
        calendar, zone = calendars[name], EXCHANGES[code].zone
        opens, closes = (edge.dt.tz_convert(zone).dt.strftime("%H:%M") for edge in (calendar.opens, calendar.closes))
        theirs = {day.date(): f"{opens[day]}-{closes[day]}" for day in calendar.sessions}
        for day in days(SINCE.get(code, FIRST), LAST):
            if (pair := (local_hours(code, day), theirs.get(day, "closed"))) != (pair[1], pair[1]):
                found[code, str(day)] = pair
    assert found == DIFFERENCES
