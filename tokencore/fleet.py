"""All configured markets, and the keys they share."""

from __future__ import annotations

from tokencore import sessions, sources
from tokencore.errors import ConfigurationError
from tokencore.manager import TokenManager
from tokencore.market import market_names
from tokencore.settings import Settings


def managers(*, one_per_key: bool = False) -> list[TokenManager]:
    """A manager for every market that has credentials, or for the first market of every key.

    Raises:
        ConfigurationError: the settings are malformed, or no market has credentials.

    """
    Settings.load()
    every = [TokenManager(name) for name in market_names(sources.gather().values)]
    able = [manager for manager in every if manager.market.app_key]
    if not able:
        every[0].get_app_credentials()  # raises the sentence that says what to set
    if not one_per_key:
        return able
    return [manager for manager in able if manager.sharing()[0] == manager.market.name]


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
