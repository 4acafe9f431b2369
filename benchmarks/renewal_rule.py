"""Eleven years of sessions, four ways to renew, with and without outages of KIS: a Markdown table.

Run `python benchmarks/renewal_rule.py`. The table is simulated, without network or waiting, and the same version of
the `holidays` package gives the same figures on every run. Only the times that one decision and the needs take,
printed last, are measured.

A token lives for 24 hours and does not count as valid in its last five minutes. While KIS is up, an issue succeeds at
once. For the last column, KIS is down for 180 minutes each week, starting at a random minute, and an issue that fails
is tried again after `tokencore.attempts.retry_delay`.
"""

from __future__ import annotations

import random
import sys
import timeit
from bisect import bisect_left, bisect_right
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, date, datetime, time, timedelta
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))  # lets the benchmark run from a checkout that is not installed

from tokencore.attempts import retry_delay
from tokencore.calendars.exchanges import EXCHANGES
from tokencore.calendars.sessions import need, session
from tokencore.calendars.sessions import needs as merged_needs
from tokencore.policy import BUFFER, LIFE, daily_anchor, next_renewal
from tokencore.tokens import KST, SAME_TOKEN

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    Span = tuple[datetime, datetime]
    Policy = Callable[["World", datetime, datetime | None, datetime | None], datetime]

DAY, WEEK = timedelta(days=1), timedelta(days=7)
FIRST, LAST = date(2016, 1, 1), date(2026, 12, 31)
YEARS = LAST.year - FIRST.year + 1
START = datetime.combine(FIRST, time(), KST).astimezone(UTC)
END = datetime.combine(LAST + DAY, time(), KST).astimezone(UTC)
HORIZON = timedelta(days=14)
OUTAGE = timedelta(minutes=180)
DECISION_NEEDS = 90  # merged needs of about four months: far more than the rule ever looks at
SERIES = 20  # how often the eleven years are simulated with outages, each time at other random minutes

LATE_CLOSE = time(20)  # KRX's after-market, as if it had always existed
REGULAR = tuple(code for code in EXCHANGES if code != "NXT")  # NXT has only its long session
SETS = {
    "KRX": ("KRX",),
    "KRX and US": ("KRX", "NASD", "NYSE", "AMEX"),
    "all regular sessions": REGULAR,
    "all, Korea to 20:00": REGULAR,
}


class Session(NamedTuple):
    """One session of one exchange, aware UTC; its need lasts from `ready` to `padded`."""

    ready: datetime
    open: datetime
    close: datetime
    padded: datetime


class World:
    """The sessions of one set of exchanges in the eleven years, and the spans derived from them."""

    def __init__(self, name: str) -> None:
        """Compute every session of those years; for nine exchanges this takes a second."""
        self.sessions = sorted(_sessions(SETS[name], late=name.endswith("20:00")))
        self.needs = merged((one.ready, one.padded) for one in self.sessions)
        self.wanted = merged((one.ready, one.close) for one in self.sessions)
        self.trading = merged((one.open, one.close) for one in self.sessions)
        self._anchors: dict[datetime, time | None] = {}

    def horizon(self, now: datetime) -> list[Span]:
        """Return the needs that a program looks at: from the day before to two weeks ahead."""
        first = bisect_left(self.needs, now - DAY, key=itemgetter(0))
        return self.needs[first : bisect_left(self.needs, now + HORIZON, key=itemgetter(0))]

    def anchor(self, midnight: datetime) -> time | None:
        """Return the anchor of the day that begins at that midnight (UTC); it is computed once."""
        if midnight not in self._anchors:
            self._anchors[midnight] = daily_anchor(self.horizon(midnight))
        return self._anchors[midnight]


def _sessions(codes: Sequence[str], *, late: bool) -> Iterator[Session]:
    for code in codes:
        for day in (FIRST + DAY * n for n in range((LAST - FIRST).days + 1)):
            hours, needed = session(code, day), need(code, day)
            if hours is None or needed is None:
                continue
            close, padded = hours.close, needed[1]
            if late and code == "KRX":
                close = datetime.combine(day, LATE_CLOSE, KST).astimezone(UTC)
                padded = close + EXCHANGES["NXT"].pad
            yield Session(needed[0], hours.open, close, padded)


def merged(spans: Iterable[Span]) -> list[Span]:
    """Return the same times as sorted spans that do not overlap."""
    found: list[Span] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found


def overlap(spans: Sequence[Span], start: datetime, end: datetime) -> timedelta:
    """Return how much of the time from start to end these sorted spans cover."""
    total = timedelta(0)
    for index in range(bisect_right(spans, start, key=itemgetter(1)), len(spans)):
        if spans[index][0] >= end:
            break
        total += min(end, spans[index][1]) - max(start, spans[index][0])
    return total


def on_demand(world: World, now: datetime, _: datetime | None, expires: datetime | None) -> datetime:
    """Renew like a client that is used in every session and issues when it has no valid token."""
    at = max(now, expires - BUFFER) if expires else now
    index = bisect_right(world.wanted, at, key=itemgetter(1))
    return max(at, world.wanted[index][0]) if index < len(world.wanted) else END


def before_expiry(_: World, now: datetime, __: datetime | None, expires: datetime | None) -> datetime:
    """Renew like a service that does so 30 minutes before the expiry, at any time of day."""
    return max(now, expires - timedelta(minutes=30)) if expires else now


def warm_up(world: World, now: datetime, _: datetime | None, expires: datetime | None) -> datetime:
    """Renew like a job that runs 40 minutes before each open and issues if the token ends before the close."""
    first = bisect_left(world.sessions, (now - DAY,))
    for one in world.sessions[first : first + 100]:  # enough for ten days or more
        if one.close > now and (expires is None or expires - BUFFER < one.close):
            return max(now, one.open - timedelta(minutes=40))
    return END


def anchored(world: World, now: datetime, issued: datetime | None, expires: datetime | None) -> datetime:
    """Renew by the rule of `tokencore.policy`; while nothing is due, ask it again every midnight (UTC)."""
    while now < END:
        midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
        planned = next_renewal(
            now,
            world.horizon(now),
            issued_at=issued,
            expires_at=expires,
            anchor=world.anchor(midnight),
        )
        now = midnight + DAY
        if planned and planned.at < now:
            return planned.at
    return END


POLICIES: dict[str, Policy] = {
    "on demand": on_demand,
    "expiry − 30 min": before_expiry,  # noqa: RUF001 - a minus sign
    "warm-up only": warm_up,
    "anchored, clamped": anchored,
}


def simulate(world: World, policy: Policy, outages: Sequence[Span] = ()) -> list[datetime]:
    """Return the times of all issues that succeeded, from the first day to the last."""
    issues: list[datetime] = []
    issued = expires = None
    now, failures = START, 0
    while (at := policy(world, now, issued, expires)) < END:
        if overlap(outages, at, at + timedelta.resolution):
            failures += 1
            now = at + retry_delay(failures)
            continue
        assert issued is None or at >= issued + SAME_TOKEN, "KIS would hand back the same token"
        issues.append(at)
        now, issued, expires, failures = at, at, at + LIFE, 0
    return issues


def weekly_outages(seed: int) -> list[Span]:
    """Return one outage a week, each starting at a random minute."""
    chance = random.Random(seed)  # noqa: S311 - a simulation, not a secret
    minutes = WEEK // timedelta(minutes=1)
    weeks = [START + WEEK * n for n in range((END - START) // WEEK + 1)]
    starts = [week + timedelta(minutes=chance.randrange(minutes)) for week in weeks]
    return merged((start, start + OUTAGE) for start in starts)


def without_token(issues: Sequence[datetime]) -> list[Span]:
    """Return the times in which there is no valid token."""
    counts = merged((at, at + LIFE - BUFFER) for at in issues)
    edges = [START, *(edge for span in counts for edge in span), END]
    return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]


def sessions_hit(world: World, policy: Policy, seed: int) -> int:
    """Count the sessions that had no valid token at some time between 30 minutes before the open and the close."""
    bare = without_token(simulate(world, policy, weekly_outages(seed)))
    felt = [hole for hole in bare if overlap(world.wanted, *hole)]
    return sum(bool(overlap(felt, one.ready, one.close)) for one in world.sessions) if felt else 0


def row(world: World, name: str, policy: Policy) -> str:
    """Return one line of the table."""
    issues = simulate(world, policy)
    bare = without_token(issues)
    most = max(bisect_left(issues, at + DAY) - index for index, at in enumerate(issues))
    swaps = sum(bool(overlap(world.trading, at, at + timedelta.resolution)) for at in issues)
    uncovered = sum((overlap(bare, *span) for span in world.wanted), timedelta(0))
    hit = sum(sessions_hit(world, policy, seed) for seed in range(SERIES)) / SERIES
    return (
        f"| {name} | {len(issues) / YEARS:.1f} | {most} | {swaps / YEARS:.1f} "
        f"| {uncovered.total_seconds():.0f} | {hit / len(world.sessions):.3%} |"
    )


def rows(name: str) -> list[str]:
    """Return the lines of one set of exchanges."""
    world = World(name)
    return [row(world, f"{name} | {title}", policy) for title, policy in POLICIES.items()]


def main() -> None:
    """Print the table, two sets of exchanges at a time."""
    print(
        "| exchanges | policy | issuances a year | most in any 24 h | issued inside a session, a year "
        "| uncovered seconds | sessions with a hole, outages |"
    )
    print("|---|---|--:|--:|--:|--:|--:|")
    with ProcessPoolExecutor(2) as pool:
        for lines in pool.map(rows, SETS):
            print(*lines, sep="\n")
    print(f"\nOne decision with {DECISION_NEEDS} needs: {decision_time() * 1000:.3f} ms.")
    print(f"The needs of all exchanges for 14 days, calendars loaded: {needs_time() * 1000:.2f} ms.")


def decision_time() -> float:
    """Return the seconds that one `next_renewal` takes with `DECISION_NEEDS` needs and a precomputed anchor."""
    start = datetime(2026, 1, 5, tzinfo=UTC)
    needs = [(start + timedelta(days=n), start + timedelta(days=n, hours=7)) for n in range(DECISION_NEEDS)]
    anchor, now = daily_anchor(needs), needs[DECISION_NEEDS // 2][0]

    def decide() -> None:
        next_renewal(
            now, needs, issued_at=now - timedelta(hours=20), expires_at=now + timedelta(hours=4), anchor=anchor
        )

    return min(timeit.repeat(decide, number=200, repeat=5)) / 200


def needs_time() -> float:
    """Return the seconds that it takes to merge the needs of all exchanges for `HORIZON`, once calendars are loaded."""
    now = datetime(2026, 11, 21, tzinfo=UTC)
    return min(timeit.repeat(lambda: merged_needs(EXCHANGES, now, now + HORIZON), number=5, repeat=5)) / 5


if __name__ == "__main__":
    main()
