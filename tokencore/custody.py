"""A key's files, changed by hand or from elsewhere: saved, taken over, marked dead, removed, copied for other clients.

Each change is made under the key's lock, and reaches every market of the key.
"""

from __future__ import annotations

import contextlib
import logging
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from tokencore import imports, limits, sources, store
from tokencore.errors import ConfigurationError, TokenError, TokenStoreError
from tokencore.issuance import Issuance
from tokencore.lock import KeyLock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tokencore.cache import Cache
    from tokencore.market import Market
    from tokencore.outlets import Outlets
    from tokencore.tokens import Token

_log = logging.getLogger("tokencore")
LOCK_WAIT = 8  # time-outs: a holder that tries to connect four times and then waits for an answer is done by then


class Custody:
    """Changes the token files of one key; any number of them, in any process, take turns."""

    __slots__ = ("__dict__", "_secrets")  # what `vars` shows has no secret

    def __init__(self, market: Market, cache: Cache, credentials: tuple[str, str], base_url: str) -> None:
        """Serve the key of `cache`; `market` gives the numbers of the rules."""
        self._market = market
        self._cache = cache
        self._secrets = credentials
        self._lock = KeyLock(cache.folder, cache.fingerprint)
        self._issuance = Issuance(market, cache, self._lock, credentials, base_url)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._cache.fingerprint!r})"

    def __reduce__(self) -> str:
        raise TypeError("a keeper of tokens knows credentials and is not pickled; make it anew where it is needed")

    def save(self, token: Token) -> None:
        """Save `token` for every market of the key.

        Raises:
            TokenStoreError: it could not be written; what was there before still is.

        """
        with self._owning():
            self._cache.save(token, datetime.now(UTC))

    def take(self, token: Token, *, force: bool, proven: bool) -> bool:
        """Save a token that was issued elsewhere, for every market of the key; False where it is known already.

        `proven` says that KIS has accepted it just now. Its issue, which the token tells, starts KIS's six hours and
        the day of the renewal rule; as no request of ours it moves neither the cool-down nor the ceiling.

        Raises:
            ConfigurationError: the present token is the better one, and `force` is not given.
            TokenUnavailableError: it is known to be dead.
            TokenStoreError: it could not be written; what was there before still is.

        """
        with self._owning():
            now, present = datetime.now(UTC), self._cache.newest()
            imports.check_better(token, present, now, force=force, proven=proven)
            known = present is not None and present.access_token == token.access_token and present.rejected_at is None
            self._cache.save(token, now)
            if known:
                return False
            self._issuance.note_import(token, now)
            return True

    def check_export(self, client: str, folder: str) -> None:
        """Whether such an export can be, see `Outlets.check`."""
        self._outlets.check(client, folder)

    def export(self, client: str, folder: str) -> list[str]:
        """Write the token for another client, see `Outlets.export`."""
        with self._owning():
            return self._outlets.export(client, folder)

    def copy(self) -> None:
        """Bring the copies for other clients up to date, where nobody holds the lock, who would do it; never raises."""
        if not self._exporting():
            return
        try:
            with self._holding(wait=0):
                pass
        except (TokenError, OSError) as error:
            told = error if isinstance(error, TokenError) else error.strerror
            _log.error("The token's copies for other clients could not be looked after: %s", told)

    def delete(self) -> bool:
        """Remove the token file of the first market; whether there was one.

        Raises:
            TokenStoreError: it cannot be removed.

        """
        with self._owning():
            return self._cache.delete()

    def mark_rejected(self, access_token: str, now: datetime) -> None:
        """Note in every file of the key that KIS rejected or revoked this token, so that no process serves it again.

        Where another market of the key has a newer token already, all of them get that one.

        Raises:
            TokenStoreError: the note could not be written.

        """
        with self._owning():
            token = self._cache.newest()
            if token and token.access_token != access_token:
                self._adopt(token, held=True)
            elif token and token.rejected_at is None:
                token.rejected_at = now
                self._cache.save(token, now)
                _log.warning("The token is marked dead. %s", limits.what_serves(token, now, self._market.buffer))

    def revoke(self, access_token: str) -> None:
        """Make KIS forget the token, see `Issuer.revoke`."""
        self._issuance.issuer.revoke(access_token)

    def probe(self, access_token: str, *, domestic: bool) -> tuple[bool | None, str]:
        """Whether KIS accepts the token, see `Issuer.probe`."""
        return self._issuance.issuer.probe(access_token, domestic=domestic)

    @property
    def _outlets(self) -> Outlets:
        """For those who export only: it validates the settings."""
        from tokencore.outlets import Outlets

        return Outlets(self._cache, self._secrets, self._market.environment)

    @contextlib.contextmanager
    def _holding(self, wait: float, give_up: Callable[[], bool] = lambda: False) -> Iterator[bool]:
        """The lock in a folder that is there; yields whether it was had.

        What changed under it reaches the copies for other clients before it is released.
        """
        store.private_folder(self._cache.folder)
        with self._lock.hold(wait=wait, give_up=give_up) as held:
            try:
                yield held
            finally:
                if held and self._exporting():
                    self._outlets.publish()

    def _exporting(self) -> bool:
        try:
            markets = sources.gather().values.get("markets", {})
        except ConfigurationError:  # who issues is told
            return False
        return any("exports" in own for own in markets.values() if isinstance(own, dict))

    @contextlib.contextmanager
    def _owning(self) -> Iterator[None]:
        """The lock for a change of files; what the system refuses becomes one error."""
        wait = LOCK_WAIT * self._market.timeout
        with self._holding(wait) as held:
            if not held:
                raise TokenStoreError(self._busy(wait))
            try:
                yield
            except OSError as error:
                raise store.unusable(self._cache.folder, error) from None

    def _busy(self, wait: float) -> str:
        return (
            f"Another process has held the key's lock for {wait:.0f} s. Nothing was changed; "
            f"look for a hanging process that uses {self._lock.path}."
        )

    def _adopt(self, token: Token, *, held: bool) -> None:
        """Give a token that only a sibling market has to this one as well."""
        if held and self._cache.read()[0] is not token:
            with contextlib.suppress(OSError):
                self._cache.save(token, datetime.now(UTC))
