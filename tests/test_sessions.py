"""Sessions and needs of the exchanges that KIS trades, against days that are known from the world."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import UTC, date, datetime, time, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokencore.errors import ConfigurationError
from tokencore.sessions import (
    EXCHANGES,
    Override,
    Session,
    certain_until,
    closure,
    exchange,
    is_session,
    need,
    needs,
    next_open,
    session,
    session_close,
    session_open,
)

DAY = timedelta(days=1)


def utc(text: str) -> datetime:
    """An aware time from ISO text without offset, read as UTC."""
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def local_hours(code: str, day: str, overrides: dict[str, Override] | None = None) -> str:
    """The session's hours as people at the exchange would write them; empty on a closed day."""
    found = session(code, date.fromisoformat(day), overrides or {})
    zone = ZoneInfo(exchange(code).zone)
    return "-".join(f"{edge.astimezone(zone):%H:%M}" for edge in found) if found else ""


@pytest.mark.parametrize(
    ("code", "day", "hours"),
    [
        pytest.param("KRX", "2026-11-20", "09:00-15:30", id="KRX has no lunch break"),
        pytest.param("NXT", "2026-11-20", "08:00-20:00", id="NXT runs from pre- to after-market"),
        pytest.param("NASD", "2026-11-20", "09:30-16:00", id="Nasdaq"),
        pytest.param("NYSE", "2026-11-20", "09:30-16:00", id="NYSE"),
        pytest.param("AMEX", "2026-11-20", "09:30-16:00", id="NYSE American"),
        pytest.param("SEHK", "2026-11-20", "09:30-16:00", id="Hong Kong, lunch included"),
        pytest.param("SHAA", "2026-11-20", "09:30-15:00", id="Shanghai, lunch included"),
        pytest.param("SZAA", "2026-11-20", "09:30-15:00", id="Shenzhen, lunch included"),
        pytest.param("TKSE", "2026-11-20", "09:00-15:30", id="Tokyo, lunch included"),
        pytest.param("VNSE", "2026-11-20", "09:00-15:00", id="Ho Chi Minh, lunch included"),
        pytest.param("HASE", "2026-11-20", "09:00-15:00", id="Hanoi, lunch included"),
        pytest.param("KRX", "2016-07-29", "09:00-15:00", id="KRX closed at 15:00 until July 2016"),
        pytest.param("KRX", "2016-08-01", "09:00-15:30", id="KRX closes at 15:30 since August 2016"),
        pytest.param("TKSE", "2024-11-01", "09:00-15:00", id="Tokyo closed at 15:00 until 2024"),
        pytest.param("TKSE", "2024-11-05", "09:00-15:30", id="Tokyo closes at 15:30 since then"),
        pytest.param("KRX", "2026-11-19", "10:00-16:30", id="KRX starts and ends late on CSAT day"),
        pytest.param("NXT", "2026-11-19", "10:00-20:00", id="NXT has no pre-market on CSAT day"),
        pytest.param("KRX", "2020-12-03", "10:00-16:30", id="the CSAT of the pandemic's December"),
        pytest.param("KRX", "2017-11-16", "10:00-16:30", id="the CSAT put off by an earthquake"),
        pytest.param("KRX", "2017-11-23", "10:00-16:30", id="the day to which it was put off"),
        pytest.param("KRX", "2028-11-16", "09:00-16:30", id="a guessed CSAT day covers both hours"),
        pytest.param("KRX", "2026-01-02", "10:00-15:30", id="the year's first session opens late"),
        pytest.param("KRX", "2016-01-04", "10:00-15:00", id="so it did when KRX closed at 15:00"),
        pytest.param("KRX", "2027-01-04", "10:00-15:30", id="also after a long New Year's weekend"),
        pytest.param("KRX", "2026-01-05", "09:00-15:30", id="the year's second session is regular"),
        pytest.param("NXT", "2026-01-02", "10:00-20:00", id="no pre-market on the first session"),
        pytest.param("NYSE", "2026-11-27", "09:30-13:00", id="the day after Thanksgiving"),
        pytest.param("NASD", "2026-12-24", "09:30-13:00", id="Christmas Eve in New York"),
        pytest.param("AMEX", "2025-07-03", "09:30-13:00", id="the day before Independence Day"),
        pytest.param("NYSE", "2026-07-02", "09:30-16:00", id="no half day when July 3 is closed"),
        pytest.param("NYSE", "2021-12-31", "09:30-16:00", id="a Saturday's New Year moves nothing"),
        pytest.param("SEHK", "2026-12-24", "09:30-12:00", id="Christmas Eve in Hong Kong"),
        pytest.param("SEHK", "2025-12-31", "09:30-12:00", id="New Year's Eve in Hong Kong"),
        pytest.param("SEHK", "2026-02-16", "09:30-12:00", id="Lunar New Year's Eve in Hong Kong"),
        pytest.param("TKSE", "2026-02-17", "09:00-15:30", id="Tokyo trades on Lunar New Year"),
    ],
)
def test_hours_of_known_days(code: str, day: str, hours: str) -> None:
    """A session has the hours that the exchange really kept on that day."""
    assert local_hours(code, day) == hours


@pytest.mark.parametrize(
    ("code", "first", "last"),
    [
        pytest.param("KRX", "2025-12-31", "2026-01-01", id="KRX rests on the year's last weekday"),
        pytest.param("KRX", "2022-12-30", "2022-12-30", id="a Friday if the year ends on Saturday"),
        pytest.param("NXT", "2025-12-31", "2026-01-01", id="NXT keeps KRX's days"),
        pytest.param("TKSE", "2025-12-31", "2026-01-03", id="Tokyo's year end"),
        pytest.param("NYSE", "2026-07-03", "2026-07-03", id="Independence Day on a Saturday"),
        pytest.param("NASD", "2018-12-05", "2018-12-05", id="mourning for George H. W. Bush"),
        pytest.param("AMEX", "2025-01-09", "2025-01-09", id="mourning for Jimmy Carter"),
        pytest.param("KRX", "2026-06-03", "2026-06-03", id="local elections"),
        pytest.param("KRX", "2026-07-17", "2026-07-17", id="Constitution Day is back"),
        pytest.param("KRX", "2026-02-16", "2026-02-18", id="Lunar New Year in Seoul"),
        pytest.param("SEHK", "2026-02-17", "2026-02-19", id="Lunar New Year in Hong Kong"),
        pytest.param("SHAA", "2026-02-16", "2026-02-23", id="Lunar New Year in Shanghai"),
        pytest.param("SZAA", "2026-02-16", "2026-02-23", id="Lunar New Year in Shenzhen"),
        pytest.param("VNSE", "2026-02-16", "2026-02-20", id="Lunar New Year in Ho Chi Minh City"),
        pytest.param("HASE", "2026-08-31", "2026-09-02", id="Vietnam's National Day, with a swap"),
        pytest.param("SHAA", "2026-10-10", "2026-10-10", id="a Saturday that China made a workday"),
        pytest.param("SEHK", "2023-09-08", "2023-09-08", id="a black rainstorm"),
    ],
)
def test_closures_of_known_days(code: str, first: str, last: str) -> None:
    """The exchange is closed on each of these days, and says why."""
    day = date.fromisoformat(first)
    while day <= date.fromisoformat(last):
        assert closure(code, day), day
        assert not is_session(code, day)
        assert session(code, day) is None
        assert session_open(code, day) is None
        assert session_close(code, day) is None
        assert need(code, day) is None
        day += DAY


def test_a_vietnamese_year_has_the_days_off_that_its_exchange_announced() -> None:
    """The country's calendar gives the closures of the Ho Chi Minh exchange's notice for 2025."""
    days = [date(2025, 1, 1) + n * DAY for n in range(365)]
    closed = [f"{day:%m-%d}" for day in days if day.weekday() < 5 and not is_session("HSX", day)]
    assert closed == [
        *("01-01", "01-27", "01-28", "01-29", "01-30", "01-31"),
        *("04-07", "04-30", "05-01", "05-02", "09-01", "09-02"),
    ]


@pytest.mark.parametrize(
    ("code", "day", "reason"),
    [
        ("SEHK", date(2025, 10, 29), "Chung Yeung Festival"),
        ("KRX", date(2026, 12, 31), "End of Year Holiday"),
        ("TKSE", date(2026, 11, 22), "weekend"),
        ("NXT", date(2025, 2, 28), "Nextrade trades since 2025-03-04"),
        ("NYSE", date(2026, 11, 25), None),
    ],
)
def test_closure_is_given_in_words(code: str, day: date, reason: str | None) -> None:
    """A closed day has a reason that a person understands; an open day has none."""
    assert closure(code, day) == reason


@pytest.mark.parametrize(
    ("day", "opens"),
    [
        (date(2026, 3, 6), "2026-03-06T14:30"),
        (date(2026, 3, 9), "2026-03-09T13:30"),
        (date(2026, 10, 30), "2026-10-30T13:30"),
        (date(2026, 11, 2), "2026-11-02T14:30"),
    ],
)
def test_new_york_opens_follow_daylight_saving(day: date, opens: str) -> None:
    """The open in New York moves by an hour in UTC over each change of the clocks."""
    assert session_open("NYSE", day) == utc(opens)
    assert session_close("NYSE", day) == utc(opens) + timedelta(hours=6, minutes=30)


def test_weekdays_beyond_the_known_chinese_year_are_open() -> None:
    """After the last year that the State Council has announced every weekday counts as open."""
    end = certain_until("SHAA")
    weekdays = [day for n in range(1, 366) if (day := end + n * DAY).weekday() < 5]
    assert end >= date(2026, 12, 31)
    assert end < certain_until("NYSE")
    assert all(is_session("SHAA", day) and is_session("SZAA", day) for day in weekdays)
    assert not is_session("SHAA", date(end.year, 10, 2))


def test_override_closes_a_day() -> None:
    """A day that the settings close is closed by the settings, on that exchange only."""
    overrides = {"SEHK": Override(closed=frozenset({date(2026, 11, 20)}))}
    assert closure("HKS", date(2026, 11, 20), overrides) == "closed by your settings"
    assert is_session("SHAA", date(2026, 11, 20), overrides)


def test_override_sets_hours_even_of_a_closed_day() -> None:
    """Hours from the settings replace the table's, and open a weekend or a day closed twice over."""
    days = date(2026, 11, 19), date(2026, 11, 22)
    overrides = {"KRX": Override(frozenset(days), dict.fromkeys(days, (time(11), time(17, 15))), extended=True)}
    for day in days:
        assert session("KRX", day, overrides) == Session(utc(f"{day}T02:00"), utc(f"{day}T08:15"))
        assert need("KRX", day, overrides) == (utc(f"{day}T01:30"), utc(f"{day}T09:15"))


@pytest.mark.parametrize(
    ("code", "day", "hours"),
    [
        pytest.param("KRX", "2026-09-11", "09:00-15:30", id="no after-market before it existed"),
        pytest.param("KRX", "2026-09-14", "09:00-20:00", id="KRX's after-market"),
        pytest.param("KRX", "2026-11-19", "10:00-20:00", id="KRX's after-market on CSAT day"),
        pytest.param("NASD", "2026-11-25", "04:00-20:00", id="pre- and after-market in New York"),
        pytest.param("NASD", "2026-11-27", "04:00-17:00", id="a half day's after-market"),
        pytest.param("SEHK", "2026-11-25", "09:30-16:00", id="nothing to extend in Hong Kong"),
    ],
)
def test_extended_hours_count_where_asked_for(code: str, day: str, hours: str) -> None:
    """Extended hours widen the session only with the override that asks for them."""
    assert local_hours(code, day, {code: Override(extended=True)}) == hours
    assert local_hours(code, day) == local_hours(code, day, {code: Override()})


@pytest.mark.parametrize(
    ("code", "extended", "expected"),
    [
        pytest.param("KRX", False, ("2026-11-19T23:30", "2026-11-20T07:30"), id="KRX pads an hour"),
        pytest.param("KRX", True, ("2026-11-19T23:30", "2026-11-20T11:10"), id="extended has the evening's pad"),
        pytest.param("NXT", False, ("2026-11-19T22:30", "2026-11-20T11:10"), id="NXT has the evening's pad"),
        pytest.param("SEHK", False, ("2026-11-20T01:00", "2026-11-20T08:10"), id="SEHK pads 10 min"),
        pytest.param("NYSE", False, ("2026-11-20T14:00", "2026-11-20T21:00"), id="NYSE has no pad"),
    ],
)
def test_need_reaches_from_before_the_open_to_the_pad(
    code: str,
    extended: bool,  # noqa: FBT001 - a column of the table
    expected: tuple[str, str],
) -> None:
    """A need is the session with 30 minutes before it and the exchange's pad after it."""
    overrides = {code: Override(extended=extended)}
    assert need(code, date(2026, 11, 20), overrides) == (utc(expected[0]), utc(expected[1]))


def test_needs_merge_across_exchanges() -> None:
    """Needs that overlap become one; those apart stay apart."""
    found = needs(["KRX", "TKSE", "SEHK", "NYSE"], utc("2026-11-19T20:00"), utc("2026-11-20T20:00"))
    assert found == [
        (utc("2026-11-19T14:00"), utc("2026-11-19T21:00")),
        (utc("2026-11-19T23:30"), utc("2026-11-20T08:10")),
        (utc("2026-11-20T14:00"), utc("2026-11-20T21:00")),
    ]


def test_needs_that_touch_become_one() -> None:
    """Two needs without a second between them are one."""
    hours = {date(2026, 11, 20): (time(17, 0), time(18, 0))}  # its need starts as KRX's ends
    found = needs(
        ["KRX", "TKSE"],
        utc("2026-11-19T22:00"),
        utc("2026-11-20T12:00"),
        {"TKSE": Override(hours=hours)},
    )
    assert found == [(utc("2026-11-19T23:30"), utc("2026-11-20T09:00"))]


def test_needs_take_what_overlaps_and_nothing_that_only_touches_the_range() -> None:
    """The range is half open: a need that ends at its start or starts at its end is outside."""
    begins, ends = utc("2026-11-19T23:30"), utc("2026-11-20T07:30")
    second = timedelta(seconds=1)
    assert needs(["KRX"], ends, ends + 3 * second) == []
    assert needs(["KRX"], begins - second, begins) == []
    assert needs(["KRX"], ends - second, ends) == needs(["KRX"], begins, begins + second)
    assert needs(["KRX"], begins, begins + second) == [(begins, ends)]


def test_needs_reach_over_midnight() -> None:
    """Lead and pad that lie on another day than the session are found from that day."""
    hours = {date(2026, 11, 20): (time(0, 10), time(23, 30))}
    overrides = {"KRX": Override(hours=hours)}
    whole = [(utc("2026-11-19T14:40"), utc("2026-11-20T15:30"))]
    assert needs(["KRX"], utc("2026-11-19T14:45"), utc("2026-11-19T14:50"), overrides) == whole
    assert needs(["KRX"], utc("2026-11-20T15:20"), utc("2026-11-20T15:25"), overrides) == whole


@pytest.mark.parametrize(
    ("code", "now", "expected"),
    [
        pytest.param("KRX", "2026-11-20T00:00", "2026-11-23T00:00", id="an open is not its own next"),
        pytest.param("KRX", "2026-11-19T23:59", "2026-11-20T00:00", id="a minute before the open"),
        pytest.param("NYSE", "2026-11-25T22:00", "2026-11-27T14:30", id="over Thanksgiving"),
        pytest.param("KRX", "2026-12-30T12:00", "2027-01-04T01:00", id="over the year's end"),
        pytest.param("NXT", "2024-06-01T00:00", "2025-03-03T23:00", id="before the exchange existed"),
    ],
)
def test_next_open_is_the_first_after_now(code: str, now: str, expected: str) -> None:
    """The next open lies strictly after now and skips closed days."""
    assert next_open(code, utc(now)) == utc(expected)


def test_times_without_a_zone_are_refused() -> None:
    """A naive time is an error, not a guess by the machine's zone."""
    naive = datetime(2026, 11, 20, 9)  # noqa: DTZ001 - the point of the test
    with pytest.raises(TypeError):
        next_open("KRX", naive)
    with pytest.raises(TypeError):
        needs(["KRX"], naive, naive + DAY)


@pytest.mark.parametrize(
    ("names", "code"),
    [
        (["KRX", "krx", "XKRX", " KRX "], "KRX"),
        (["NXT", "nxt"], "NXT"),
        (["NASD", "NAS", "XNAS", "NASDAQ", "Nasdaq"], "NASD"),
        (["NYSE", "NYS", "XNYS"], "NYSE"),
        (["AMEX", "AMS", "XASE"], "AMEX"),
        (["SEHK", "HKS", "XHKG"], "SEHK"),
        (["SHAA", "SHS", "XSHG"], "SHAA"),
        (["SZAA", "SZS", "XSHE"], "SZAA"),
        (["TKSE", "TSE", "XTKS"], "TKSE"),
        (["VNSE", "HSX", "XSTC"], "VNSE"),
        (["HASE", "HNX", "XHNX"], "HASE"),
    ],
)
def test_exchanges_answer_to_all_their_names(names: list[str], code: str) -> None:
    """Order code, quote code, MIC and alias mean the same exchange in any case of letters."""
    assert {exchange(name) for name in names} == {EXCHANGES[code]}
    assert EXCHANGES[code].code == code


def test_an_unknown_exchange_is_answered_with_the_known_ones() -> None:
    """The sentence about an unknown name lists every code that would have worked."""
    with pytest.raises(ConfigurationError, match="'LSE'") as caught:
        exchange("LSE")
    assert all(code in str(caught.value) for code in EXCHANGES)


@given(
    codes=st.lists(st.sampled_from(sorted(EXCHANGES)), max_size=5),
    start=st.datetimes(
        datetime(2016, 1, 1),  # noqa: DTZ001 - hypothesis adds the zone
        datetime(2027, 12, 1),  # noqa: DTZ001
        timezones=st.timezones(),
    ),
    length=st.timedeltas(timedelta(0), 20 * DAY),
    extended=st.booleans(),
)
def test_needs_are_sorted_disjoint_aware_and_complete(
    codes: list[str],
    start: datetime,
    length: timedelta,
    extended: bool,  # noqa: FBT001 - drawn
) -> None:
    """Merged needs are in order, apart and in UTC, and are just the union of the single needs."""
    end = start + length
    overrides = {code: Override(extended=extended) for code in EXCHANGES}
    found = needs(codes, start, end, overrides)
    edges = [edge for interval in found for edge in interval]
    assert all(earlier < later for earlier, later in pairwise(edges))
    assert all(edge.tzinfo is UTC for edge in edges)
    days = [start.date() + n * DAY for n in range(-3, length.days + 5)]
    single = [one for code in codes for day in days if (one := need(code, day, overrides))]
    touched = [one for one in single if one[0] < end and one[1] > start]
    assert all(any(a <= one[0] and one[1] <= b for a, b in found) for one in touched)
    assert set(edges) <= {edge for one in touched for edge in one}


def test_zone_of_the_machine_changes_nothing() -> None:
    """The same needs and opens come out under any TZ."""
    program = (
        "from datetime import UTC, datetime as d, timedelta as t\n"
        "from tokencore.sessions import *\n"
        "now = d(2026, 3, 5, 23, 59, tzinfo=UTC)\n"
        "print(needs(EXCHANGES, now, now + t(20)), [next_open(c, now) for c in EXCHANGES])"
    )
    answers = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "TZ": zone},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for zone in ("UTC", "America/New_York", "Pacific/Kiritimati")
    }
    assert len(answers) == 1
    assert "datetime.datetime(2026, 3, 6, 0, 0" in answers.pop()


def test_importing_sessions_loads_no_heavy_package() -> None:
    """The calendar package is loaded by the first question, not by the import."""
    program = "import sys, tokencore.sessions; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()
    assert "tokencore.sessions" in loaded
    assert not {"holidays", "pydantic", "requests", "filelock"} & set(loaded)


def test_a_calendar_is_loaded_without_the_others_which_are_there_when_asked_for() -> None:
    """Of 250 countries only those behind our exchanges are loaded, and the package's other users find all it has."""
    program = """
import sys
from datetime import date
from tokencore import sessions
for code in sessions.EXCHANGES:
    sessions.closure(code, date(2026, 12, 24))
countries = [name for name in sys.modules if name.startswith("holidays.countries.")]
assert 0 < len(countries) < 10, countries
import holidays.countries, holidays.financial
from holidays.countries import *
from holidays.financial import XLON
assert France is holidays.countries.France, "by a star"
assert "NZ" in dir(holidays.countries) and len(dir(holidays.financial)) > 60, "by a list"
assert XLON(years=2026) and holidays.country_holidays("DE", years=2026), "by its use"
assert isinstance(holidays.country_holidays("HK"), holidays.countries.hongkong.HongKong), "one class of each"
assert not hasattr(holidays.countries, "Nowhere"), "nothing else"
"""
    ran = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_child_forked_while_a_thread_loads_a_calendar_has_it_too() -> None:
    """No lock of ours stays held in the child, where the thread that held it does not go on."""
    program = """
import importlib.util, os, signal, threading, time
from datetime import date
from tokencore import sessions
find, there = importlib.util.find_spec, threading.Event()
def slow(name):
    there.set()
    time.sleep(60)
importlib.util.find_spec = slow
day = date(2026, 12, 25)
threading.Thread(target=sessions.closure, args=("NYSE", day), daemon=True).start()
there.wait()
importlib.util.find_spec = find
if not os.fork():
    signal.alarm(10)
    print(sessions.closure("NYSE", day), flush=True)
    os._exit(0)
os.wait()
os._exit(0)
"""
    ran = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=20)
    assert "Christmas" in ran.stdout, ran.stderr
