"""The settings: `read_market` for what a cached token needs, `settings.Settings` for everything, validated."""

from __future__ import annotations

from tokencore.config.market import Market
from tokencore.config.sources import gather

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tokencore.config.settings import Settings


def read_market(name: str) -> Market:
    """The market `name` from this process's settings, without validating the others.

    Raises:
        ConfigurationError: it is not configured, or a setting cannot be used.

    """
    try:
        return Market(name, gather(), _load)
    except ValueError:
        pass  # Settings have the message; outside, so that no frame with the value is its context
    return _load().market(name)


def _load() -> Settings:
    from tokencore.config.settings import Settings  # pydantic takes longer than the rest of a cached `get`

    return Settings.load()
