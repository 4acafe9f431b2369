"""What is known of a market's token, as one mapping: read-only, no network, never the token itself."""

from __future__ import annotations

import os
import stat
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, TypedDict

from tokencore import limits, record, sessions
from tokencore.record import IssuanceRecord
from tokencore.settings import overrides

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tokencore.cache import Cache
    from tokencore.market import Market
    from tokencore.sessions import Override
    from tokencore.tokens import Token

CLOCK_SLACK = timedelta(seconds=30)  # KIS's clock is not ours, and a need ends with a pad, long after the close
VALID = ("VALID", "EXPIRING_SOON")  # the words for a token that serves
HORIZON = timedelta(days=15)  # longer than any holiday of the exchanges: the next need is in it


class Need(TypedDict):
    """A time in which a token must be valid; ISO 8601 in UTC."""

    start: str
    end: str


class TokenStatus(TypedDict):
    """One market in `tokencore check --json`; times are ISO 8601 in UTC, or None where there is none."""

    market: str
    status: str
    valid: bool
    expires_at: str | None
    remaining_seconds: int
    remaining_hours: float
    buffer_seconds: float
    proactive_refresh_seconds: float
    cache_exists: bool
    environment: str
    issued_at: str | None
    cached_at: str | None
    file: str
    permissions: str | None
    cooldown_until: str | None
    issues_last_24h: int
    next_need: Need | None
    covers_next_need: bool | None


def token_status(market: Market, cache: Cache, now: datetime, need: tuple[datetime, datetime] | None) -> TokenStatus:
    """The status of `market` at `now` (aware): one of the contract's six words, and the facts behind it.

    `need` is the market's `next_need`.
    """
    token, problem = cache.read()
    attempts = IssuanceRecord(cache.folder, cache.fingerprint).attempts()
    path = cache.path
    named = word(token, problem, market, now)
    left = max(0.0, (token.expires_at - now).total_seconds()) if token else 0.0
    return {
        "market": market.name,
        "status": named,
        "valid": named in VALID,
        "expires_at": _iso(token.expires_at if token else None),
        "remaining_seconds": int(left),
        "remaining_hours": round(left / 3600, 2),
        "buffer_seconds": market.buffer,
        "proactive_refresh_seconds": market.proactive_window,
        "cache_exists": os.path.lexists(path),
        "environment": market.environment,
        "issued_at": _iso(token.issued_at if token else None),
        "cached_at": _iso(token.cached_at if token else None),
        "file": path,
        "permissions": _permissions(path),
        "cooldown_until": _iso(limits.cooldown_until(attempts, now, market.issue_interval)),
        "issues_last_24h": len(record.issued_within(attempts, now)),
        "next_need": {"start": need[0].isoformat(), "end": need[1].isoformat()} if need else None,
        "covers_next_need": covers(token, need, market) if need else None,
    }


def next_need(
    exchanges: Sequence[str], now: datetime, known: Mapping[str, Override]
) -> tuple[datetime, datetime] | None:
    """The merged need of these exchanges that contains `now` (aware) or comes next; None without exchanges.

    Raises:
        ConfigurationError: an exchange is unknown.

    """
    coming = sessions.needs(exchanges, now, now + HORIZON, known)
    return next((need for need in coming if need[1] > now), None)


def in_served_session(codes: list[str], token: Token, now: datetime, buffer: float) -> bool:
    """Whether an exchange of `codes` needs a token now and this one serves that need to its end: no time for a swap.

    Raises:
        ConfigurationError: an exchange is unknown, or the settings are malformed.

    """
    running = sessions.needs(codes, now, now + timedelta(seconds=1), overrides())
    return any(start <= now and token.serves(end - CLOCK_SLACK, buffer) for start, end in running)


def word(token: Token | None, problem: str, market: Market, now: datetime) -> str:
    """One of the contract's six words for what `Cache.read` found."""
    if token is None:
        return "UNREADABLE" if problem else "NO_TOKEN"
    if token.rejected_at is not None:
        return "REJECTED"
    if not token.serves(now, market.buffer):
        return "EXPIRED"
    soon = token.expires_at - timedelta(seconds=market.proactive_window) <= now
    return "EXPIRING_SOON" if soon else "VALID"


def covers(token: Token | None, need: tuple[datetime, datetime], market: Market) -> bool:
    """Whether it serves until the end of the need; our clock and KIS's may differ by a little (see `rule`)."""
    return token is not None and token.serves(need[1] - CLOCK_SLACK, market.buffer)


def _permissions(path: str) -> str | None:
    try:
        return f"{stat.S_IMODE(os.lstat(path).st_mode):04o}"
    except OSError:
        return None


def _iso(at: datetime | None) -> str | None:
    return at.isoformat() if at else None
