"""When to renew a key's token: once a day, in the quiet time of its exchanges.

The rule as pure functions, so that anyone can simulate it: no clock, no files, no network. All
datetimes that go in must be aware, in any zone; those that come out are aware UTC. A need is a
time in which a token must be valid. `needs` is a sorted sequence of merged (start, end) pairs,
from the present one, or earlier, to 14 days ahead or more; the time outside them is quiet.
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

BUFFER = timedelta(seconds=300)  # before its expiry a token no longer counts as valid
LIFE = timedelta(hours=24)  # of a token still to be issued; of the present one its own expiry counts
LEAD = timedelta(minutes=60)  # before a need or an expiry: time for an outage of KIS to pass
ONE_A_DAY = LIFE + timedelta(seconds=2)  # between issues; two more, as KIS cuts times to the second
SETTLE = timedelta(minutes=5)  # after a need; the buffer's length, so that the next day is served whole
MINUTE = 60.0  # seconds: KIS refuses a second request for a token within it
CLOCK_SLACK = timedelta(seconds=30)  # of two clocks: an issue so little ahead of now is believed, a need's pad hides it

_DAY, _MINUTE, _MINUTES_A_DAY = timedelta(days=1), timedelta(minutes=1), 1440
_EPOCH = datetime(1970, 1, 1, tzinfo=KST)
_LONG_AGO = datetime.min.replace(tzinfo=UTC)
_start, _end = itemgetter(0), itemgetter(1)


class Renewal(NamedTuple):
    """One issue that is planned or due.

    Attributes:
        at: when, aware UTC; not before the `now` that was asked about, and equal to it when due.
        reason: for people, one line: by which clause of the rule, and when the token is needed next.
        exception: what is different, and why, in a line; None if `at` is 24 hours or more after the last issue and
            outside all needs, and the new token lasts through the next one.

    """

    at: datetime
    reason: str
    exception: str | None


def daily_anchor(needs: Needs, *, buffer: timedelta = BUFFER) -> time | None:
    """The minute of the day, in KST, at which a renewal disturbs no need on any day of the horizon.

    It lies five minutes (or the buffer, if that is longer) after the start of the longest time of
    day that is quiet on all days. None if there is no such time, or no need at all.
    """
    delay = -(-max(SETTLE, buffer) // _MINUTE)
    length, begins = _longest_gap(needs)
    return _of_day(begins + delay) if length > delay else None


def quiet_time(needs: Needs) -> tuple[time, time] | None:
    """The longest time of day, from and to in KST, that is quiet on all days; None if there is none, or no need."""
    length, begins = _longest_gap(needs)
    return (_of_day(begins), _of_day(begins + length)) if length else None


def retry_delay(failures: int, interval: float = MINUTE) -> timedelta:
    """How long to leave KIS alone after so many failures in a row: 65 s three times, then 5 min.

    The waits stretch and shrink with the issue interval (seconds), of which KIS's is 60.
    """
    return timedelta(seconds=65 if failures <= 3 else 300) * (interval / MINUTE)  # noqa: PLR2004 - three times


def next_renewal(
    now: datetime,
    needs: Needs,
    *,
    issued_at: datetime | None,
    expires_at: datetime | None,
    anchor: time | None = None,
    buffer: timedelta = BUFFER,
) -> Renewal | None:
    """The next issue for a key; None if the present token serves every need that is known.

    Args:
        now: the moment of the decision.
        needs: when a token must be valid.
        issued_at: the key's last issue, even if its token is lost; None if unknown.
        expires_at: the end of the present token; None without a usable one.
        anchor: from `daily_anchor`, for callers that keep it; None derives it.
        buffer: time before the expiry in which the token no longer counts, less than an hour.

    Raises:
        TypeError: a datetime without a zone met one of `needs`.

    """
    if anchor is None:
        anchor = daily_anchor(needs, buffer=buffer)
    served = now if expires_at is None else max(now, expires_at - buffer)
    past = _Past.of(now, issued_at, expires_at)
    for index in range(bisect_right(needs, served, key=_end), len(needs)):
        window = _Window.of(needs, index, buffer)
        at, why = _moment(past, window, needs[:index], anchor)
        if at < window.end:  # else the six hours last longer than this need: it is lost
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
    buffer: timedelta = BUFFER,
) -> list[Renewal]:
    """All renewals to `until`, provided that each succeeds at its moment and brings 24 hours."""
    found: list[Renewal] = []
    while planned := next_renewal(now, needs, issued_at=issued_at, expires_at=expires_at, anchor=anchor, buffer=buffer):
        if planned.at > until:
            break
        found.append(planned)
        now = issued_at = planned.at
        expires_at = planned.at + LIFE
    return found


class _Past(NamedTuple):
    """The present and the last issue, in UTC; KIS gives another token from `allowed` on, the rule from `regular`."""

    now: datetime
    issued: datetime | None
    expires: datetime | None
    allowed: datetime
    regular: datetime

    @classmethod
    def of(cls, now: datetime, issued: datetime | None, expires: datetime | None) -> _Past:
        now = now.astimezone(UTC)
        expires = expires and expires.astimezone(UTC)
        # An issue in the future comes from a wrong clock: believing it could stop all renewals for long.
        if issued is None or issued > now + CLOCK_SLACK:
            return cls(now, None, expires, _LONG_AGO, _LONG_AGO)
        issued = issued.astimezone(UTC)
        return cls(now, issued, expires, issued + SAME_TOKEN, issued + ONE_A_DAY)


class _Window(NamedTuple):
    """One need, in UTC; a token issued before `earliest` does not last through it, after `latest` a fault may not pass.

    Where `latest` cannot wait for the 24 hours, the issue comes at `early`: a bit sooner than it must, so that the days
    after, each some seconds later, need no exception.
    """

    start: datetime
    end: datetime
    quiet: datetime
    earliest: datetime
    latest: datetime
    early: datetime
    too_long: bool  # for one token

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
    """When to issue for the first need that the present token does not serve, and by which clause."""
    at_once = past.now, "renews at once"
    allowed = past.allowed, "renews as soon as KIS gives a new token, 6 h after the last issue"
    if window.too_long and past.expires and past.expires - LEAD > window.latest:
        return max((past.expires - LEAD, "renews an hour before the token expires"), allowed, at_once)
    regular = past.regular, f"renews daily at {past.regular.astimezone(KST):%H:%M} KST, 24 h after the last issue"
    at, why = max(_ideal(window, anchor), regular)
    at = max(at, past.now)  # a daily renewal that is due stays one: only what is late in earnest says so
    if (quiet := _quiet(at, earlier, window)) != at:
        at, why = quiet, "renews after the session"
    if at > window.latest:
        return max((window.early, "renews ahead of the session"), allowed, at_once)
    return at, why


def _ideal(window: _Window, anchor: time | None) -> tuple[datetime, str]:
    """The moment if no issue had come before: the anchor, if its token lasts, or the quiet's start."""
    if anchor is not None:
        at = datetime.combine(window.latest.astimezone(KST), anchor, KST).astimezone(UTC)
        if at > window.latest:
            at -= _DAY
        if at >= window.earliest:
            return at, f"renews daily at {anchor:%H:%M} KST"
    return min(max(window.earliest, window.quiet + SETTLE), window.latest), "renews in the quiet before the session"


def _quiet(at: datetime, earlier: Needs, window: _Window) -> datetime:
    """The moment itself, or the quiet after the earlier need that an issue would disturb."""
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


def _hours(span: timedelta) -> str:
    hours, minutes = divmod(span // _MINUTE, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def _of_day(minute: int) -> time:
    return time(*divmod(minute % _MINUTES_A_DAY, 60))


def _longest_gap(needs: Needs) -> tuple[int, int]:
    """(length, begin) in minutes of the KST day, of the longest time of day that no need ever touches; or zeros."""
    spans = {((start - _EPOCH) // _MINUTE, -((_EPOCH - end) // _MINUTE)) for start, end in needs}
    # From midnight in KST; an end goes on past the day's last minute instead of wrapping.
    busy = sorted({(begin % _MINUTES_A_DAY, begin % _MINUTES_A_DAY + end - begin) for begin, end in spans})
    if not busy:
        return 0, 0
    covered = max(busy[0][0], max(end for _, end in busy) - _MINUTES_A_DAY)
    longest = 0, 0
    for start, end in [*busy, (busy[0][0] + _MINUTES_A_DAY, 0)]:
        longest = max(longest, (start - covered, covered), key=_start)
        covered = max(covered, end)
    return longest
