"""The renewal rule applied to a key: what its exchanges need, what is planned, and one decision at a time.

`policy` decides, from the needs of all exchanges of the key's markets; a renewal goes through the same
lock and record as every other. Nothing here waits: who calls often enough follows the rule.
"""

from __future__ import annotations

from datetime import datetime, time, timedelta
from typing import TYPE_CHECKING, NamedTuple

from tokencore import policy, sessions
from tokencore.errors import TokenError
from tokencore.policy import Renewal
from tokencore.record import Outcome
from tokencore.settings import overrides
from tokencore.status import CLOCK_SLACK
from tokencore.tokens import SAME_TOKEN

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tokencore.manager import TokenManager
    from tokencore.market import Market
    from tokencore.record import Attempt
    from tokencore.tokens import Token

PAST, FUTURE = timedelta(days=2), timedelta(days=21)  # of the needs that are looked at: the anchor wants two weeks
ALERT = timedelta(minutes=30)  # before the need: the last moment for a person to act


class Outlook(NamedTuple):
    """What lies ahead of a key; times are aware UTC.

    Attributes:
        token: the present token, valid or not; None without one.
        needs: merged needs of all exchanges of the key, from the present one on.
        quiet: the time of day, from and to in KST, that is quiet on all days and holds the anchor; None without one.
        anchor: the KST minute of the daily renewal; None without exchanges or without a common quiet time.
        unserved: the first need that the present token does not serve; None when it serves all.
        next: the next renewal; its `at` is `now` where it is due.

    """

    token: Token | None
    needs: list[tuple[datetime, datetime]]
    quiet: tuple[time, time] | None
    anchor: time | None
    unserved: tuple[datetime, datetime] | None
    next: Renewal | None


class Horizon(NamedTuple):
    """When the exchanges of a key need a token, which changes with the days and the settings only.

    Attributes:
        needs: merged needs of two days before to three weeks after the moment that was asked about.
        quiet: the time of day, from and to in KST, that is quiet on all days; None without one.
        anchor: the KST minute of the daily renewal; None without a common quiet time.

    """

    needs: list[tuple[datetime, datetime]]
    quiet: tuple[time, time] | None
    anchor: time | None


class Decision(NamedTuple):
    """What a tick did.

    Attributes:
        renewed: whether a new token was issued.
        trouble: why a renewal that was due did not come about; the present token goes on.
        level: how pressing that is: empty, `warn` (half of the lead is gone) or `alert` (30 min before the need).
        outlook: what lies ahead now.

    """

    renewed: bool
    trouble: TokenError | None
    level: str
    outlook: Outlook


def look(manager: TokenManager, now: datetime) -> Outlook:
    """What lies ahead of the manager's key at `now` (aware). Reads only; asks KIS for nothing.

    Raises:
        ConfigurationError: an exchange of a market is unknown, or the settings are malformed.

    """
    token = manager.newest_token()
    codes = manager.key_exchanges()
    ahead = horizon(codes, overrides(), manager.market, now) if codes else None
    issued_at = token.issued_at if token else last_issue(manager.history())
    return outlook(token, issued_at, ahead, manager.market, now)


def horizon(codes: Sequence[str], known: Mapping[str, sessions.Override], market: Market, now: datetime) -> Horizon:
    """When the exchanges `codes` need a token around `now` (aware); `known` is what the user's settings say of them.

    Raises:
        ConfigurationError: an exchange is unknown.

    """
    every = sessions.needs(codes, now - PAST, now + FUTURE, known)
    anchor = policy.daily_anchor(every, buffer=timedelta(seconds=market.buffer))
    return Horizon(every, policy.quiet_time(every), anchor)


def outlook(
    token: Token | None, issued_at: datetime | None, ahead: Horizon | None, market: Market, now: datetime
) -> Outlook:
    """What lies ahead of a key with `token`, whose last issue was at `issued_at` (aware, None if unknown).

    Pure. `ahead` is None for a key without exchanges.
    """
    if ahead is None:
        return Outlook(token, [], None, None, None, _plain(token, market, now))
    buffer = timedelta(seconds=market.buffer)
    usable = token if token and token.serves(now, market.buffer) else None
    expires_at = usable.expires_at + CLOCK_SLACK if usable else None
    planned = policy.next_renewal(
        now, ahead.needs, issued_at=issued_at, expires_at=expires_at, anchor=ahead.anchor, buffer=buffer
    )
    if planned and token is None and issued_at and now < issued_at + SAME_TOKEN:
        planned = Renewal(now, "the token is lost, and KIS still hands the same one back", None)
    needs = [need for need in ahead.needs if need[1] > now]
    reach = expires_at - buffer if expires_at else now
    unserved = next((need for need in needs if need[1] > reach), None)
    return Outlook(token, needs, ahead.quiet, ahead.anchor, unserved, planned)


def tick(manager: TokenManager, now: datetime) -> Decision:
    """Follow the rule at `now` (aware) for the manager's key: renew if it is due and the record allows it.

    After a failure the record keeps the pauses (65 s three times, then 5 min), so that any number of
    callers, however often they call, ask KIS no more than the rule does.

    Raises:
        ConfigurationError: an exchange of a market is unknown, or the settings are malformed.

    """
    ahead = look(manager, now)
    if ahead.next is None or ahead.next.at > now:
        return Decision(renewed=False, trouble=None, level="", outlook=ahead)
    reason = f"rule: {ahead.next.exception or ahead.next.reason}"
    try:
        renewed = manager.renew_due(ahead.token, reason)
    except TokenError as error:
        return Decision(renewed=False, trouble=error, level=_level(ahead, now, manager.market.buffer), outlook=ahead)
    return Decision(renewed=renewed, trouble=None, level="", outlook=look(manager, now))


def next_attempt(manager: TokenManager, now: datetime) -> datetime | None:
    """When the next `tick` of the manager's key will have something to do, after `now` (aware); None if nothing is due.

    That is the planned renewal or, where it is due, when the limits and the pauses after failures allow it, a
    minute from now at the soonest. Refused credentials leave it to a person.

    Raises:
        ConfigurationError: an exchange of a market is unknown, or the settings are malformed.

    """
    planned = look(manager, now).next
    return attempt_at(planned, manager.renewal_allowed_from(now), manager.market, now) if planned else None


def attempt_at(planned: Renewal, allowed: datetime | None, market: Market, now: datetime) -> datetime | None:
    """When a `planned` renewal will be tried next, where the limits allow it from `allowed` on; see `next_attempt`."""
    if allowed is None:
        return None
    if planned.at > now:
        return planned.at
    return allowed if allowed > now else now + timedelta(seconds=market.issue_interval)


def last_issue(attempts: Sequence[Attempt]) -> datetime | None:
    """When the last new token was issued, by the record; None if it knows of none."""
    return next((attempt.at for attempt in reversed(attempts) if attempt.outcome is Outcome.ISSUED), None)


def _plain(token: Token | None, market: Market, now: datetime) -> Renewal:
    """Without any exchange configured: renew in the proactive window before the expiry."""
    if token is None or not token.serves(now, market.buffer):
        return Renewal(now, "there is no valid token", None)
    at = token.expires_at - timedelta(seconds=market.proactive_window)
    return Renewal(max(now, at), "no exchange is configured: shortly before the expiry", None)


def _level(ahead: Outlook, now: datetime, buffer: float) -> str:
    """The lead is the time from the token's last quiet moment, its issue plus a day at the latest, to the need."""
    if ahead.unserved is None:
        return "warn" if ahead.token and ahead.token.serves(now, buffer) else "alert"
    start = ahead.unserved[0]
    if now >= start - ALERT:
        return "alert"
    due = _due_since(ahead, now, buffer)
    return "warn" if now - due > (start - due) / 2 else ""


def _due_since(ahead: Outlook, now: datetime, buffer: float) -> datetime:
    """When the renewal that is due now became due: what the rule would have planned at the last issue."""
    if ahead.token is None or ahead.token.issued_at is None:
        return now
    issued_at = ahead.token.issued_at
    planned = policy.next_renewal(
        issued_at,
        ahead.needs,
        issued_at=issued_at,
        expires_at=ahead.token.expires_at + CLOCK_SLACK,
        anchor=ahead.anchor,
        buffer=timedelta(seconds=buffer),
    )
    return min(now, planned.at) if planned else now
