"""Serving one market's token: from memory, then its file, then renewal under the key's lock.

A cached token costs an attribute and a look at the clock; once a second a `stat` tells whether
another process renewed. Everything heavy (HTTP, locking, validation of settings) is imported when a
renewal is due, and one thread renews while the others go on with the token that still serves.
"""

from __future__ import annotations

import time

from tokencore.cache import Cache
from tokencore.configured import Configured
from tokencore.errors import ConfigurationError, TokenError, TokenUnavailableError
from tokencore.market import fingerprint
from tokencore.moments import UTC, datetime, timedelta

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tokencore.keeper import Keeper
    from tokencore.market import Market
    from tokencore.tokens import Token

FRESH = 0.9  # seconds for which the token in memory is served without a look at its file
AHEAD_PAUSE = 1.0  # seconds between two looks at whether a renewal ahead is due; the record decides


class Serving:
    """What a program with orders to place needs of a manager: a token that is valid now, as fast as can be."""

    __slots__ = ("__dict__", "__weakref__", "_text", "_token")  # what `vars` shows has no secret

    def __init__(self, *, configured: Configured | None = None) -> None:
        """Read the settings, unless `configured` has them; neither a token file nor KIS is touched yet.

        Raises:
            ConfigurationError: the settings cannot be read, or the market is not configured.

        """
        self._configured = configured or Configured()
        self.market = self._read_market()
        self._text = ""
        self._token: Token | None = None  # whose text that is
        self._fresh_until = 0.0  # monotonic seconds
        self._calm_until = 0.0  # epoch seconds: no renewal is due before it
        self._next_try = 0.0  # monotonic seconds
        self._cache_made: Cache | None = None
        self._keeper_made: Keeper | None = None

    def __repr__(self) -> str:
        market = getattr(self, "market", None)  # none yet where an error's traceback shows what was being made
        return f"{type(self).__name__}({market.name!r}, {market.environment!r})" if market else type(self).__name__

    def __reduce__(self) -> str:
        raise TypeError("a token manager knows credentials and is not pickled; make it anew where it is needed")

    def get_api_url(self) -> str:
        """Where KIS is asked: a base URL without a trailing slash."""
        raise NotImplementedError

    def get_app_credentials(self) -> tuple[str, str]:
        """The app key and the app secret."""
        raise NotImplementedError

    def get_token_file_prefix(self) -> str:
        """What the names of the market's files begin with, such as `us_`."""
        raise NotImplementedError

    def get_valid_token(self, valid_until: datetime | None = None) -> str:
        """A token that is valid now, and until `valid_until` (aware) if that is given; renewed if it must be.

        While the present token is valid it is served whatever fails. Without one, the call waits for KIS
        and, inside the cool-down of an earlier request, up to a minute for its turn.

        Raises:
            IssuanceLimitError: a limit forbids a request until its `retry_at`.
            CredentialsError: KIS refused the key or the secret; a person has to act.
            IssuerUnavailableError: KIS is down or unreachable.
            TokenUnavailableError: no token that KIS would issue now lasts to `valid_until`.
            TokenStoreError: the token directory cannot be used.
            ConfigurationError: the settings are incomplete, or `valid_until` has no time zone.
                Whatever is raised, a token that is still valid stays where it is.

        """
        if valid_until is None and (time.monotonic() < self._fresh_until or self._unchanged()):
            return self._text
        if valid_until is not None and getattr(valid_until, "tzinfo", None) is None:
            raise ConfigurationError("valid_until must be a datetime with a time zone. Nothing was issued; pass one.")
        return self._consult(valid_until).access_token

    def token_at_hand(self) -> str | None:
        """The valid token where it is cached and no renewal is due; None where `get_valid_token` might wait for KIS."""
        if time.monotonic() < self._fresh_until or self._unchanged():
            return self._text
        now, token = datetime.now(UTC), self.load_token()
        if token is None or not token.serves(now, max(self.market.buffer, self.market.proactive_window)):
            return None
        self._remember(token, now)
        return token.access_token

    def load_token(self) -> Token | None:
        """The token in the market's file, valid or not; None where there is none of this key."""
        return self._cache.read()[0]

    def newest_token(self) -> Token | None:
        """The token of the key that lasts longest, whichever of its markets has it."""
        return self._cache.newest()

    def is_token_expired(self) -> bool:
        """Whether there is no token that counts as valid now."""
        token = self.load_token()
        return token is None or not token.serves(datetime.now(UTC), self.market.buffer)

    def sharing(self) -> list[str]:
        """The configured markets with this key, in the settings' order: they share one token and one issuance."""
        return self._configured.sharing(self._cache.fingerprint, self.market.environment)

    def key_exchanges(self) -> list[str]:
        """The exchanges of all markets with this key, as the user wrote them."""
        found = [self._configured.market(name).exchanges for name in self.sharing()]
        return list(dict.fromkeys(code for codes in found for code in codes))

    def _consult(self, valid_until: datetime | None) -> Token:
        now = datetime.now(UTC)
        until = now if valid_until is None else max(now, valid_until)
        buffer, token = self.market.buffer, self.load_token()
        if token is None or not token.serves(until, buffer):
            self._refuse_hopeless(token, now, until)
            token = self._keeper.obtain(
                lambda found: found.serves(max(until, datetime.now(UTC)), buffer),
                f"get {self.market.name}",
            )
        self._remember(token, now)
        if token.expires_at - timedelta(seconds=self.market.proactive_window) <= now:
            token = self._renew_ahead(token, now)
        return token

    def _unchanged(self) -> bool:
        """Whether one `stat` shows that the token remembered still stands; it is then fresh for as long again."""
        token = self._token
        if token is None or time.time() >= self._calm_until or not self._cache.still_has(token):
            return False
        self._fresh_until = time.monotonic() + FRESH
        return True

    def _remember(self, token: Token, now: datetime) -> None:
        left = (token.expires_at - now).total_seconds() - self.market.buffer
        self._text, self._token = token.access_token, token
        self._calm_until = token.expires_at.timestamp() - max(self.market.buffer, self.market.proactive_window) - FRESH
        self._fresh_until = time.monotonic() + min(FRESH, left)

    def _renew_ahead(self, token: Token, now: datetime) -> Token:
        if time.monotonic() < self._next_try:
            return token
        self._next_try = time.monotonic() + AHEAD_PAUSE
        try:
            newer = self._keeper.renew_ahead(
                token, f"ahead {self.market.name}", lambda: self._in_served_session(token, now)
            )
        except Exception as error:  # noqa: BLE001 - whatever fails, settings and imports too, the present token is served
            self._next_try = time.monotonic() + max(AHEAD_PAUSE, self.market.issue_interval)
            _warn(error)
            return token
        if newer is None:
            return token
        self._remember(newer, now)
        return newer

    def _in_served_session(self, token: Token, now: datetime) -> bool:
        from tokencore.status import in_served_session  # calendars and validation, for the one who would issue

        return in_served_session(self.key_exchanges(), token, now, self.market.buffer)

    def _refuse_hopeless(self, token: Token | None, now: datetime, until: datetime) -> None:
        """Spend no issuance on a token that, living as long as the last one, would not serve either."""
        if token is None or token.issued_at is None or not token.serves(now, self.market.buffer):
            return
        reach = now + (token.expires_at - token.issued_at) - timedelta(seconds=self.market.buffer)
        if until >= reach:
            raise TokenUnavailableError(
                f"Even a new token would last only until {reach.isoformat(timespec='seconds')}, not until "
                f"{until.isoformat(timespec='seconds')}. Nothing was issued and the present token still serves; "
                "ask again nearer to that time.",
            )

    def _read_market(self) -> Market:
        """The market that the file prefix names, configured or not: a subclass brings what is its own."""
        name = self.get_token_file_prefix().rstrip("_").lower()
        self._configured.values.setdefault("markets", {}).setdefault(name, {})
        return self._configured.market(name)

    def _app_key(self) -> str:
        return self.get_app_credentials()[0].strip()

    @property
    def _cache(self) -> Cache:
        if self._cache_made is None:
            app_key, url = self._app_key(), self.get_api_url().rstrip("/")
            own = self.get_token_file_prefix()
            environment = self.market.environment
            siblings = self._configured.prefixes(fingerprint(app_key, url), environment)
            self._cache_made = Cache(self.market.token_dir, url, environment, app_key, siblings, own=own)
        return self._cache_made

    @property
    def _keeper(self) -> Keeper:
        if self._keeper_made is None:
            from tokencore.keeper import Keeper  # not on the path of a cached token

            app_key, app_secret = self.get_app_credentials()
            url = self.get_api_url().rstrip("/")
            self._keeper_made = Keeper(self.market, self._cache, (app_key.strip(), app_secret.strip()), url)
        return self._keeper_made


def _warn(error: Exception) -> None:
    import logging  # not on the path of a cached token

    told = error if isinstance(error, TokenError) else type(error).__name__  # an unknown error's text may hold anything
    logging.getLogger("tokencore").warning("The renewal ahead failed: %s", told)
