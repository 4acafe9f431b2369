"""What a refresh by hand would cost, before anybody asks KIS: the sentences that a person confirms.

Pure but for `foresee`, which reads the key's files. What is foreseen forbids nothing; `limits` does that.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Literal, NamedTuple

from tokencore import limits, record, sessions
from tokencore.settings import overrides

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from tokencore.manager import TokenManager
    from tokencore.market import Market
    from tokencore.record import Attempt
    from tokencore.tokens import Token

_MOMENT = timedelta(seconds=1)


class Consequence(NamedTuple):
    """One thing that a refresh would bring about, which a person had better know before."""

    kind: Literal["same token", "another issue", "inside a session"]
    told: str


def foresee(manager: TokenManager, now: datetime) -> list[Consequence]:
    """What a refresh of the manager's key at `now` (aware) would bring about; empty where it harms nothing.

    Raises:
        ConfigurationError: an exchange of a market is unknown, or the settings are malformed.

    """
    known = overrides()
    needs = {code: sessions.needs([code], now, now + _MOMENT, known) for code in manager.key_exchanges()}
    running = {code: found[-1][1] for code, found in needs.items() if found}
    return consequences(now, manager.newest_token(), manager.history(), running, manager.market)


def consequences(
    now: datetime, token: Token | None, attempts: Sequence[Attempt], running: Mapping[str, datetime], market: Market
) -> list[Consequence]:
    """See `foresee`; `running` are the exchanges that need a token at `now`, and until when.

    Within six hours of its issue KIS hands the same token back: then nothing else happens. Where no token
    serves, there is none to be exchanged inside a session.
    """
    if same := limits.same_token_until(token, now):
        return [Consequence("same token", _same(same, token, now, market))]
    found = []
    if issues := _issues(now, token, attempts):
        found.append(Consequence("another issue", _another(issues, market)))
    if running and token and token.serves(now, market.buffer):
        found.append(Consequence("inside a session", _inside(running)))
    return found


def _issues(now: datetime, token: Token | None, attempts: Sequence[Attempt]) -> list[datetime]:
    """When new tokens were issued in the last 24 hours; the record need not know of the present one."""
    issues = {attempt.expires_at: attempt.at for attempt in record.issued_within(attempts, now)}
    if token and token.issued_at and now - record.DAY < token.issued_at <= now:
        issues.setdefault(token.expires_at, token.issued_at)
    return sorted(issues.values())


def _same(until: datetime, token: Token | None, now: datetime, market: Market) -> str:
    return (
        f"KIS would hand back the present token, as it does until {limits.tell(until)}, six hours after its issue: "
        "nothing would change, and the key's next request would have to wait a minute. "
        f"{limits.what_serves(token, now, market.buffer)}"
    )


def _another(issues: Sequence[datetime], market: Market) -> str:
    over = len(issues) >= market.max_issues_per_day
    ceiling = f" It passes your ceiling, KIS_MAX_ISSUES_PER_DAY={market.max_issues_per_day}." if over else ""
    return (
        f"It would be token number {len(issues) + 1} of this key in 24 hours, after the one of "
        f"{limits.tell(issues[-1])}. KIS wants one a day and may restrict a key that takes more; the "
        f"account's owner gets another KakaoTalk message.{ceiling}"
    )


def _inside(running: Mapping[str, datetime]) -> str:
    return (
        f"{', '.join(running)}: tokens are in use until {limits.tell(max(running.values()))}. Programs would get "
        "another one inside a session, and KIS does not say whether the old one goes on."
    )
