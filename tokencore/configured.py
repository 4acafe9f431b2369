"""One reading of the settings: its markets, and which of them share a key."""

from __future__ import annotations

from tokencore import sources
from tokencore.market import Market, fingerprint, market_names

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from tokencore.sources import Gathered


class Configured:
    """One reading of the settings, and which markets share a key: for one manager, or for all that a command needs."""

    __slots__ = ("_by_key", "_markets", "values")  # what `vars` shows has no secret

    def __init__(self, found: Gathered | None = None) -> None:
        """Take the settings that were found, or gather them.

        Raises:
            ConfigurationError: they cannot be read.

        """
        self.values: dict[str, Any] = (found or sources.gather()).values
        self._markets: dict[str, Market] = {}
        self._by_key: dict[tuple[str, str], list[str]] | None = None

    def __reduce__(self) -> str:
        raise TypeError("the settings hold credentials and are not pickled; gather them where they are needed")

    def market(self, name: str) -> Market:
        """The market of that name.

        Raises:
            ConfigurationError: it is not configured, or a setting cannot be used.

        """
        if known := self._markets.get(name):
            return known
        try:
            return self._markets.setdefault(name, Market(name, self.values))
        except (ValueError, TypeError):
            from tokencore.settings import Settings  # only a mistake needs its words

            Settings.load()
            raise

    def sharing(self, key_fingerprint: str, environment: str) -> list[str]:
        """The configured markets whose key it is, in this environment."""
        return [prefix.removesuffix("_") for prefix in self.prefixes(key_fingerprint, environment)]

    def prefixes(self, key_fingerprint: str, environment: str) -> list[str]:
        """What the names of their files begin with; all are looked at once, as each of a thousand managers asks."""
        if self._by_key is None:
            found: dict[tuple[str, str], list[str]] = {}
            for market in map(self.market, market_names(self.values)):
                if market.app_key:
                    key = fingerprint(market.app_key, market.base_url), market.environment
                    found.setdefault(key, []).append(f"{market.name}_")
            self._by_key = found
        return self._by_key.get((key_fingerprint, environment), [])
