"""The renewal rule: properties over random needs, and decisions that a person can check with pen and paper."""

from collections.abc import Sequence
from datetime import UTC, datetime, time, timedelta
from functools import partial
from unittest.mock import ANY
from zoneinfo import ZoneInfo

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tokencore.attempts import retry_delay
from tokencore.calendars import sessions
from tokencore.policy import Renewal, daily_anchor, next_renewal, quiet_time, renewals
from tokencore.tokens import KST

Span = tuple[datetime, datetime]
Steps = list[tuple[timedelta, timedelta]]

MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
COUNTS = DAY - timedelta(seconds=300)  # how long a token serves: its life less the buffer
ALL_BUT_NXT = [code for code in sessions.EXCHANGES if code != "NXT"]

steady = settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])


def kst(text: str) -> datetime:
    """A moment of 2026, written as `06-01 16:35` or `06-01 16:35:02` in KST."""
    return datetime.fromisoformat(f"2026-{text}").replace(tzinfo=KST).astimezone(UTC)


def spans(start: datetime, steps: Steps) -> list[Span]:
    """Needs from pairs of a quiet time and the length of the need after it."""
    found = []
    for quiet, length in steps:
        found.append((start + quiet, start + quiet + length))
        start = found[-1][1]
    return found


def minutes(least: int, most: int) -> st.SearchStrategy[timedelta]:
    """Whole minutes as a timedelta."""
    return st.integers(least, most).map(lambda n: n * MINUTE)


starts = st.datetimes(datetime(2016, 1, 1), datetime(2027, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001
steps = st.lists(st.tuples(minutes(1, 9) | minutes(1, 4000), minutes(1, 2400)), min_size=1, max_size=12)
wild_needs = st.builds(spans, starts, steps)
"""Anything: a minute of quiet, needs of a minute or of 40 hours."""
calm_needs = st.builds(spans, starts, st.lists(st.tuples(minutes(120, 4000), minutes(1, 960)), min_size=1, max_size=12))
"""What exchanges are like: two quiet hours or more before each need, no need above 16 hours."""
anchors = st.none() | st.times().map(lambda at: at.replace(microsecond=0))
"""Derived, or whatever a caller may have kept from some other horizon."""


def decide(
    now: datetime, needs: Sequence[Span], issued: datetime | None, anchor: time | None = None, *, lost: bool = False
) -> Renewal | None:
    """Return the rule's answer where the last issue brought a token of 24 hours, which may be lost."""
    expires = issued.astimezone(UTC) + DAY if issued and not lost else None
    return next_renewal(now, needs, issued_at=issued, expires_at=expires, anchor=anchor)


def run(needs: list[Span], anchor: time | None = None, faulty: Sequence[Span] = ()) -> list[Renewal]:
    """Return the issues of a program that starts two hours before the first need and backs off after failures.

    A plan holds until it is due: asked again earlier, the rule gives the same moment.
    """
    now, issued, failures = needs[0][0] - 2 * HOUR, None, 0
    done: list[Renewal] = []
    while planned := decide(now, needs, issued, anchor):
        assert decide(now + (planned.at - now) / 3, needs, issued, anchor) == Renewal(planned.at, ANY, ANY)
        now = planned.at
        if any(start <= now < end for start, end in faulty):
            failures += 1
            now += retry_delay(failures)
            continue
        done.append(planned)
        issued, failures = now, 0
        assert len(done) < 1000, "the rule never comes to an end"
    return done


def judge(needs: list[Span], done: list[Renewal]) -> dict[str, list[Span] | list[datetime]]:
    """Return the needs or issues with which a run broke a promise, found without the rule's own arithmetic."""
    issues = [one.at for one in done]
    pairs = list(zip([datetime(1, 1, 3, tzinfo=UTC), *issues], done, strict=False))
    return {
        "uncovered": [need for need in needs if not _covered(*need, issues)],
        "too soon": [one.at for last, one in pairs if one.at < last + 6 * HOUR],
        "unrecorded": [one.at for last, one in pairs if one.at < last + DAY and not one.exception],
        "disturbing": [
            one.at
            for last, one in pairs
            for start, end in needs
            if start < one.at < end and (last + COUNTS >= end or max(last + 6 * HOUR, end - COUNTS) <= start)
        ],
    }


def _covered(start: datetime, end: datetime, issues: list[datetime]) -> bool:
    for at in issues:
        start = at + COUNTS if at <= start < at + COUNTS else start
    return start >= end


@steady
@given(wild_needs, anchors, st.lists(st.tuples(minutes(0, 1200), minutes(1, 900)), max_size=8))
def test_needs_are_covered_undisturbed_and_outages_lead_to_no_issue_too_many(
    needs: list[Span], anchor: time | None, steps: Steps
) -> None:
    """A token changes inside a need only if none could last to its end; six hours lie between issues after outages."""
    assert not any(judge(needs, run(needs, anchor)).values())
    done = run(needs, anchor, spans(needs[0][0] - DAY, steps))
    faults = judge(needs, done)
    assert (faults["too soon"], faults["unrecorded"]) == ([], [])
    last = datetime.min.replace(tzinfo=UTC)
    for one in done:
        start, end = next(need for need in needs if need[1] > max(one.at, last + COUNTS))
        assert one.at + COUNTS >= end or "longer than one token" in str(one.exception)
        assert one.at <= start or "inside the need" in str(one.exception)
        last = one.at


@steady
@given(wild_needs, anchors, minutes(-3000, 9000), st.none() | minutes(0, 2000), minutes(-100, 9000))
def test_a_decision_lies_ahead_and_leaves_served_needs_alone(
    needs: list[Span], anchor: time | None, offset: timedelta, age: timedelta | None, left: timedelta
) -> None:
    """Whatever the token's age and life, even unknown, a renewal is neither in the past nor inside a served need."""
    now = needs[0][0] + offset
    issued = None if age is None else now - age
    if planned := next_renewal(now, needs, issued_at=issued, expires_at=now + left, anchor=anchor):
        assert planned.at >= now
        assert not any(start < planned.at < end <= now + left - DAY + COUNTS for start, end in needs)


@steady
@given(calm_needs, st.lists(st.tuples(minutes(720, 4000), minutes(1, 54)), max_size=12), st.data())
def test_an_outage_before_the_need_leaves_no_hole(needs: list[Span], steps: Steps, data: st.DataObject) -> None:
    """After any outage one try before the need is enough, and outages of up to 54 minutes always leave time for one."""
    done = run(needs)
    number = data.draw(st.integers(0, len(done) - 1))
    counted = done[number - 1].at + COUNTS if number else needs[0][0]
    outage = done[number].at, next(start for start, end in needs if end > counted) - 5 * MINUTE
    assert judge(needs, run(needs, None, [outage]))["uncovered"] == []
    short = spans(needs[0][0] - DAY, steps)
    assume(not any(start <= needs[0][0] - 2 * HOUR < end for start, end in short))
    assert judge(needs, run(needs, None, short))["uncovered"] == []


changes = st.sampled_from([kst("03-08 16:00"), kst("03-29 10:00"), kst("10-04 00:30"), kst("11-01 15:00")])
ZONES = [ZoneInfo(name) for name in ("Asia/Seoul", "America/New_York", "Europe/London", "Australia/Lord_Howe", "UTC")]


@steady
@given(
    st.builds(lambda at, before, pairs: spans(at - before, pairs), changes, minutes(0, 3000), steps),
    anchors,
    st.permutations(ZONES),
    minutes(-3000, 9000),
    minutes(0, 2000),
)
def test_the_zone_of_the_inputs_changes_nothing(
    needs: list[Span], anchor: time | None, zones: list[ZoneInfo], offset: timedelta, age: timedelta
) -> None:
    """Around changes to and from summer time, the same instants give the same decision in any zone."""
    now = needs[0][0] + offset
    elsewhere = [(start.astimezone(zones[0]), end.astimezone(zones[1])) for start, end in needs]
    planned = decide(now.astimezone(zones[2]), elsewhere, (now - age).astimezone(zones[3]), anchor)
    assert planned == decide(now, needs, now - age, anchor)
    assert planned is None or planned.at.tzinfo is UTC
    assert daily_anchor(needs) == daily_anchor(elsewhere)


@steady
@given(wild_needs)
def test_the_anchor_begins_the_longest_common_quiet(needs: list[Span]) -> None:
    """Counting every minute of the day finds the same anchor, or likewise that there is none."""
    busy: set[time] = set()
    for start, end in needs:
        minute = start.astimezone(KST).replace(second=0, microsecond=0)
        while minute < end:
            busy.add(minute.time())
            minute += MINUTE
    day = [time(*divmod(n % 1440, 60)) not in busy for n in range(2880)]
    runs = {n: day.index(False, n) - n for n in range(1440) if day[n] and not day[n - 1] and False in day[n:]}
    longest = max(runs.values(), default=0)
    if (anchor := daily_anchor(needs)) is None:
        assert longest <= 5
    else:
        assert runs[(anchor.hour * 60 + anchor.minute - 5) % 1440] == longest > 5


WEEKDAYS = [(kst(f"06-{day:02} 08:30"), kst(f"06-{day:02} 16:30")) for day in (1, 2, 3, 4, 5, 8, 9)]
LATE = "after the last issue, because 24 h would be too late for the need"
DAILY = "renews daily at 16:35 KST"
DECISIONS = {  # now, the last issue, when to renew, the reason, the exception; in cases named `lost` the token is
    "no token: at the anchor, so that it lasts": ("05-31 12:00", None, "05-31 16:35", DAILY, ""),
    "no token and the anchor is past": ("05-31 22:00", None, "05-31 22:00", DAILY, ""),
    "no token half an hour before a need": ("06-01 08:00", None, "06-01 08:00", "at once", ""),
    "no token in a need": ("06-01 10:00", None, "06-01 10:00", "needed since 06-01", "inside the need, because"),
    "a plain day": ("06-01 12:00", "05-31 16:35", "06-01 16:35:02", DAILY, ""),
    "the machine slept over the anchor": ("06-01 22:00", "05-31 16:35", "06-01 22:00", DAILY, ""),
    "a second too early": ("06-01 06:00", "05-31 16:34:59", "06-01 07:25", "ahead", f"14 h 50 min {LATE}"),
    "issued late": ("06-02 12:00", "06-01 21:00", "06-02 21:00:02", "renews 24 h after the last", ""),
    "issued at noon": ("06-01 12:00", "06-01 12:00", "06-02 07:25", "ahead", f"19 h 25 min {LATE}"),
    "the day after an exception": ("06-02 12:00", "06-02 07:25", "06-03 07:25:02", "24 h after the last issue", ""),
    "a healthy renewal on Friday: Sunday": (
        "06-05 17:00", "06-04 16:35", "06-07 16:35", f"{DAILY}; next needed 06-08 08:30 KST", "",
    ),
    "an issue in the future: unknown": ("06-01 12:00", "06-03 12:00", "06-03 16:35", DAILY, ""),
    "lost, six hours after the issue": ("06-01 10:00", "06-01 08:00", "06-01 14:00", "6 h after the last", "6 h "),
    "lost, for the next need": ("06-01 13:00", "06-01 11:00", "06-02 07:25", "ahead", "20 h "),
}  # fmt: skip


@pytest.mark.parametrize("case", DECISIONS)
def test_decisions(case: str) -> None:
    """With a need from 08:30 to 16:30 on weekdays, each decision is the one that the rule's text gives."""
    now, issued, at, reason, exception = DECISIONS[case]
    planned = decide(kst(now), WEEKDAYS, kst(issued) if issued else None, lost=case.startswith("lost"))
    assert planned == Renewal(kst(at), ANY, ANY if exception else None)
    assert reason in planned.reason
    assert exception in (planned.exception or "")


def test_the_quiet_before_a_need_is_preferred() -> None:
    """A renewal moves out of a served need into the quiet after it, and ahead of an anchor that is near a need."""
    needs = spans(kst("06-01 17:00"), [(5 * HOUR, 7 * HOUR), (3 * MINUTE, 1 * HOUR), (147 * MINUTE, 8 * HOUR)])
    now, end = kst("06-01 23:00"), kst("06-02 12:00")
    planned = next_renewal(now, needs, issued_at=None, expires_at=end, anchor=time(16, 35))
    assert planned == Renewal(kst("06-02 05:01:30"), ANY, None)
    assert decide(kst("05-31 12:00"), WEEKDAYS, None, time(8)) == Renewal(kst("05-31 16:35"), ANY, None)


def test_nothing_to_renew_for() -> None:
    """Without a need, or with a token that serves them all, nothing is due; without a quiet gap there is no anchor."""
    now = kst("06-01 12:00")
    assert decide(now, [], None) is next_renewal(now, WEEKDAYS, issued_at=now, expires_at=kst("07-01 12:00")) is None
    assert (daily_anchor([]), quiet_time([]), quiet_time([(now, now + DAY)])) == (None, None, None)
    assert quiet_time(WEEKDAYS) == (time(16, 30), time(8, 30))


def test_a_need_longer_than_a_token_is_chained_and_says_so() -> None:
    """56 hours take three tokens, each issued an hour before the last one ends; all three are exceptions."""
    done = run([(kst("06-01 08:30"), kst("06-03 16:30"))])
    assert [one.at for one in done] == [kst("06-01 07:30"), kst("06-02 06:30"), kst("06-03 05:30")]
    assert all("the need lasts 56 h, longer than one token" in str(one.exception) for one in done)


def test_a_longer_buffer_moves_the_anchor() -> None:
    """With a buffer of ten minutes, or 600 s, the anchor comes five later, and no day needs an exception."""
    plan = partial(renewals, kst("05-31 12:00"), WEEKDAYS, issued_at=None, expires_at=None, buffer=10 * MINUTE)
    assert daily_anchor(WEEKDAYS, buffer=10 * MINUTE) == daily_anchor(WEEKDAYS, buffer=600) == time(16, 40)
    done = plan(until=kst("06-09 12:00"))
    assert [one.exception for one in done] == [None] * 7
    assert plan(until=done[2].at, buffer=600.0) == done[:3]


WEEKS = {
    "a plain week has no issue on Saturday": (["KRX", "NASD"], "06-07", 8, "7 8 9 10 11 12 14"),
    "nor on Friday without New York": (["KRX"], "06-07", 8, "7 8 9 10 11 14"),
    "Lunar New Year in Seoul": (["KRX"], "02-08", 12, "8 9 10 11 12 18 19"),
    "New York rests on Monday 16 too": (["KRX", "NASD"], "02-08", 12, "8 9 10 11 12 13 17 18 19"),
    "DST begins": (ALL_BUT_NXT, "03-01", 18, ""),
    "DST ends": (ALL_BUT_NXT, "10-25", 18, ""),
    "an exam moves Korea's hours": (ALL_BUT_NXT, "11-08", 18, ""),
}


@pytest.mark.parametrize(("codes", "first", "days", "expected"), WEEKS.values(), ids=WEEKS)
def test_real_weeks(codes: list[str], first: str, days: int, expected: str) -> None:
    """There is one issue at the anchor before each need and none in holidays; a change of hours makes no exception."""
    now, issued, done = kst(f"{first} 12:00"), None, list[Renewal]()
    until = now + days * DAY
    while planned := decide(now, sessions.needs(codes, now - DAY, now + 14 * DAY), issued):
        if planned.at > until:
            break
        done.append(planned)
        now = issued = planned.at
    assert not any(judge(sessions.needs(codes, done[0].at, done[-1].at), done).values())
    assert [one.exception for one in done] == [None] * len(done)
    found = [one.at.astimezone(KST) for one in done]
    assert " ".join(str(at.day) for at in found) == expected or not expected
    assert not expected or {f"{at:%H:%M}" for at in found} == {"16:35"}


def test_anchors_of_real_exchanges() -> None:
    """The anchor lies in Korea's afternoon gap; with Korea open to 20:00, in winter's evening or summer's morning."""

    def anchor(codes: list[str], first: str, *, extended: bool = False) -> str:
        start, known = kst(f"{first} 00:00"), {"KRX": sessions.Override(extended=extended)}
        return f"{daily_anchor(sessions.needs(codes, start, start + 14 * DAY, known)):%H:%M}"

    for first in ("02-02", "07-06"):
        assert anchor(["KRX"], first) == anchor(["KRX", "NASD"], first) == "16:35"
        assert anchor(ALL_BUT_NXT, first) == "17:15"
    assert anchor(["KRX"], "11-10") == "17:35", "CSAT day is ahead"
    assert [anchor(ALL_BUT_NXT, first, extended=True) for first in ("12-01", "09-14")] == ["20:15", "05:05"]
