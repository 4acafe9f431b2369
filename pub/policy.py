"""When to renew a key's token: once a day, in the quiet time of its exchanges.

The rule is written as pure functions, without clock, files or network, so that anyone can simulate
it. Datetimes that go in must be aware, in any zone; those that come out are aware UTC. A need is a
time in which a token must be valid. `needs` is a sorted sequence of merged (start, end) pairs that
begins with the present need or earlier and reaches at least 14 days ahead; all other time is quiet.
"""

from __future__ import annotations

from bisect import bisect_right
from datetime import UTC, datetime, time, timedelta
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple

from tokencore.tokens import KST, SAME_TOKEN

if TYPE_CHECKING:
    from collections.abc import Sequence

    Needs = Sequence[tuple[datetime, datetime]]

BUFFER = timedelta(seconds=300)  # how long before its expiry a token no longer counts as valid
LIFE = timedelta(hours=24)  # the life of a token yet to be issued; for the present one its own expiry counts
LEAD = timedelta(minutes=60)  # time before a need or an expiry for an outage of KIS to pass
ONE_A_DAY = LIFE + timedelta(seconds=2)  # between issues; two extra seconds because KIS truncates times to seconds
SETTLE = timedelta(minutes=5)  # wait after a need; as long as the buffer, so that the next day is fully served
CLOCK_SLACK = timedelta(seconds=30)  # tolerated between two clocks: an issue this far ahead of now is believed

_DAY, _MINUTE, _MINUTES_A_DAY = timedelta(days=1), timedelta(minutes=1), 1440
_EPOCH = datetime(1970, 1, 1, tzinfo=KST)
_LONG_AGO = datetime.min.replace(tzinfo=UTC)
_start, _end = itemgetter(0), itemgetter(1)


class Renewal(NamedTuple):
    """One issue that is planned or due.

    Attributes:
        at: when, aware UTC; never before the given `now`, and equal to it if the renewal is due.
        reason: one line for people: the clause of the rule, and when the token is needed next.
        exception: one line on what is exceptional, and why; None if `at` is 24 hours or more after the last issue and
            outside all needs, and the new token lasts through the next need.
    """

    at: datetime
    reason: str
    exception: str | None


def daily_anchor(needs: Needs, *, buffer: timedelta | float = BUFFER) -> time | None:
    """Return the minute of the day (KST) at which a renewal disturbs no need on any day of the horizon.

    It is five minutes (or the buffer, if that is longer) after the start of the longest time of
    day that is quiet on all days. None if there is no such time, or no need at all.
    """
    delay = -(-max(SETTLE, _span(buffer)) // _MINUTE)
    length, begins = _longest_gap(needs)
    return _of_day(begins + delay) if length > delay else None


def quiet_time(needs: Needs) -> tuple[time, time] | None:
    """Return start and end (KST) of the longest time of day that is quiet on all days; None without one, or needs."""
    length, begins = _longest_gap(needs)
    return (_of_day(begins), _of_day(begins + length)) if length else None


def next_renewal(
    now: datetime,
    needs: Needs,
    *,
    issued_at: datetime | None,
    expires_at: datetime | None,
    anchor: time | None = None,
    buffer: timedelta | float = BUFFER,
) -> Renewal | None:
    """Return the next issue for a key; None if the present token serves every known need.

    Args:
        now: the moment of the decision.
        needs: when a token must be valid.
        issued_at: the key's last issue, even if its token is lost; None if unknown.
        expires_at: the present token's expiry; None without a usable token.
        anchor: the result of `daily_anchor`, for callers that keep it; None derives it.
        buffer: time before the expiry in which the token no longer counts, less than an hour; a number means seconds.

    Raises:
        TypeError: a datetime without a time zone was compared with one of `needs`.
    """
    buffer = _span(buffer)
    if anchor is None:
        anchor = daily_anchor(needs, buffer=buffer)
    served = now if expires_at is None else max(now, expires_at - buffer)
    past = _Past.of(now, issued_at, expires_at)
    for index in range(bisect_right(needs, served, key=_end), len(needs)):
        window = _Window.of(needs, index, buffer)
        at, why = _moment(past, window, needs[:index], anchor)
        if at < window.end:  # otherwise the six hours end after this need, which no new token can serve
            return _renewal(at, why, past, window)
    return None


def renewals(
    now: datetime,
    needs: Needs,
    *,
    until: datetime,
    issued_at: datetime | None,
    expires_at: datetime | None,
    anchor: time | None = None,
    buffer: timedelta | float = BUFFER,
) -> list[Renewal]:
    """Return all renewals up to `until`, assuming that each succeeds on time and its token lives for 24 hours."""
    found: list[Renewal] = []
    while planned := next_renewal(now, needs, issued_at=issued_at, expires_at=expires_at, anchor=anchor, buffer=buffer):
        if planned.at > until:
            break
        found.append(planned)
        now = issued_at = planned.at
        expires_at = planned.at + LIFE
    return found


class _Past(NamedTuple):
    """Now and the last issue, in UTC; KIS issues another token from `allowed` on, the rule asks from `regular` on."""

    now: datetime
    issued: datetime | None
    expires: datetime | None
    allowed: datetime
    regular: datetime

    @classmethod
    def of(cls, now: datetime, issued: datetime | None, expires: datetime | None) -> _Past:
        now = now.astimezone(UTC)
        expires = expires and expires.astimezone(UTC)
        # An issue in the future comes from a wrong clock; believing it could stop all renewals for a long time.
        if issued is None or issued > now + CLOCK_SLACK:
            return cls(now, None, expires, _LONG_AGO, _LONG_AGO)
        issued = issued.astimezone(UTC)
        return cls(now, issued, expires, issued + SAME_TOKEN, issued + ONE_A_DAY)


class _Window(NamedTuple):
    """One need, in UTC. A token issued before `earliest` does not last through it.

    After `latest` there is too little time left for an outage of KIS to pass. If `latest` is less than 24 hours after
    the last issue, the issue comes at `early`, a bit sooner than necessary, so that the following days, each some
    seconds later, need no exception.
    """

    start: datetime
    end: datetime
    quiet: datetime
    earliest: datetime
    latest: datetime
    early: datetime
    too_long: bool  # no single token lasts through it

    @classmethod
    def of(cls, needs: Needs, index: int, buffer: timedelta) -> _Window:
        start, end = (moment.astimezone(UTC) for moment in needs[index])
        quiet = needs[index - 1][1].astimezone(UTC) if index else start - _DAY
        earliest = end + buffer - LIFE
        lead = min(LEAD, (start - quiet) / 2)
        too_long = earliest > start
        latest, early = (at if too_long else max(earliest, at) for at in (start - lead, start - lead * 13 / 12))
        return cls(start, end, quiet, earliest, latest, early, too_long)


def _moment(past: _Past, window: _Window, earlier: Needs, anchor: time | None) -> tuple[datetime, str]:
    """Return when to issue for the first need that the present token does not serve, and the clause that says so."""
    at_once = past.now, "renews at once"
    allowed = past.allowed, "renews as soon as KIS gives a new token, 6 h after the last issue"
    if window.too_long and past.expires and past.expires - LEAD > window.latest:
        return max((past.expires - LEAD, "renews an hour before the token expires"), allowed, at_once)
    at, why = _ideal(window, anchor)
    if past.regular > at:  # usually a daily renewal, some seconds later than the day before
        why = f"{why}, 24 h after the last issue" if past.regular - at < LEAD else "renews 24 h after the last issue"
    at = max(at, past.regular, past.now)  # one that is due still says "daily"; only one past `latest` says otherwise
    if (quiet := _quiet(at, earlier, window)) != at:
        at, why = quiet, "renews after the session"
    if at > window.latest:
        return max((window.early, "renews ahead of the session"), allowed, at_once)
    return at, why


def _ideal(window: _Window, anchor: time | None) -> tuple[datetime, str]:
    """Return when to issue if no issue had come before: at the anchor if its token lasts, else early in the quiet."""
    if anchor is not None:
        at = datetime.combine(window.latest.astimezone(KST), anchor, KST).astimezone(UTC)
        if at > window.latest:
            at -= _DAY
        if at >= window.earliest:
            return at, f"renews daily at {anchor:%H:%M} KST"
    return min(max(window.earliest, window.quiet + SETTLE), window.latest), "renews in the quiet before the session"


def _quiet(at: datetime, earlier: Needs, window: _Window) -> datetime:
    """Return `at`, or the quiet moment after it if an issue at `at` would disturb one of the `earlier` needs."""
    index = bisect_right(earlier, at, key=_end)
    if index == len(earlier) or at < earlier[index][0]:
        return at
    end = earlier[index][1].astimezone(UTC)
    follows = earlier[index + 1][0] if index + 1 < len(earlier) else window.start
    return end + min(SETTLE, (follows - end) / 2)


def _renewal(at: datetime, why: str, past: _Past, window: _Window) -> Renewal:
    needed = "needed since" if window.start <= at else "next needed"
    found = []
    if window.too_long:
        found.append(f"the need lasts {_hours(window.end - window.start)}, longer than one token")
    if past.issued and at < past.issued + _DAY:
        age = _hours(at - past.issued)
        found.append(f"{age} after the last issue, because 24 h would be too late for the need")
    if at >= window.start:
        found.append("inside the need, because no token serves it to its end")
    reason = f"{why}; {needed} {window.start.astimezone(KST):%m-%d %H:%M} KST"
    return Renewal(at, reason, "; ".join(found) or None)


def _span(buffer: timedelta | float) -> timedelta:
    return buffer if isinstance(buffer, timedelta) else timedelta(seconds=buffer)


def _hours(span: timedelta) -> str:
    hours, minutes = divmod(span // _MINUTE, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def _of_day(minute: int) -> time:
    return time(*divmod(minute % _MINUTES_A_DAY, 60))


def _longest_gap(needs: Needs) -> tuple[int, int]:
    """Return the longest time of day that no need touches, as (length, begin) in minutes of the KST day; or zeros."""
    spans = {((start - _EPOCH) // _MINUTE, -((_EPOCH - end) // _MINUTE)) for start, end in needs}
    # Minutes since midnight KST; an end after midnight counts on past the day's last minute instead of wrapping.
    busy = sorted({(begin % _MINUTES_A_DAY, begin % _MINUTES_A_DAY + end - begin) for begin, end in spans})
    if not busy:
        return 0, 0
    covered = max(busy[0][0], max(end for _, end in busy) - _MINUTES_A_DAY)
    longest = 0, 0
    for start, end in [*busy, (busy[0][0] + _MINUTES_A_DAY, 0)]:
        longest = max(longest, (start - covered, covered), key=_start)
        covered = max(covered, end)
    return longest
