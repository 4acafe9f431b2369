"""The status of a market's token as one mapping: read-only, without network, and never the token itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypedDict

if TYPE_CHECKING:
    from datetime import datetime

    from tokencore.config.market import Market
    from tokencore.keys import KeyState


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
    """A market's status, and the state that it describes."""

    status: MarketStatus
    state: KeyState


def look(state: KeyState, market: Market) -> Seen:
    """Return the status of one market of a key; if there is no token, the market's own file may be the reason.

    Raises:
        ConfigurationError: one of its exchanges is unknown.
        TokenStoreError: the store cannot be used.
    """
    store = state.key.store_of(market)
    if state.token is None:
        state = state.without_token(store.read()[1])
    token, need, details = state.token, state.need_of(market), store.details()
    left = max(0.0, (token.expires_at - state.now).total_seconds()) if token else 0.0
    status: MarketStatus = {
        "market": market.name,
        "status": state.status,
        "valid": state.serves_until is not None,
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
        "cooldown_until": _iso(state.cooldown_until),
        "issues_last_24h": state.issues_last_24h,
        "next_need": {"start": need[0].isoformat(), "end": need[1].isoformat()} if need else None,
        "covers_next_need": state.lasts(need[1]) if need else None,
    }
    return Seen(status, state)


def _iso(at: datetime | None) -> str | None:
    return at.isoformat() if at else None
