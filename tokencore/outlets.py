"""The copies for other clients that the settings ask for, kept in line with the token files of a key.

Whatever fails here is told in the log and nowhere else: neither the token nor the other copies suffer.
"""

from __future__ import annotations

import logging
import os
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from tokencore import exports, sources
from tokencore.clients import CLIENTS, Holder, Target, file_name, target
from tokencore.errors import ConfigurationError, TokenError, TokenUnavailableError
from tokencore.market import Market, fingerprint, market_names
from tokencore.ownership import Ownership
from tokencore.settings import Settings

if TYPE_CHECKING:
    from tokencore.cache import Cache
    from tokencore.tokens import Token

_log = logging.getLogger("tokencore")
Owner = tuple[str, str]  # fingerprint and environment


class Outlets:
    """The copies of one key's token; every method is for the holder of the key's lock."""

    def __init__(self, cache: Cache, credentials: tuple[str, str], environment: str) -> None:
        """Serve the markets of `cache`; the settings are read when there is something to copy."""
        self._cache = cache
        self._credentials = credentials
        self._owner: Owner = (cache.fingerprint, environment)

    def __repr__(self) -> str:
        return f"Outlets({self._cache.fingerprint!r})"

    def __reduce__(self) -> str:
        raise TypeError("Outlets know credentials and are not pickled")

    def publish(self) -> None:
        """Write what the markets with a live token ask for, and remove what those without one had; never raises."""
        try:
            self._publish(sources.gather().values)
        except Exception as error:  # noqa: BLE001 - a copy is no reason to lose a token
            _tell("The token's copies for other clients could not be written", error)

    def export(self, client: str, folder: str) -> list[str]:
        """Write the files of `client` into `folder`, made if need be; their paths.

        Raises:
            TokenUnavailableError: there is no live token of the key.
            ConfigurationError: the place belongs to another key or environment, or KIS_HTS_ID is missing.
            TokenStoreError: the system refuses.

        """
        token, to = self._cache.newest(), Target(client, folder)
        if token is None or not _live(token):
            raise TokenUnavailableError("There is no valid token to export; nothing was written.")
        self.check(client, folder)
        exports.make_folder(to)
        holder = self._holder(Settings.load())
        return exports.write(to, holder, token, self._owned(holder, sources.gather().values))

    def check(self, client: str, folder: str) -> None:
        """Return where nothing but the token may be missing for `export`.

        Raises:
            ConfigurationError: the place belongs to another key or environment, or KIS_HTS_ID is missing.

        """
        to = Target(client, folder)
        if _owners(sources.gather().values).get(_place(to), self._owner) != self._owner:
            raise _taken(to)
        file_name(to, self._holder(Settings.load()))

    def _publish(self, values: dict[str, Any]) -> None:
        settings, owners = Settings.load(), _owners(values)
        holder = self._holder(settings)
        wanted: dict[Target, Token | None] = {}
        for path in self._cache.paths:
            token = self._cache.read(path)[0]
            for to in _targets(_market_of(path), settings, self._cache.folder):
                if owners.get(_place(to), self._owner) != self._owner:
                    _tell(f"The token was not copied for {to.client}", _taken(to))
                else:  # another market of the key may want it there as well
                    wanted[to] = token if token and _live(token) else wanted.get(to)
        owned = self._owned(holder, values)
        for to, token in wanted.items():
            _update(to, holder, token, owned)

    def _owned(self, holder: Holder, values: dict[str, Any]) -> Ownership:
        rivals = {owner for market, owner in _configured(values) if market.app_key == holder.app_key}
        return Ownership(self._cache.folder, holder, sole=rivals <= {self._owner})

    def _holder(self, settings: Settings) -> Holder:
        return Holder(self._owner[0], self._credentials, self._owner[1], settings.hts_id)


def _update(to: Target, holder: Holder, token: Token | None, owned: Ownership) -> None:
    try:
        if token:
            _copy(to, holder, token, owned)
        else:
            _withdraw(to, holder, owned)
    except Exception as error:  # noqa: BLE001 - the next copy gets its turn whatever befell this one
        _tell(f"The token's copy for {to.client} in {to.folder} is not up to date", error)


def _copy(to: Target, holder: Holder, token: Token, owned: Ownership) -> None:
    if exports.current(to, holder, token):
        return
    paths = exports.write(to, holder, token, owned)
    secret = ", with the app secret in it" if CLIENTS[to.client].holds_secret else ""
    _log.info("Copied the token for %s%s: %s", to.client, secret, ", ".join(paths))


def _withdraw(to: Target, holder: Holder, owned: Ownership) -> None:
    for path in exports.withdraw(to, holder, owned):
        _log.warning(
            "Removed the copy for %s, as its token was deleted or is dead: %s. If started before the next renewal, "
            "that client asks KIS for a token itself.",
            to.client,
            path,
        )


def _targets(market: str, settings: Settings, token_dir: str) -> list[Target]:
    own = settings.markets.get(market)
    return [target(text, market, token_dir) for text in (own.exports if own else [])]


def clashes(values: dict[str, Any]) -> list[Target]:
    """The places that markets with different keys or environments name both, so that only one of them exports there."""
    owners = _owners(values)
    return list(dict.fromkeys(place for place, owner in _wanted(values) if owners[place] != owner))


def _owners(values: dict[str, Any]) -> dict[Target, Owner]:
    """Whose each place is: where two keys or environments want one, the first market of the settings has it."""
    owners: dict[Target, Owner] = {}
    for place, owner in _wanted(values):
        owners.setdefault(place, owner)
    return owners


def _wanted(values: dict[str, Any]) -> list[tuple[Target, Owner]]:
    """Who exports where by the settings; python-kis is left out, as it names each key's file for itself."""
    settings = Settings.load()
    return [
        (_place(to), owner)
        for market, owner in _configured(values)
        for to in _targets(market.name, settings, market.token_dir)
        if to.client != "python-kis"
    ]


def _configured(values: dict[str, Any]) -> list[tuple[Market, Owner]]:
    """The markets that have an app key, in the order of the settings."""
    markets = [Market(name, values) for name in market_names(values)]
    return [(one, (fingerprint(one.app_key, one.base_url), one.environment)) for one in markets if one.app_key]


def _place(to: Target) -> Target:
    return to._replace(folder=os.path.realpath(to.folder))


def _market_of(path: str) -> str:
    return os.path.basename(path).removesuffix("_api_token.json")


def _live(token: Token) -> bool:
    return token.rejected_at is None and token.expires_at > datetime.now(UTC)


def _taken(to: Target) -> ConfigurationError:
    return ConfigurationError(
        f"{to.folder} is where a market with another key or environment exports to {to.client}, and its file cannot "
        "hold both: nothing was written. Give each of them a folder of its own (KIS_MARKETS__<NAME>__EXPORTS)."
    )


def _tell(what: str, error: Exception) -> None:
    told = error if isinstance(error, TokenError) else type(error).__name__  # an unknown error's text may hold anything
    _log.error("%s: %s", what, told)
