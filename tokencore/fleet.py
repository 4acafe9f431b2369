"""All configured markets, and the keys they share."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from tokencore import sessions, sources
from tokencore.configured import Configured
from tokencore.errors import ConfigurationError
from tokencore.manager import TokenManager
from tokencore.market import market_names
from tokencore.settings import Settings, overrides
from tokencore.status import next_need

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tokencore.status import TokenStatus


def managers(*, one_per_key: bool = False) -> list[TokenManager]:
    """A manager for every market that has credentials, or for the first market of every key.

    Raises:
        ConfigurationError: the settings are malformed, or no market has credentials.

    """
    found = sources.gather()
    Settings.load(found)
    configured = Configured(found)
    every = [TokenManager(name, configured=configured) for name in market_names(configured.values)]
    able = [manager for manager in every if manager.market.app_key]
    if not able:
        every[0].get_app_credentials()  # raises the sentence that says what to set
    if not one_per_key:
        return able
    return [manager for manager in able if manager.sharing()[0] == manager.market.name]


def statuses(asked: Sequence[TokenManager]) -> list[TokenStatus]:
    """The status of each, as its `get_token_status` has it; each set of exchanges is looked up once.

    Raises:
        ConfigurationError: an exchange is unknown, or the settings are malformed.

    """
    now, known = datetime.now(UTC), overrides()
    needs = {codes: next_need(codes, now, known) for codes in {manager.market.exchanges for manager in asked}}
    return [manager.status_at(now, needs[manager.market.exchanges]) for manager in asked]


def trading(exchange: str) -> list[TokenManager]:
    """A manager for every key with a market that trades `exchange` (order code or alias): one each.

    Raises:
        ConfigurationError: the exchange is unknown, or no market with credentials trades it.

    """
    place = sessions.exchange(exchange)
    found: dict[tuple[str, ...], TokenManager] = {}
    for manager in managers():
        if any(sessions.exchange(code).code == place.code for code in manager.market.exchanges):
            found.setdefault(tuple(manager.sharing()), manager)
    if not found:
        raise ConfigurationError(
            f"No market of your settings trades {place.code}; add it to one, such as "
            f"KIS_MARKETS__{(place.quote_code or place.code)}__EXCHANGES={place.code}.",
        )
    return list(found.values())
