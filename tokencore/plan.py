"""What the renewal rule will do in the coming days for a key, as data: for people, programs and pictures."""

from __future__ import annotations

from datetime import datetime, time, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from tokencore import policy, sessions
from tokencore.rule import FUTURE, look
from tokencore.settings import overrides
from tokencore.status import CLOCK_SLACK
from tokencore.tokens import KST

if TYPE_CHECKING:
    from tokencore.manager import TokenManager
    from tokencore.policy import Renewal
    from tokencore.rule import Outlook

DAYS = 7  # of a plan, unless asked otherwise
LIFE_AND_MORE = timedelta(hours=36)  # before now: the session that runs, and the one the token was made for


class Row(NamedTuple):
    """One exchange's sessions and needs in the picture's time; `certain_until` is the last day known for certain."""

    code: str
    zone: str
    certain_until: str
    sessions: list[tuple[datetime, datetime]]
    needs: list[tuple[datetime, datetime]]


class Plan(NamedTuple):
    """The plan of one key; times are aware UTC, the anchor is KST.

    Attributes:
        markets: the markets that share the key.
        start, now, until: the time that is shown, and the present moment in it.
        outlook: token, needs, quiet time, anchor and next renewal.
        rows: the key's exchanges.
        renewals: the coming ones, if each succeeds and brings a token of 24 hours; none of refused credentials.
        buffer: seconds before an expiry in which a token no longer counts.
        refused: whether KIS refused the credentials, so that nothing renews until a person acts.

    """

    markets: list[str]
    start: datetime
    now: datetime
    until: datetime
    outlook: Outlook
    rows: list[Row]
    renewals: list[Renewal]
    buffer: float
    refused: bool = False

    @property
    def why(self) -> str:
        """The sentence that explains the anchor."""
        if not self.rows:
            return "No exchange is configured: the token is renewed shortly before it expires."
        if self.outlook.quiet is None or self.outlook.anchor is None:
            return "No time of the day is quiet on all days: the token is renewed an hour before it expires."
        begin, end = (moment.strftime("%H:%M") for moment in self.outlook.quiet)
        return (
            f"The aim is {self.outlook.anchor:%H:%M} KST on every day with a session ahead that is not served: from "
            f"{begin} to {end} KST no exchange of this key needs a token on any day. After an issue at another time, "
            "24 hours pass first where no session suffers from it."
        )


def make_plan(manager: TokenManager, now: datetime, days: int = DAYS) -> Plan:
    """The plan of the manager's key from the day of `now` (aware) on, for `days` days of KST. Reads only.

    Raises:
        ConfigurationError: an exchange of a market is unknown, or the settings are malformed.

    """
    ahead = look(manager, now)
    start = datetime.combine(now.astimezone(KST).date(), time(), KST).astimezone(now.tzinfo)
    until = start + timedelta(days=days)
    known = overrides()
    codes = dict.fromkeys(sessions.exchange(code).code for code in manager.key_exchanges())
    rows = [_row(code, start, until, known) for code in codes]
    token = ahead.token if ahead.token and ahead.token.rejected_at is None else None
    refused = manager.renewal_allowed_from(now) is None
    coming = [ahead.next] if ahead.next and not codes and not refused else []
    if codes and not refused:
        coming = policy.renewals(
            now,
            sessions.needs(list(codes), now - LIFE_AND_MORE, until + FUTURE, known),
            until=until,
            issued_at=ahead.token.issued_at if ahead.token else None,
            expires_at=token.expires_at + CLOCK_SLACK if token else None,
            anchor=ahead.anchor,
            buffer=timedelta(seconds=manager.market.buffer),
        )
    return Plan(manager.sharing(), start, now, until, ahead, rows, coming, manager.market.buffer, refused)


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan for programs: times as ISO 8601 in UTC, the anchor and the quiet time as KST `HH:MM`."""
    token, anchor = plan.outlook.token, plan.outlook.anchor
    return {
        "markets": plan.markets,
        "now": plan.now.isoformat(),
        "until": plan.until.isoformat(),
        "anchor_kst": anchor.strftime("%H:%M") if anchor else None,
        "anchor_why": plan.why,
        "quiet_kst": [moment.strftime("%H:%M") for moment in plan.outlook.quiet] if plan.outlook.quiet else None,
        "issued_at": token.issued_at.isoformat() if token and token.issued_at else None,
        "expires_at": token.expires_at.isoformat() if token else None,
        "renewals": [
            {"at": renewal.at.isoformat(), "reason": renewal.reason, "exception": renewal.exception}
            for renewal in plan.renewals
        ],
        "exchanges": [
            {
                "exchange": row.code,
                "zone": row.zone,
                "closures_certain_until": row.certain_until,
                "sessions": [[opens.isoformat(), closes.isoformat()] for opens, closes in row.sessions],
                "needs": [[begin.isoformat(), end.isoformat()] for begin, end in row.needs],
            }
            for row in plan.rows
        ],
    }


def _row(code: str, start: datetime, until: datetime, known: dict[str, sessions.Override]) -> Row:
    first = start.date() - timedelta(days=1)
    days = [first + timedelta(days=n) for n in range((until - start).days + 3)]
    found = [session for day in days if (session := sessions.session(code, day, known))]
    shown = [(session.open, session.close) for session in found if session.close > start and session.open < until]
    needs = [need for need in sessions.needs([code], start, until, known) if need[1] > start]
    return Row(code, sessions.exchange(code).zone, sessions.certain_until(code).isoformat(), shown, needs)
