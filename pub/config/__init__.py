"""The settings: `read_market` for what a cached token needs, `settings.Settings` for everything, validated."""

from __future__ import annotations

from tokencore.config.market import Market
from tokencore.config.sources import check_address, gather
from tokencore.sealing import sealed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from tokencore.config.settings import Settings
    from tokencore.config.sources import Found


@sealed
def read_market(name: str) -> Market:
    """Return the market `name` from this process's settings, without validating those that it does not need.

    Raises:
        ConfigurationError: it is not configured, or a setting cannot be used.
    """
    return _read(name, gather())


@sealed
def market_of_program(name: str, credentials: Callable[[], tuple[str, str]], base_url: str) -> Market:
    """Return the market `name`, configured or not, with the key and the address that a program supplies itself.

    Raises:
        ConfigurationError: one of them or a setting cannot be used, or `.env` or a secrets folder says where the
            secret or its tokens go.
    """
    found, base_url = gather(), str(base_url or "").rstrip("/")
    found.markets.add(name.lower())
    market = _read(name, found)
    settings = [found.address_variable(market.name)] if base_url == market.base_url else []
    for variable in settings + found.destinations(market.name):
        check_address(variable, found, "app secret", "this program")
    return market.given(credentials, base_url)


def _read(name: str, found: Found) -> Market:
    try:
        return Market(name, found, _load)
    except (AttributeError, KeyError, TypeError, ValueError):
        return _load().market(name)  # its error says what is wrong


def _load() -> Settings:
    from tokencore.config.settings import Settings  # pydantic takes longer than the rest of a cached `get`

    return Settings.load()
