"""The renewal rule: properties over random needs, and decisions that a person can check by hand."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime, time, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from zoneinfo import ZoneInfo

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tokencore import sessions
from tokencore.policy import Renewal, daily_anchor, next_renewal, quiet_time, renewals, retry_delay, serves_until
from tokencore.tokens import KST

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Span = tuple[datetime, datetime]
    Policy = Callable[[datetime, Sequence[Span], datetime | None, datetime | None], Renewal | None]

ROOT = Path(__file__).parents[1]
MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
LIFE = timedelta(hours=24)
COUNTS = LIFE - timedelta(seconds=300)  # how long a token serves: its life less the buffer
ALL_BUT_NXT = [code for code in sessions.EXCHANGES if code != "NXT"]
ZONES = ["Asia/Seoul", "America/New_York", "Europe/London", "Australia/Lord_Howe", "UTC"]

steady = settings(
    derandomize=True,  # the same examples on every run
    database=None,
    deadline=None,
    max_examples=300,
    suppress_health_check=[HealthCheck.too_slow],
)


def kst(text: str) -> datetime:
    """A moment of 2026, written as `06-01 16:35` or `06-01 16:35:02` in KST."""
    return datetime.fromisoformat(f"2026-{text}").replace(tzinfo=KST).astimezone(UTC)


def spans(start: datetime, steps: list[tuple[timedelta, timedelta]]) -> list[Span]:
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
quiet = minutes(1, 9) | minutes(1, 4000)
steps = st.lists(st.tuples(quiet, minutes(1, 2400)), min_size=1, max_size=12)
wild_needs = st.builds(spans, starts, steps)
"""Anything: a minute of quiet, needs of a minute or of 40 hours."""

calm_steps = st.lists(st.tuples(minutes(120, 4000), minutes(1, 960)), min_size=1, max_size=12)
calm_needs = st.builds(spans, starts, calm_steps)
"""What exchanges are like: two quiet hours or more before each need, no need above 16 hours."""

anchors = st.none() | st.times().map(lambda at: at.replace(microsecond=0))
"""Derived, or whatever a caller may have kept from some other horizon."""


class Faults(NamedTuple):
    """What a run did wrong: the needs or the issues concerned."""

    uncovered: list[Span]
    too_soon: list[datetime]
    unrecorded: list[datetime]
    disturbing: list[datetime]


def rule(anchor: time | None) -> Policy:
    """The rule under test, with an anchor that the caller kept."""
    return lambda now, needs, issued, expires: next_renewal(
        now, needs, issued_at=issued, expires_at=expires, anchor=anchor
    )


def run(needs: list[Span], policy: Policy, outages: Sequence[Span] = ()) -> list[Renewal]:
    """A program that starts two hours before the first need, issues when due and backs off after failures."""
    now, issued, expires, failures = needs[0][0] - 2 * HOUR, None, None, 0
    done: list[Renewal] = []
    while planned := policy(now, needs, issued, expires):
        now = planned.at
        if any(start <= now < end for start, end in outages):
            failures += 1
            now += retry_delay(failures)
            continue
        done.append(planned)
        issued, expires, failures = now, now + LIFE, 0
        assert len(done) < 1000, "the policy never comes to an end"
    return done


def judge(needs: list[Span], done: list[Renewal]) -> Faults:
    """Hold a run against the promises, without any of the rule's own arithmetic."""
    issues = [one.at for one in done]
    pairs = list(zip([datetime(1, 1, 3, tzinfo=UTC), *issues], done, strict=False))
    return Faults(
        uncovered=[need for need in needs if not _covered(*need, issues)],
        too_soon=[one.at for last, one in pairs if one.at < last + 6 * HOUR],
        unrecorded=[one.at for last, one in pairs if one.at < last + DAY and not one.exception],
        disturbing=[
            one.at
            for last, one in pairs
            for start, end in needs
            if start < one.at < end and _needless(last, start, end)
        ],
    )


def _needless(last: datetime, start: datetime, end: datetime) -> bool:
    """Whether an issue inside a need could have been spared: by the last token or by one before it."""
    return last + COUNTS >= end or max(last + 6 * HOUR, end - COUNTS) <= start


def _covered(start: datetime, end: datetime, issues: list[datetime]) -> bool:
    for at in issues:
        if at <= start < at + COUNTS:
            start = at + COUNTS
    return start >= end


@steady
@given(wild_needs, anchors)
def test_every_need_is_covered_while_kis_is_up(needs: list[Span], anchor: time | None) -> None:
    """Whatever the needs, and whatever anchor the caller kept, a token is there from start to end."""
    assert judge(needs, run(needs, rule(anchor))).uncovered == []


@steady
@given(wild_needs, anchors)
def test_no_issue_disturbs_a_need_that_could_do_without(needs: list[Span], anchor: time | None) -> None:
    """A token changes inside a need only if no token from before it could have lasted to its end."""
    assert judge(needs, run(needs, rule(anchor))).disturbing == []


outages = st.lists(st.tuples(minutes(0, 1200), minutes(1, 900)), max_size=8)


@steady
@given(wild_needs, anchors, outages)
def test_six_hours_lie_between_issues(
    needs: list[Span], anchor: time | None, faulty: list[tuple[timedelta, timedelta]]
) -> None:
    """KIS is never asked while it would hand back the same token, outages or not."""
    assert judge(needs, run(needs, rule(anchor), spans(needs[0][0] - DAY, faulty))).too_soon == []


@steady
@given(wild_needs, anchors, outages)
def test_a_day_lies_between_issues_or_an_exception_is_recorded(
    needs: list[Span], anchor: time | None, faulty: list[tuple[timedelta, timedelta]]
) -> None:
    """No second issue within 24 hours goes without a sentence that says why, outages or not."""
    assert judge(needs, run(needs, rule(anchor), spans(needs[0][0] - DAY, faulty))).unrecorded == []


@steady
@given(wild_needs, anchors, outages)
def test_no_exception_means_what_it_says(
    needs: list[Span], anchor: time | None, faulty: list[tuple[timedelta, timedelta]]
) -> None:
    """Without an exception no need is going on, and the token lasts through the one it is meant for."""
    last = datetime.min.replace(tzinfo=UTC)
    for one in run(needs, rule(anchor), spans(needs[0][0] - DAY, faulty)):
        start, end = next(need for need in needs if need[1] > max(one.at, last + COUNTS))
        assert one.at + COUNTS >= end or "longer than one token" in str(one.exception)
        assert one.at <= start or "inside the need" in str(one.exception)
        last = one.at


@steady
@given(wild_needs, anchors, minutes(-3000, 9000), st.none() | minutes(0, 2000), minutes(-100, 9000))
def test_a_decision_lies_ahead_and_leaves_served_needs_alone(
    needs: list[Span], anchor: time | None, offset: timedelta, age: timedelta | None, left: timedelta
) -> None:
    """Whatever the token's age and life, even unknown or odd: never in the past nor inside a served need."""
    now = needs[0][0] + offset
    planned = rule(anchor)(now, needs, None if age is None else now - age, now + left)
    if planned:
        assert planned.at >= now
        assert not any(start < planned.at < end <= serves_until(now + left) for start, end in needs)


@steady
@given(calm_needs, st.data())
def test_an_outage_that_ends_before_the_need_leaves_no_hole(needs: list[Span], data: st.DataObject) -> None:
    """KIS may fail from any planned renewal on: one retry before the need is enough, that day and after."""
    done = run(needs, rule(None))
    number = data.draw(st.integers(0, len(done) - 1))
    counted = done[number - 1].at + COUNTS if number else needs[0][0]
    start = next(start for start, end in needs if end > counted)
    outage = done[number].at, start - 5 * MINUTE
    assert judge(needs, run(needs, rule(None), [outage])).uncovered == []


@steady
@given(calm_needs, st.lists(st.tuples(minutes(720, 4000), minutes(1, 54)), max_size=12))
def test_outages_shorter_than_the_lead_leave_no_hole(
    needs: list[Span], faulty: list[tuple[timedelta, timedelta]]
) -> None:
    """However often KIS fails for up to 54 minutes, the 60 minutes before each need are enough."""
    outages = spans(needs[0][0] - DAY, faulty)
    assume(not any(start <= needs[0][0] - 2 * HOUR < end for start, end in outages))
    assert judge(needs, run(needs, rule(None), outages)).uncovered == []


@steady
@given(wild_needs, anchors, st.data())
def test_asking_again_before_the_time_changes_nothing(
    needs: list[Span], anchor: time | None, data: st.DataObject
) -> None:
    """A plan holds until it is due, so that hourly runs and a waiting one come to the same issue."""
    now, issued = needs[0][0] - 3 * DAY, None
    while planned := rule(anchor)(now, needs, issued, issued and issued + LIFE):
        later = data.draw(st.floats(0, 1)) * (planned.at - now) + now
        again = rule(anchor)(later, needs, issued, issued and issued + LIFE)
        assert again
        assert again.at == planned.at
        now = issued = planned.at


changes = st.sampled_from([kst("03-08 16:00"), kst("03-29 10:00"), kst("10-04 00:30"), kst("11-01 15:00")])


@steady
@given(
    st.builds(lambda at, before, pairs: spans(at - before, pairs), changes, minutes(0, 3000), steps),
    anchors,
    st.lists(st.sampled_from(ZONES), min_size=4, max_size=4),
    st.data(),
)
def test_the_zone_of_the_inputs_changes_nothing(
    needs: list[Span], anchor: time | None, zones: list[str], data: st.DataObject
) -> None:
    """Around changes to and from summer time the same instants give the same decision, in any zones."""
    a, b, c, d = (ZoneInfo(zone) for zone in zones)
    now = needs[0][0] + data.draw(minutes(-3000, 9000))
    issued = now - data.draw(minutes(0, 2000))
    elsewhere = [(start.astimezone(a), end.astimezone(b)) for start, end in needs]
    planned = rule(anchor)(now.astimezone(c), elsewhere, issued.astimezone(d), (issued + LIFE).astimezone(a))
    assert planned == rule(anchor)(now, needs, issued, issued + LIFE)
    assert planned is None or planned.at.tzinfo is UTC
    assert daily_anchor(needs) == daily_anchor(elsewhere)


@steady
@given(wild_needs)
def test_the_anchor_begins_the_longest_common_quiet(needs: list[Span]) -> None:
    """Counting every minute of the day by hand gives the anchor, or as well that there is none."""
    busy: set[time] = set()
    for start, end in needs:
        minute = start.astimezone(KST).replace(second=0, microsecond=0)
        while minute < end:
            busy.add(minute.time())
            minute += MINUTE
    day = [time(*divmod(n % 1440, 60)) not in busy for n in range(2880)]
    begins = [n for n in range(1440) if day[n] and not day[n - 1] and False in day[n:]]
    runs = {n: day.index(False, n) - n for n in begins}
    longest = max(runs.values(), default=0)
    anchor = daily_anchor(needs)
    if anchor is None:
        assert longest <= 5
    else:
        assert runs[(anchor.hour * 60 + anchor.minute - 5) % 1440] == longest > 5


class Case(NamedTuple):
    """A decision on weekdays with a need from 08:30 to 16:30 KST, hence with the anchor at 16:35."""

    now: str
    issued: str | None
    at: str
    exception: str | None = None
    lost: bool = False


WEEKDAYS = [(kst(f"06-{day:02} 08:30"), kst(f"06-{day:02} 16:30")) for day in (1, 2, 3, 4, 5, 8, 9)]
TOO_LATE = "after the last issue, because 24 h would be too late for the need"
CASES = {
    "no token and a need tomorrow: at the anchor, so that the token lasts": Case(
        now="05-31 12:00", issued=None, at="05-31 16:35"
    ),
    "no token and the anchor is past: now": Case(now="05-31 22:00", issued=None, at="05-31 22:00"),
    "no token half an hour before a need: now": Case(now="06-01 08:00", issued=None, at="06-01 08:00"),
    "no token inside a need: now": Case(
        now="06-01 10:00", issued=None, at="06-01 10:00", exception="inside the need, because no token"
    ),
    "a token lost after two hours: when KIS gives another": Case(
        now="06-01 10:00", issued="06-01 08:00", at="06-01 14:00", exception=f"6 h {TOO_LATE}", lost=True
    ),
    "a token lost too late to save the need: for the next one": Case(
        now="06-01 13:00", issued="06-01 11:00", at="06-02 07:25", exception=TOO_LATE, lost=True
    ),
    "a plain day: 24 hours and two seconds after the last": Case(
        now="06-01 12:00", issued="05-31 16:35", at="06-01 16:35:02"
    ),
    "a token that ends a second before the need does: not served": Case(
        now="06-01 06:00", issued="05-31 16:34:59", at="06-01 07:25", exception=f"14 h 50 min {TOO_LATE}"
    ),
    "the machine slept over the anchor: now": Case(now="06-01 22:00", issued="05-31 16:35", at="06-01 22:00"),
    "issued late: a day after that all the same": Case(now="06-02 12:00", issued="06-01 21:00", at="06-02 21:00:02"),
    "issued by hand at noon: an hour before the need that it fails": Case(
        now="06-01 12:00", issued="06-01 12:00", at="06-02 07:25", exception=f"19 h 25 min {TOO_LATE}"
    ),
    "the day after an exception: no further one": Case(now="06-02 12:00", issued="06-02 07:25", at="06-03 07:25:02"),
    "Friday after the close: Sunday will do": Case(now="06-05 17:00", issued="06-04 16:35", at="06-07 16:35"),
    "an issue in the future, by a wrong clock: as if unknown": Case(
        now="06-01 12:00", issued="06-03 12:00", at="06-03 16:35"
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_decisions(case: Case) -> None:
    """Each decision can be checked by hand against the rule's text."""
    issued = case.issued and kst(case.issued)
    planned = next_renewal(
        kst(case.now),
        WEEKDAYS,
        issued_at=issued or None,
        expires_at=issued + LIFE if issued and not case.lost else None,
    )
    assert planned
    assert planned.at == kst(case.at)
    assert (planned.exception is None) == (case.exception is None)
    assert (case.exception or "") in (planned.exception or "")


def test_an_overdue_renewal_waits_for_the_end_of_a_served_need() -> None:
    """Inside a need that the token serves there is no hurry: half of the three quiet minutes after it will do."""
    pairs = [(5 * HOUR, 7 * HOUR), (3 * MINUTE, 1 * HOUR), (147 * MINUTE, 8 * HOUR)]
    needs = spans(kst("06-01 17:00"), pairs)
    planned = next_renewal(
        kst("06-01 23:00"), needs, issued_at=None, expires_at=kst("06-02 12:00"), anchor=time(16, 35)
    )
    assert planned
    assert (planned.at, planned.exception) == (kst("06-02 05:01:30"), None)


def test_an_anchor_too_near_a_need_is_not_waited_for() -> None:
    """An anchor kept from other hours, half an hour before the need: the quiet of the day before is better."""
    planned = next_renewal(kst("05-31 12:00"), WEEKDAYS, issued_at=None, expires_at=None, anchor=time(8))
    assert planned
    assert planned.at == kst("05-31 16:35")


def test_nothing_to_renew_for() -> None:
    """Without a need, or with a token that serves them all, there is no renewal and no anchor."""
    now, later = kst("06-01 12:00"), kst("07-01 12:00")
    assert next_renewal(now, [], issued_at=None, expires_at=None) is None
    assert next_renewal(now, WEEKDAYS, issued_at=now, expires_at=later) is None
    assert daily_anchor([]) is None
    assert quiet_time([]) is None


def test_the_quiet_time_that_the_anchor_lies_in() -> None:
    """From the end of the needs to their start, in KST, over midnight too; none if a need outlasts a day."""
    assert quiet_time(WEEKDAYS) == (time(16, 30), time(8, 30))
    assert quiet_time([(kst("06-01 08:30"), kst("06-02 08:30"))]) is None


def test_a_need_longer_than_a_token_is_chained_and_says_so() -> None:
    """56 hours take three tokens, each an hour before the last one ends; all three are exceptions."""
    need = kst("06-01 08:30"), kst("06-03 16:30")
    assert daily_anchor([need]) is None
    done = run([need], rule(None))
    assert [one.at for one in done] == [kst("06-01 07:30"), kst("06-02 06:30"), kst("06-03 05:30")]
    assert all("the need lasts 56 h, longer than one token" in str(one.exception) for one in done)
    assert judge([need], done).uncovered == []


def test_a_longer_buffer_moves_the_anchor() -> None:
    """With a buffer of ten minutes the anchor comes later by as much, and no day needs an exception."""
    buffer = 10 * MINUTE
    assert daily_anchor(WEEKDAYS, buffer=buffer) == time(16, 40)
    done = renewals(
        kst("05-31 12:00"), WEEKDAYS, until=kst("06-09 12:00"), issued_at=None, expires_at=None, buffer=buffer
    )
    assert [one.exception for one in done] == [None] * 7


def test_a_time_without_a_zone_is_refused() -> None:
    """A naive time is an error and never taken for the machine's own zone."""
    with pytest.raises(TypeError):
        next_renewal(datetime(2026, 6, 1, 12), WEEKDAYS, issued_at=None, expires_at=None)  # noqa: DTZ001


def test_back_off_after_failures() -> None:
    """Three retries after 65 seconds, which is past KIS's minute, then one every five minutes."""
    assert [retry_delay(n).seconds for n in (1, 2, 3, 4, 50)] == [65, 65, 65, 300, 300]


def test_a_token_serves_until_its_buffer() -> None:
    """A need must have ended five minutes before the expiry."""
    assert serves_until(kst("06-01 16:35")) == kst("06-01 16:30")


def live(codes: list[str], first: str, days: int) -> list[Renewal]:
    """What a program with a horizon of 14 days does from that day of 2026 on, starting at noon KST."""
    now, issued = kst(f"{first} 12:00"), None
    done: list[Renewal] = []
    until = now + days * DAY
    while planned := rule(None)(
        now, sessions.needs(codes, now - DAY, now + 14 * DAY), issued, issued and issued + LIFE
    ):
        if planned.at > until:
            break
        done.append(planned)
        now = issued = planned.at
    assert [one.exception for one in done] == [None] * len(done)
    return done


def written(done: list[Renewal]) -> str:
    """Renewals as `Sun 07 16:35`, one after the other, in KST."""
    return ", ".join(f"{one.at.astimezone(KST):%a %d %H:%M}" for one in done)


def test_a_plain_week_has_no_issue_on_saturday() -> None:
    """The token of Friday serves New York's Friday, and nobody needs one before Monday's first open."""
    expected = "Sun 07 16:35, Mon 08 16:35, Tue 09 16:35, Wed 10 16:35, Thu 11 16:35, Fri 12 16:35, Sun 14 16:35"
    assert written(live(["KRX", "NASD"], "06-07", 8)) == expected
    assert written(live(["KRX"], "06-07", 8)) == expected.replace("Fri 12 16:35, ", "")


def test_lunar_new_year() -> None:
    """In 2026 KRX rests from Saturday 14 to Wednesday 18 February, New York on Monday 16 too."""
    expected = "Wed 11 16:35, Thu 12 16:35, {}Wed 18 16:35, Thu 19 16:35"
    assert written(live(["KRX"], "02-08", 12)[3:]) == expected.format("")
    assert written(live(["KRX", "NASD"], "02-08", 12)[3:]) == expected.format("Fri 13 16:35, Tue 17 16:35, ")


def test_the_turn_of_the_year() -> None:
    """KRX closes on 31 December and opens at 10:00 on Monday 4 January: no issue for four days."""
    assert written(live(["KRX"], "12-27", 9)) == "Sun 27 16:35, Mon 28 16:35, Tue 29 16:35, Sun 03 16:35, Mon 04 16:35"


@pytest.mark.parametrize("first", ["03-01", "10-25", "11-08"], ids=["DST begins", "DST ends", "CSAT day"])
@pytest.mark.parametrize("codes", [["NASD"], ["KRX", "NASD"], ALL_BUT_NXT], ids=len)
def test_a_change_of_hours_makes_no_exception(codes: list[str], first: str) -> None:
    """The anchor moves with the hours, and every need is covered by one issue a day all the same."""
    done = live(codes, first, 18)
    needs = sessions.needs(codes, done[0].at, done[-1].at)
    assert judge(needs, done) == Faults([], [], [], [])


def test_anchors_of_real_exchanges() -> None:
    """The anchor lies in the afternoon gap of Korea, which lengthens with what else is traded."""

    def anchor(codes: list[str], first: datetime) -> time | None:
        return daily_anchor(sessions.needs(codes, first, first + 14 * DAY))

    for first in kst("02-02 00:00"), kst("07-06 00:00"):
        assert anchor(["KRX"], first) == anchor(["KRX", "NASD"], first) == time(16, 35)
        assert anchor(ALL_BUT_NXT, first) == time(17, 15)
    assert anchor(["KRX"], kst("11-10 00:00")) == time(17, 35), "CSAT day is ahead"


def test_anchor_with_korea_until_evening() -> None:
    """With an after-market to 20:00, the evening is the longest quiet in winter, the morning in summer."""
    evening = {"KRX": sessions.Override(extended=True)}
    winter = sessions.needs(ALL_BUT_NXT, kst("12-01 00:00"), kst("12-15 00:00"), evening)
    summer = sessions.needs(ALL_BUT_NXT, kst("09-14 00:00"), kst("09-28 00:00"), evening)
    assert (daily_anchor(winter), daily_anchor(summer)) == (time(20, 15), time(5, 5))


def on_demand(now: datetime, needs: Sequence[Span], _: object, expires: datetime | None) -> Renewal | None:
    """Issues when a token is wanted and none counts."""
    counted = max(now, expires - 5 * MINUTE) if expires else now
    return next((Renewal(max(start, counted), "", None) for start, end in needs if end > counted), None)


def daily_at_eight(now: datetime, needs: Sequence[Span], *_: object) -> Renewal | None:
    """Issues at 08:00 KST, whatever is needed."""
    at = datetime.combine(now.astimezone(KST) - 8 * HOUR, time(8), KST) + DAY
    return Renewal(at, "", None) if at < needs[-1][1] else None


def at_both_ends(now: datetime, needs: Sequence[Span], *_: object) -> Renewal | None:
    """Issues two minutes before every open and every close, without a thought to the last issue."""
    edges = (edge - 2 * MINUTE for need in needs for edge in need)
    return next((Renewal(edge, "", None) for edge in edges if edge > now), None)


@pytest.mark.parametrize(
    ("policy", "fault"),
    [
        (on_demand, "disturbing"),
        (daily_at_eight, "uncovered"),
        (at_both_ends, "too_soon"),
        (at_both_ends, "unrecorded"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_the_judge_finds_wrong_policies(policy: Policy, fault: str) -> None:
    """The judge of the properties above convicts policies that break a promise, and acquits the rule."""
    needs = spans(kst("03-05 16:30"), [(6 * HOUR + 30 * MINUTE, 7 * HOUR), (2 * HOUR, 8 * HOUR)] * 3)
    needs = [*needs, (kst("03-08 22:00"), kst("03-09 05:00"))]
    assert getattr(judge(needs, run(needs, policy)), fault)
    assert judge(needs, run(needs, rule(None))) == Faults([], [], [], [])


def test_eleven_years() -> None:
    """From 2016 to 2026 the benchmark finds what the rule promises, for four sets of exchanges."""
    program = [sys.executable, str(ROOT / "benchmarks" / "renewal_rule.py")]
    table = subprocess.run(program, check=True, capture_output=True, encoding="utf-8").stdout
    found = [line.strip("| ").split(" | ") for line in table.splitlines() if "anchored" in line]
    allowed = {
        "KRX": (246, 0.02),
        "KRX and US": (308, 0.02),
        "all regular sessions": (312, 0.02),
        "all, Korea to 20:00": (312, 0.15),
    }
    assert [name for name, *_ in found] == list(allowed)
    for name, _, a_year, most, inside, uncovered, hit in found:
        assert float(a_year) <= allowed[name][0]
        assert (most, inside, uncovered) == ("1", "0.0", "0")
        assert float(hit.rstrip("%")) <= allowed[name][1]
