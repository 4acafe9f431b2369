"""The managers: one market's token, from memory, then its file, then renewal under the key's lock.

A cached token costs an attribute and a look at the clock; once a second a `stat` tells whether
another process renewed. Everything heavy (HTTP, locking, validation of settings) is imported when a
renewal is due, and one thread renews while the others go on with the token that still serves.
"""

from __future__ import annotations

import time

from tokencore import sources
from tokencore.cache import Cache
from tokencore.errors import ConfigurationError, TokenError, TokenUnavailableError
from tokencore.market import Market, fingerprint, market_names
from tokencore.moments import UTC, datetime, timedelta

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from tokencore.keeper import Keeper
    from tokencore.record import Attempt
    from tokencore.sources import Gathered
    from tokencore.status import TokenStatus
    from tokencore.tokens import Token

FRESH = 0.9  # seconds for which the token in memory is served without a look at its file
AHEAD_PAUSE = 1.0  # seconds between two looks at whether a renewal ahead is due; the record decides


class BaseTokenManager:
    """Serves one market's token; thread-safe, fork-safe, and at one with every other process of the machine.

    A subclass states what is its own: `get_api_url`, `get_app_credentials` and `get_token_file_prefix`;
    everything else comes from the settings. It is not pickled: make one where it is needed.
    """

    __slots__ = ("__dict__", "__weakref__", "_text")  # what `vars` shows has no secret

    def __init__(self, *, configured: Configured | None = None) -> None:
        """Read the settings, unless `configured` has them; neither a token file nor KIS is touched yet.

        Raises:
            ConfigurationError: the settings cannot be read, or the market is not configured.

        """
        self._configured = configured or Configured()
        self.market = self._read_market()
        self._text = ""
        self._fresh_until = 0.0  # monotonic seconds
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
        if valid_until is None and time.monotonic() < self._fresh_until:
            return self._text
        if valid_until is not None and getattr(valid_until, "tzinfo", None) is None:
            raise ConfigurationError("valid_until must be a datetime with a time zone. Nothing was issued; pass one.")
        return self._consult(valid_until).access_token

    def token_at_hand(self) -> str | None:
        """The valid token where it is cached and no renewal is due; None where `get_valid_token` might wait for KIS."""
        if time.monotonic() < self._fresh_until:
            return self._text
        now, token = datetime.now(UTC), self.load_token()
        if token is None or not token.serves(now, max(self.market.buffer, self.market.proactive_window)):
            return None
        self._remember(token, now)
        return token.access_token

    def load_token(self) -> Token | None:
        """The token in the market's file, valid or not; None where there is none of this key."""
        return self._cache.read()[0]

    def save_token(self, token: Token) -> None:
        """Save `token` for every market of the key.

        Raises:
            TokenStoreError: it could not be written; what was there before still is.

        """
        self._keeper.save(token)
        self._fresh_until = 0.0

    def delete_token(self) -> bool:
        """Remove the market's token file; whether there was one. The issuance record stays.

        Raises:
            TokenStoreError: it cannot be removed.

        """
        self._fresh_until = 0.0
        return self._keeper.delete()

    def is_token_expired(self) -> bool:
        """Whether there is no token that counts as valid now."""
        token = self.load_token()
        return token is None or not token.serves(datetime.now(UTC), self.market.buffer)

    def get_token_status(self) -> TokenStatus:
        """What is known of the market's token, as `tokencore check --json` prints it. Writes and asks nothing."""
        from tokencore.settings import overrides  # not on the path of a cached token
        from tokencore.status import next_need

        now = datetime.now(UTC)
        return self.status_at(now, next_need(self.market.exchanges, now, overrides()))

    def status_at(self, now: datetime, need: tuple[datetime, datetime] | None) -> TokenStatus:
        """The same at `now` (aware), for who has asked the calendars for the next `need` already."""
        from tokencore.status import token_status  # not on the path of a cached token

        return token_status(self.market, self._cache, now, need)

    def get_token_info(self) -> str:
        """The same for people: a few aligned lines, times in KST and in this machine's zone."""
        from tokencore.view import info_text

        return info_text(self.get_token_status())

    def refresh(self, *, force: bool = False, reason: str = "", by: str = "") -> bool:
        """Renew now; True for a new token, False where KIS handed back the present one.

        Without `force` it declines while KIS would hand back the same token or the ceiling is reached.
        `reason` (80 characters) and `by` whom (40) go into the issuance record.

        Raises:
            ConfigurationError: one of these looks like a key; nothing was asked.
            IssuanceLimitError: declined; `retry_at` tells until when. The minute limit holds for `force` too.
            CredentialsError, IssuerUnavailableError, TokenStoreError: what the request met.
                The present token is untouched.

        """
        self._fresh_until = 0.0
        from tokencore.remarks import Note  # not on the path of a cached token

        return self._keeper.refresh(force=force, note=Note(reason or "refresh", by).checked())

    def report_rejected(self, token: str) -> str:
        """Tell that KIS rejected `token` on a business call (EGW00121, EGW00123); the token to use instead.

        Where another process has renewed already, its token is returned. Otherwise the token is marked
        dead for all processes and renewed, as soon as KIS would issue another one.

        Raises:
            IssuanceLimitError: it is younger than six hours, in which KIS hands the dead token back;
                `retry_at` tells when a new one can be had.
            TokenError: the renewal failed; see `get_valid_token`.

        """
        self._fresh_until = 0.0
        cached = (self._cache.newest(), self.load_token())
        if any(known is not None and known.access_token == token for known in cached):
            self._keeper.mark_rejected(token, datetime.now(UTC))
        return self._consult(None).access_token

    def get_approval_key(self, rejected: str = "") -> str:
        """The key for KIS's websocket, one for all processes and markets of the app key; it lives for 24 hours.

        With the one that KIS has `rejected`, another one; where another process has replaced it already, that.

        Raises:
            TokenError: there is none, and none could be had; see `approval.ApprovalKeys.obtain`.

        """
        from tokencore.approval import ApprovalKeys  # not on the path of a cached token

        credentials, url = self.get_app_credentials(), self.get_api_url().rstrip("/")
        app_key, app_secret = (word.strip() for word in credentials)
        return ApprovalKeys(self.market, self._cache.fingerprint, (app_key, app_secret), url).obtain(rejected)

    def revoke(self) -> bool:
        """Make KIS forget the present token and mark it dead for every market of the key; whether there was one.

        Raises:
            IssuerUnavailableError: KIS did not revoke it; it stays valid.

        """
        token = self._cache.newest()
        if token is None:
            return False
        self._fresh_until = 0.0
        self._keeper.revoke(token.access_token)
        self._keeper.mark_rejected(token.access_token, datetime.now(UTC))
        return True

    def probe(self, access_token: str | None = None) -> tuple[bool | None, str]:
        """Whether KIS accepts the token, the cached one by default, on a quote call (None: it told nothing), and why.

        Raises:
            TokenUnavailableError: there is no token to try.

        """
        token = self.load_token() if access_token is None else None
        access_token = token.access_token if token else access_token
        if access_token is None:
            raise TokenUnavailableError(f"There is no token for {self.market.name!r} to try.")
        domestic = not self.market.exchanges or bool({"KRX", "NXT", "XKRX"} & set(self.market.exchanges))
        return self._keeper.probe(access_token, domestic=domestic)

    def export(self, client: str, folder: str) -> list[str]:
        """Write the token for another client (`mojito2`, `python-kis`, `kis-auth`) into `folder`; the files' paths.

        Raises:
            ConfigurationError: the place is another key's or environment's, or KIS_HTS_ID is missing.
            TokenError: there is no token and none could be had, or the system refuses; the token is untouched.

        """
        self._keeper.check_export(client, folder)
        self.get_valid_token()
        return self._keeper.export(client, folder)

    def copy_token(self) -> None:
        """Bring the copies for other clients that the settings ask for up to date; what fails is told in the log only.

        Every change of the token does so too: this is for copies that failed then, or that somebody removed since.
        """
        self._keeper.copy()

    def take(self, token: Token, *, force: bool = False, proven: bool = False) -> bool:
        """Save a token that was issued elsewhere for all markets of the key; False where it was known, see `Keeper`.

        Raises:
            ConfigurationError: the present token is the better one, and `force` is not given.
            TokenUnavailableError: KIS has rejected it, and it is not `proven` to work again.
            TokenStoreError: it could not be written; what was there before still is.

        """
        self._fresh_until = 0.0
        return self._keeper.take(token, force=force, proven=proven)

    def newest_token(self) -> Token | None:
        """The token of the key that lasts longest, whichever of its markets has it."""
        return self._cache.newest()

    def renew_due(self, present: Token | None, reason: str) -> bool:
        """Have a successor of `present`, on which the rule was judged; False where another was quicker.

        It waits while another process renews, but for no cool-down.

        Raises:
            TokenError: a limit or a pause after failures forbids it, or the request failed; the present
                token is untouched.

        """
        self._fresh_until = 0.0
        return self._keeper.renew_due(present, reason)

    def renewal_allowed_from(self, now: datetime) -> datetime | None:
        """When the limits allow a renewal that is due at `now` (aware); None where only a person can bring it about."""
        return self._keeper.allowed_from(now)

    def history(self) -> list[Attempt]:
        """The key's issuance record, oldest attempt first; reading changes nothing."""
        from tokencore.record import IssuanceRecord  # not on the path of a cached token

        return IssuanceRecord(self._cache.folder, self._cache.fingerprint).attempts()

    def sharing(self) -> list[str]:
        """The configured markets with this key, in the settings' order: they share one token and one issuance."""
        return self._configured.sharing(self._cache.fingerprint)

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

    def _remember(self, token: Token, now: datetime) -> None:
        left = (token.expires_at - now).total_seconds() - self.market.buffer
        self._text = token.access_token
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
        """The key alone: its secret may be in a keyring, which is slow and may ask a person for a password."""
        if type(self).get_app_credentials is TokenManager.get_app_credentials:
            return self.market.identified()
        return self.get_app_credentials()[0].strip()

    @property
    def _cache(self) -> Cache:
        if self._cache_made is None:
            app_key, url = self._app_key(), self.get_api_url().rstrip("/")
            own = self.get_token_file_prefix()
            siblings = self._configured.prefixes(fingerprint(app_key, url))
            prefixes = [own, *(prefix for prefix in siblings if prefix != own)]
            self._cache_made = Cache(self.market.token_dir, url, self.market.environment, app_key, prefixes)
        return self._cache_made

    @property
    def _keeper(self) -> Keeper:
        if self._keeper_made is None:
            from tokencore.keeper import Keeper  # not on the path of a cached token

            app_key, app_secret = self.get_app_credentials()
            url = self.get_api_url().rstrip("/")
            self._keeper_made = Keeper(self.market, self._cache, (app_key.strip(), app_secret.strip()), url)
        return self._keeper_made


class TokenManager(BaseTokenManager):
    """The token of a configured market, by its name: `us`, `kr`, or one of the user's own."""

    def __init__(self, market: str, *, configured: Configured | None = None) -> None:
        """Take the settings (`configured`, or read now) and see whether there is a valid token; KIS is not asked yet.

        Raises:
            ConfigurationError: the settings cannot be read, or the market is not configured.

        """
        self._name = market
        super().__init__(configured=configured)
        if self.market.app_key and self.is_token_expired():
            _import_ahead()

    def get_api_url(self) -> str:
        """The market's base URL, or its environment's."""
        return self.market.base_url

    def get_app_credentials(self) -> tuple[str, str]:
        """The market's own credentials, or those for all markets.

        Raises:
            ConfigurationError: one of them is not set.

        """
        return self.market.credentials()

    def get_token_file_prefix(self) -> str:
        """The market's name and an underscore."""
        return f"{self._name}_"

    def _read_market(self) -> Market:
        return self._configured.market(self._name)


class USTokenManager(TokenManager):
    """The token for the US exchanges."""

    def __init__(self) -> None:
        """Read the settings of `us`, see `TokenManager`."""
        super().__init__("us")


class KRTokenManager(TokenManager):
    """The token for the Korean exchanges."""

    def __init__(self) -> None:
        """Read the settings of `kr`, see `TokenManager`."""
        super().__init__("kr")


def _import_ahead() -> None:
    """Where a renewal will be due at once, its imports are done before anyone waits for the token."""
    from importlib import import_module

    for room in ("filelock", "tokencore.issuer", "tokencore.keeper", "tokencore.settings"):
        import_module(room)


def _warn(error: Exception) -> None:
    import logging  # not on the path of a cached token

    told = error if isinstance(error, TokenError) else type(error).__name__  # an unknown error's text may hold anything
    logging.getLogger("tokencore").warning("The renewal ahead failed: %s", told)


class Configured:
    """One reading of the settings, and which markets share a key: for one manager, or for all that a command needs."""

    __slots__ = ("_by_key", "values")  # what `vars` shows has no secret

    def __init__(self, found: Gathered | None = None) -> None:
        """Take the settings that were found, or gather them.

        Raises:
            ConfigurationError: they cannot be read.

        """
        self.values: dict[str, Any] = (found or sources.gather()).values
        self._by_key: dict[str, list[str]] | None = None

    def __reduce__(self) -> str:
        raise TypeError("the settings hold credentials and are not pickled; gather them where they are needed")

    def market(self, name: str) -> Market:
        """The market of that name.

        Raises:
            ConfigurationError: it is not configured, or a setting cannot be used.

        """
        try:
            return Market(name, self.values)
        except (ValueError, TypeError):
            from tokencore.settings import Settings  # only a mistake needs its words

            Settings.load()
            raise

    def sharing(self, key_fingerprint: str) -> list[str]:
        """The configured markets whose key it is."""
        return [prefix.removesuffix("_") for prefix in self.prefixes(key_fingerprint)]

    def prefixes(self, key_fingerprint: str) -> list[str]:
        """What the names of their files begin with; all are looked at once, as each of a thousand managers asks."""
        if self._by_key is None:
            found: dict[str, list[str]] = {}
            for market in map(self.market, market_names(self.values)):
                if market.app_key:
                    found.setdefault(fingerprint(market.app_key, market.base_url), []).append(f"{market.name}_")
            self._by_key = found
        return self._by_key.get(key_fingerprint, [])
