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

    def publish(self, before: Token | None) -> None:
        """Write what the markets with a live token ask for, and remove what those without one had; never raises.

        `before` is the token that the key had until now.
        """
        try:
            self._publish(sources.gather().values, before)
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
        return exports.write(to, self._holder(Settings.load()), token, ())

    def check(self, client: str, folder: str) -> None:
        """Return where nothing but the token may be missing for `export`.

        Raises:
            ConfigurationError: the place belongs to another key or environment, or KIS_HTS_ID is missing.

        """
        to = Target(client, folder)
        if _owners(sources.gather().values).get(_place(to), self._owner) != self._owner:
            raise _taken(to)
        file_name(to, self._holder(Settings.load()))

    def _publish(self, values: dict[str, Any], before: Token | None) -> None:
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
        for to, token in wanted.items():
            _update(to, holder, token, before)

    def _holder(self, settings: Settings) -> Holder:
        return Holder(self._owner[0], self._credentials, self._owner[1], settings.hts_id)


def _update(to: Target, holder: Holder, token: Token | None, before: Token | None) -> None:
    try:
        if token:
            _copy(to, holder, token, before)
        else:
            _withdraw(to, holder, before)
    except Exception as error:  # noqa: BLE001 - the next copy gets its turn whatever befell this one
        _tell(f"The token's copy for {to.client} in {to.folder} is not up to date", error)


def _copy(to: Target, holder: Holder, token: Token, before: Token | None) -> None:
    if exports.current(to, holder, token):
        return
    paths = exports.write(to, holder, token, (before.access_token,) if before else ())
    secret = ", with the app secret in it" if CLIENTS[to.client].holds_secret else ""
    _log.info("Copied the token for %s%s: %s", to.client, secret, ", ".join(paths))


def _withdraw(to: Target, holder: Holder, before: Token | None) -> None:
    for path in exports.withdraw(to, holder, before):
        _log.warning(
            "Removed the copy for %s, as its token was deleted or is dead: %s. If started before the next renewal, "
            "that client asks KIS for a token itself.",
            to.client,
            path,
        )


def _targets(market: str, settings: Settings, token_dir: str) -> list[Target]:
    own = settings.markets.get(market)
    return [target(text, market, token_dir) for text in (own.exports if own else [])]


def _owners(values: dict[str, Any]) -> dict[Target, Owner]:
    """Whose each place is: where two keys or environments want one, the first market of the settings has it."""
    owners: dict[Target, Owner] = {}
    settings = Settings.load()
    for name in market_names(values):
        market = Market(name, values)
        if market.app_key:
            owner = (fingerprint(market.app_key, market.base_url), market.environment)
            for to in _targets(name, settings, market.token_dir):
                if to.client != "python-kis":  # names each key's file for itself
                    owners.setdefault(_place(to), owner)
    return owners


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
