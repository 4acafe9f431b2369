"""What lies ahead of a key: needs, next renewal, the coming days, the effects of a refresh. Pure functions."""

from __future__ import annotations

from datetime import datetime, timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from tokencore import limits, policy
from tokencore.attempts import DAY, Outcome, issued_within
from tokencore.calendars import sessions
from tokencore.policy import CLOCK_SLACK, LIFE, Renewal
from tokencore.tokens import SAME_TOKEN, format_time

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import time

    from tokencore.attempts import Attempt
    from tokencore.calendars.sessions import Override
    from tokencore.config.market import Market
    from tokencore.tokens import Token

    Need = tuple[datetime, datetime]

PAST, FUTURE = timedelta(days=2), timedelta(days=21)  # which needs are considered; the anchor requires two weeks
PLAN_DAYS = 7  # the default length of a plan
AFTER = FUTURE - timedelta(days=PLAN_DAYS)  # how far past a plan's end needs are considered, for its last renewals
LOST = "the token is lost, and KIS still returns the same one"  # the reason of a renewal at once
RAN_BEFORE = timedelta(hours=36)  # how far back: the running session, and the one that the token was issued for


class Outlook(NamedTuple):
    """What lies ahead of a set of exchanges, and of a key that trades them; times are aware UTC.

    Attributes:
        needs: merged needs; for a key, from the present one on.
        quiet: start and end (KST) of the time of day that is quiet on all days; None if there is none.
        anchor: the KST minute of the daily renewal; None without a common quiet time.
        unserved: the first need that the present token does not serve; None if it serves all.
        next: the next renewal, with `at` equal to `now` if it is due; None if none is needed.
    """

    needs: list[Need]
    quiet: tuple[time, time] | None
    anchor: time | None
    unserved: Need | None = None
    next: Renewal | None = None


class RefreshWarning(NamedTuple):
    """One effect of a refresh that a person should know of beforehand."""

    kind: Literal["same token", "another issue", "inside a session"]
    message: str


class Row(NamedTuple):
    """One exchange's sessions and needs within a plan; `certain_until` is the last day whose closures are certain."""

    code: str
    zone: str
    certain_until: str
    sessions: list[Need]
    needs: list[Need]


class Plan(NamedTuple):
    """The coming days of a key; times are aware UTC, the anchor is KST.

    `token` is the present one, valid or not. `renewals` are the coming ones, assuming that each succeeds and brings a
    token of 24 hours; empty if KIS `refused` the credentials. `buffer` is in seconds.
    """

    markets: list[str]
    start: datetime
    now: datetime
    until: datetime
    token: Token | None
    outlook: Outlook
    rows: list[Row]
    renewals: list[Renewal]
    buffer: float
    refused: bool

    @property
    def lives(self) -> list[Need]:
        """The lives of the tokens that the renewals bring, each until the next one or its own end."""
        times = [*(one.at for one in self.renewals), self.until + LIFE]
        return [(at, min(at + LIFE, following)) for at, following in pairwise(times)]

    @property
    def why(self) -> str:
        """The sentence that explains the anchor."""
        if not self.rows:
            return "No exchange is configured: the token is renewed shortly before it expires."
        if self.outlook.quiet is None or self.outlook.anchor is None:
            return (
                "No time of the day is quiet on all days: the token is renewed in the quiet before a session or, where "
                "there is none, an hour before it expires."
            )
        begin, end = (moment.strftime("%H:%M") for moment in self.outlook.quiet)
        return (
            f"The token is renewed at {self.outlook.anchor:%H:%M} KST on every day with a session ahead that it does "
            f"not serve: from {begin} to {end} KST no exchange of this key needs a token on any day. After an issue at "
            "another time, 24 hours pass first where no session suffers from it."
        )


def horizon(codes: Sequence[str], known: Mapping[str, Override], buffer: float, now: datetime) -> Outlook:
    """Return when the exchanges `codes` need a token, from two days before `now` (aware) to three weeks after it.

    `known` has the user's overrides by exchange; `buffer` is in seconds.

    Raises:
        ConfigurationError: an exchange is unknown.
    """
    needs = sessions.needs(codes, now - PAST, now + FUTURE, known)
    return Outlook(needs, policy.quiet_time(needs), policy.daily_anchor(needs, buffer=buffer))


def last_issue(attempts: Sequence[Attempt]) -> datetime | None:
    """Return when the key's newest token was issued, if the record has it."""
    return next((one.at for one in reversed(attempts) if one.outcome is Outcome.ISSUED), None)


def look(
    token: Token | None, attempts: Sequence[Attempt], ahead: Outlook | None, market: Market, now: datetime
) -> Outlook:
    """Return what lies ahead of a key with this token and record; `ahead` is its horizon, None without exchanges."""
    issued_at = token.issued_at if token else last_issue(attempts)
    buffer = timedelta(seconds=market.buffer)
    expires_at = token.expires_at + CLOCK_SLACK if token and token.serves(now, market.buffer) else None
    if ahead is None:
        at = token.expires_at - timedelta(seconds=market.proactive_window) if token and expires_at else now
        why = "no exchange is configured: shortly before the expiry" if expires_at else "there is no valid token"
        return Outlook([], None, None, None, Renewal(max(now, at), why, None))
    planned = policy.next_renewal(
        now, ahead.needs, issued_at=issued_at, expires_at=expires_at, anchor=ahead.anchor, buffer=buffer
    )
    revoked = attempts and attempts[-1].outcome is Outcome.REVOKED
    if planned and token is None and not revoked and issued_at and now < issued_at + SAME_TOKEN:
        planned = Renewal(now, LOST, None)
    needs = [need for need in ahead.needs if need[1] > now]
    if token and token.rejected_at:  # with a session near, renew as soon as KIS gives another token
        same = token.same_until()
        at = max(now, same + CLOCK_SLACK) if same else now
        if any(start < at + DAY and end > at for start, end in needs):
            planned = Renewal(at, "KIS has rejected the present token", None)
    reach = expires_at - buffer if expires_at else now
    unserved = next((need for need in needs if need[1] > reach), None)
    return ahead._replace(needs=needs, unserved=unserved, next=planned)


def preview_refresh(
    now: datetime, token: Token | None, attempts: Sequence[Attempt], running: Mapping[str, datetime], market: Market
) -> list[RefreshWarning]:
    """Return the effects of a refresh at `now` worth a warning; it forbids nothing, which is the task of `limits`.

    `running` maps the exchanges that need a token at `now` to the ends of their needs. If no token serves, a refresh
    can do no harm.
    """
    if token is None or not token.serves(now, market.buffer):
        return []
    if same := limits.same_token_until(token, now):
        nothing = (
            f"Nothing would change: KIS returns the present token until {format_time(same)}, six hours after "
            "its issue, and the key's next request would have to wait a minute. "
        )
        return [RefreshWarning("same token", nothing + limits.what_serves(token, now, market.buffer))]
    found = []
    known = {attempt.expires_at: attempt.at for attempt in issued_within(attempts, now)}
    if token.issued_at and now - DAY < token.issued_at <= now:  # its issue may be missing from the record
        known.setdefault(token.expires_at, token.issued_at)
    if issues := sorted(known.values()):
        most = market.settings.max_issues_per_day
        ceiling = f" It passes your limit, KIS_MAX_ISSUES_PER_DAY={most}." if len(issues) >= most else ""
        another = (
            f"It would be token number {len(issues) + 1} of this key in 24 hours, after the one of "
            f"{format_time(issues[-1])}. KIS asks for one a day and may restrict a key that takes more; the "
            f"account's owner gets another KakaoTalk message.{ceiling}"
        )
        found.append(RefreshWarning("another issue", another))
    if running:
        until = format_time(max(running.values()))
        inside = (
            f"{', '.join(running)}: tokens are in use until {until}. Programs would get another token inside a "
            "session, and KIS does not say whether the old one stays valid."
        )
        found.append(RefreshWarning("inside a session", inside))
    return found


def make_rows(codes: Sequence[str], start: datetime, until: datetime, known: Mapping[str, Override]) -> list[Row]:
    """Return the sessions and needs of each exchange between `start` and `until`."""
    rows = []
    for place in dict.fromkeys(map(sessions.exchange, codes)):
        days = sessions.days(place.code, start, until, known)
        shown: list[Need] = [one.session for one in days if one.session.close > start and one.session.open < until]
        certain = sessions.certain_until().isoformat()
        rows.append(Row(place.code, place.zone, certain, shown, [one.need for one in days]))
    return rows


def plan_as_json(plan: Plan) -> dict[str, Any]:
    """Return the plan for programs: times in UTC, the anchor and the quiet time as KST `HH:MM`."""
    token, ahead = plan.token, plan.outlook
    return {
        "markets": plan.markets,
        "now": plan.now,
        "until": plan.until,
        "anchor_kst": ahead.anchor.strftime("%H:%M") if ahead.anchor else None,
        "anchor_why": plan.why,
        "quiet_kst": [moment.strftime("%H:%M") for moment in ahead.quiet] if ahead.quiet else None,
        "issued_at": token.issued_at if token else None,
        "expires_at": token.expires_at if token else None,
        "renewals": [renewal._asdict() for renewal in plan.renewals],
        "exchanges": [
            {
                "exchange": row.code,
                "zone": row.zone,
                "closures_certain_until": row.certain_until,
                "sessions": row.sessions,
                "needs": row.needs,
            }
            for row in plan.rows
        ],
    }
