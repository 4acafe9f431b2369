"""What is known of a market's token, as one mapping: read-only, no network, never the token itself."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING, NamedTuple, TypedDict

from tokencore import limits
from tokencore.attempts import issued_within
from tokencore.calendars import sessions
from tokencore.errors import ConfigurationError
from tokencore.outlook import VALID, covers, word
from tokencore.stores import open_store

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tokencore.attempts import Attempt
    from tokencore.config.market import Market
    from tokencore.keys import KeyState
    from tokencore.stores.base import Store
    from tokencore.tokens import Token

    Span = tuple[datetime, datetime]
    Read = tuple[Token | None, str, list[Attempt]]  # what a store gives: the token, why there is none, the record

HORIZON = timedelta(days=15)  # longer than any holiday of the exchanges: the next need is in it


class MarketStatus(TypedDict):
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
    next_need: dict[str, str] | None  # its `start` and `end`
    covers_next_need: bool | None


class Seen(NamedTuple):
    """A market's status, and the token and store that it describes."""

    status: MarketStatus
    token: Token | None
    store: Store


def status_of(market: Market, store: Store, now: datetime) -> MarketStatus:
    """The status of `market`, whose key is in `store`, at `now` (aware).

    Raises:
        ConfigurationError: an exchange is unknown.
        TokenStoreError: the store cannot be used.

    """
    return _status(market, store, (*store.read(), store.attempts()), next_need(market, now), now)


def look(markets: Iterable[Market], now: datetime) -> list[Seen]:
    """Every market at `now` (aware); each key is read once, and the calendars are asked once for a set of exchanges.

    Raises:
        ConfigurationError: a market has no credentials, or an exchange is unknown.
        TokenStoreError: the store cannot be used.

    """
    keys: dict[tuple[str, str], tuple[Token | None, list[Attempt]]] = {}
    needs: dict[tuple[str, ...], Span | None] = {}
    found = []
    for market in markets:
        market.identified()
        store, key = open_store(market, tuple), (market.fingerprint, market.environment)
        if key not in keys:
            attempts = store.attempts()  # first: a fleet's store is then asked for the token too
            keys[key] = store.read()[0], attempts
        if market.exchanges not in needs:
            needs[market.exchanges] = next_need(market, now)
        token, attempts = keys[key]
        problem = "" if token else store.read()[1]  # each market's own file may be the trouble
        status = _status(market, store, (token, problem, attempts), needs[market.exchanges], now)
        found.append(Seen(status, token, store))
    return found


def next_need(market: Market, now: datetime) -> Span | None:
    """The merged need of the market's exchanges that contains `now` (aware) or comes next; None without exchanges.

    Raises:
        ConfigurationError: an exchange is unknown.

    """
    coming = sessions.needs(market.exchanges, now, now + HORIZON, market.settings.overrides)
    return next((need for need in coming if need[1] > now), None)


def next_attempt(state: KeyState) -> datetime | None:
    """When the key's next renewal will be tried; None where none is planned, or only a person can bring it about."""
    try:
        return state.next_attempt
    except ConfigurationError:  # the keyring with the secret is locked
        return None


def _status(market: Market, store: Store, read: Read, need: Span | None, now: datetime) -> MarketStatus:
    token, problem, attempts = read
    named, details = word(token, problem, market, now), store.details()
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
        "cache_exists": details["cache_exists"],
        "environment": market.environment,
        "issued_at": _iso(token.issued_at if token else None),
        "cached_at": _iso(token.cached_at if token else None),
        "file": details["file"],
        "permissions": details["permissions"],
        "cooldown_until": _iso(limits.cooldown_until(attempts, now, market)),
        "issues_last_24h": len(issued_within(attempts, now)),
        "next_need": {"start": need[0].isoformat(), "end": need[1].isoformat()} if need else None,
        "covers_next_need": covers(token, need, market) if need else None,
    }


def _iso(at: datetime | None) -> str | None:
    return at.isoformat() if at else None
