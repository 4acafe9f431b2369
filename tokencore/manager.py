"""Token managers: one market's token for programs, from memory, then its file, then a renewal under the key's lock.

A cached token costs an attribute access and a clock reading, and once a second a `stat`. Heavy modules (HTTP, locking,
validation of settings) are imported only when a renewal is due.
"""

from __future__ import annotations

import time
from contextlib import ExitStack, suppress
from datetime import UTC, datetime, timedelta
from functools import cached_property

from tokencore import redaction
from tokencore.config import market_of_program, read_market
from tokencore.config.market import ISSUE_INTERVAL, named
from tokencore.errors import ConfigurationError, TokenError, TokenStoreError, TokenUnavailableError
from tokencore.sealing import Sensitive, sealed, sealed_class
from tokencore.stores import open_store
from tokencore.tokens import format_time, longest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from threading import Event

    from tokencore.attempts import Attempt
    from tokencore.config.market import Market
    from tokencore.keys import Key
    from tokencore.renewer import Renewer
    from tokencore.reports.status import MarketStatus
    from tokencore.stores.base import Store
    from tokencore.tokens import Token

FRESH = 0.9  # seconds for which the token in memory is served without checking its file
AHEAD_PAUSE = 1.0  # seconds between two attempts to renew ahead of the expiry; the record decides whether one asks KIS
PATIENCE = 0.8  # seconds that a caller with a valid token waits for its successor
AHEAD_FAILED = "The renewal ahead failed; the present token still serves"
BEGIN, LEAVE = 1.0, 0.2  # seconds that an exiting program waits for a renewal to begin, and for its request to leave


@sealed_class(but=("get_valid_token",))
class BaseTokenManager(Sensitive):
    """Serves one market's token; thread-safe, fork-safe, and coordinated with every other process on the machine.

    A subclass defines `get_api_url`, `get_app_credentials` and `get_token_file_prefix`; everything else comes from the
    settings. Every other method may raise ConfigurationError (the app key or secret is missing) or TokenStoreError
    (the store cannot be used); what is stored stays.
    """

    __slots__ = ("__dict__", "__weakref__", "_fresh_from", "_fresh_until", "_text", "_token")  # `vars` shows no secret

    def __init__(self) -> None:
        """Read the settings; neither the store nor KIS is touched yet.

        Raises:
            ConfigurationError: the settings cannot be read, or the market is not configured.
        """
        self.market = self._read_market()
        self._text = ""
        self._token: Token | None = None  # the token that has this text
        self._fresh_from = self._fresh_until = 0.0  # epoch seconds, which a suspended machine's clock counts too
        self._calm_until = 0.0  # epoch seconds; no renewal is due before
        self._next_try = 0.0  # monotonic seconds
        self._next_save = 0.0  # monotonic seconds; apart, so that a full disk does not hold up the next renewal

    def __repr__(self) -> str:
        market = getattr(self, "market", None)  # missing if a traceback shows the object half made
        return f"{type(self).__name__}({market.name!r}, {market.environment!r})" if market else type(self).__name__

    def get_api_url(self) -> str:
        """Return KIS's base URL, without a trailing slash.

        Raises:
            NotImplementedError: the subclass does not define it.
        """
        raise NotImplementedError(_WHAT_TO_GIVE)

    def get_app_credentials(self) -> tuple[str, str]:
        """Return the app key and the app secret.

        Raises:
            NotImplementedError: the subclass does not define it.
        """
        raise NotImplementedError(_WHAT_TO_GIVE)

    def get_token_file_prefix(self) -> str:
        """Return the prefix of the names of the market's files, such as `us_`.

        Raises:
            NotImplementedError: the subclass does not define it.
        """
        raise NotImplementedError(_WHAT_TO_GIVE)

    def get_valid_token(self, valid_until: datetime | None = None) -> str:
        """Return a token that is valid now, and until `valid_until` (aware) if given, renewing it only if necessary.

        As long as the present token is valid it is served whatever fails, and no call waits longer than a second for
        KIS. Without one, the call waits for KIS and, during the cool-down after an earlier request, for its turn.

        Raises:
            IssuanceLimitError: a limit forbids a request until its `retry_at`.
            CredentialsError: KIS refused the key or the secret; a person has to act.
            IssuerUnavailableError: KIS is down or unreachable.
            TokenUnavailableError: no token that KIS would issue now lasts to `valid_until`.
            TokenStoreError: the token directory cannot be used, and no valid token is in memory.
            ConfigurationError: the settings are incomplete, or `valid_until` has no time zone.
                Whatever is raised, a token that is still valid stays stored.
        """
        if valid_until is None and (self._fresh_from <= time.time() < self._fresh_until or self._unchanged()):
            return self._text
        return self._serving(valid_until).access_token

    def token_at_hand(self) -> str | None:
        """Return the cached token if it is valid and no renewal is due; None if `get_valid_token` might wait."""
        if self._fresh_from <= time.time() < self._fresh_until or self._unchanged():
            return self._text
        now, token = datetime.now(UTC), self.load_token()
        if token is None or not token.serves(now, max(self.market.buffer, self.market.proactive_window)):
            return None
        self._remember(token)
        return token.access_token

    def load_token(self) -> Token | None:
        """Return the token of the market's key, valid or not; None if there is none."""
        return self._store.read()[0]

    def save_token(self, token: Token) -> None:
        """Save `token` for every market of the key.

        Raises:
            TokenStoreError: it could not be written; what was there before still is.
        """
        with self._changing():
            self._store.save(token)

    def delete_token(self) -> bool:
        """Remove the market's token file, and with the last market the key's; the record stays.

        Return whether there was a file.

        Raises:
            TokenStoreError: the file cannot be removed.
        """
        with self._changing():
            return self._store.delete()

    def is_token_expired(self) -> bool:
        """Whether there is no token that counts as valid now."""
        token = self.load_token()
        return token is None or not token.serves(datetime.now(UTC), self.market.buffer)

    def get_token_status(self) -> MarketStatus:
        """Return what is known of the market's token, as `tokencore check --json` prints it; read-only."""
        from tokencore.reports.status import look  # not on the path of a cached token

        return look(self._key.state(datetime.now(UTC), shared=False), self.market).status

    def get_token_info(self) -> str:
        """Return the token's status for people: a few aligned lines, times in KST and in this machine's zone."""
        from tokencore.reports.tables import info_text

        return info_text(self.get_token_status())

    def refresh(self, *, force: bool = False, reason: str = "", by: str = "") -> bool:
        """Renew now; return True for a new token, False if KIS returned the present one again.

        Without `force`, decline while KIS would return the same token or the ceiling is reached. `reason` (up to 80
        characters) and `by`, the person asking (up to 40), go into the issuance record.

        Raises:
            ConfigurationError: `reason` or `by` looks like a key, or a setting cannot be used; no request was made.
            IssuanceLimitError: declined until `retry_at`. The minute limit holds for `force` too.
            CredentialsError, IssuerUnavailableError, TokenStoreError: the renewal failed; the present token stays.
        """
        self._reload()
        return self._key.refresh(force=force, reason=reason or "refresh", by=by)

    def report_rejected(self, token: str) -> str:
        """Report that KIS rejected `token` on a business call (EGW00121, EGW00123); return the token to use instead.

        If another process has renewed already, that is its token. Otherwise `token`, with or without `Bearer` before
        it, is marked dead for all processes and renewed.

        Raises:
            IssuanceLimitError: it is less than six hours old, so KIS would return the dead token until `retry_at`.
            TokenError: the renewal failed; see `get_valid_token`.
        """
        self._forget()
        token = str(token).strip().removeprefix("Bearer ")
        known = (self._store.newest(), self.load_token())
        if any(one is not None and one.access_token == token for one in known):
            self._renewer.reject(token, datetime.now(UTC))
        return self._serving(None).access_token

    def get_approval_key(self, rejected: str = "") -> str:
        """Return the approval key for KIS's websocket, shared by all processes and markets of the app key for 24 hours.

        Pass the key that KIS has `rejected` to get another one: the one that another process already got, if any.

        Raises:
            TokenError: there is none, and none could be issued; see `ApprovalKeys.obtain`.
        """
        from tokencore.clients.approval import ApprovalKeys  # not on the path of a cached token

        if not ApprovalKeys(self.market, self._store, self._renewer).serving(rejected, self.market.buffer):
            self._reload()
        return ApprovalKeys(self.market, self._store, self._renewer).obtain(rejected)

    def revoke(self) -> bool:
        """Revoke the present token at KIS and remove it for every market of the key; return whether there was one.

        Raises:
            IssuerUnavailableError: KIS did not revoke the token; it stays valid.
            TokenStoreError: KIS has revoked it, but it could not be removed.
        """
        token = self._store.newest()
        if token is None:
            return False
        self._forget()
        self._renewer.revoke(token)
        return True

    def export(self, client: str, folder: str) -> list[str]:
        """Write the token for another client (`mojito2`, `python-kis`, `kis-auth`) into `folder`; return the paths.

        A token of this key that the client has issued by itself is taken over instead, if it lasts longer.

        Raises:
            ConfigurationError: a file there is not this key's, KIS_HTS_ID is missing, or there is no such client.
            TokenError: there is no token and none could be issued, or writing failed; the token is untouched.
        """
        exports = self._renewer.copies
        if theirs := exports.check(client, folder):
            with suppress(TokenError):  # another process was quicker, or the store takes nothing
                self.adopt(theirs)
        self._serving(None)
        with ExitStack() as stack:
            with suppress(TokenStoreError):  # mounted read-only; the copy only needs its own folder
                stack.enter_context(self._changing())
            token = self._store.newest()
            if token is None or not token.serves(datetime.now(UTC), 0):  # a fleet's store has just been asked
                raise TokenUnavailableError(
                    "The token was deleted or rejected meanwhile. Nothing was written; try again."
                )
            return exports.write(client, folder, token)

    def adopt(self, token: Token, *, force: bool = False, proven: bool = False) -> bool:
        """Save a token that was issued elsewhere for all markets of the key; return False if it was known already.

        Raises:
            ConfigurationError: the present token lasts longer, and `force` is not given.
            TokenUnavailableError: KIS has rejected this token, and it is not `proven` to work again.
            TokenStoreError: it could not be written; what was there before still is.
        """
        self._forget()
        return self._renewer.adopt(token, force=force, proven=proven)

    def history(self) -> list[Attempt]:
        """Return the key's issuance record, oldest attempt first; read-only."""
        return self._store.attempts()

    # Inside

    def _changing(self) -> AbstractContextManager[None]:
        self._forget()
        return self._renewer.changing()

    def _forget(self) -> None:
        """Serve nothing from memory until the store is read again."""
        self._fresh_until, self._token = 0.0, None

    @sealed
    def _serving(self, valid_until: datetime | None) -> Token:
        if valid_until is not None and getattr(valid_until, "tzinfo", None) is None:
            raise ConfigurationError("valid_until must be a datetime with a time zone. Nothing was issued; pass one.")

        def until() -> datetime:  # computed at each check, so that setting the clock back meanwhile costs no token
            now = datetime.now(UTC)
            return now if valid_until is None else max(now, valid_until)

        now, found = datetime.now(UTC), None
        try:
            found = token = self.load_token()
            if token is None or not token.serves(until(), self.market.buffer):
                _refuse_hopeless(token, now, until(), self.market.buffer)
                self._reload()
                reason = f"get {self.market.name}"
                token, _ = self._renewer.obtain(lambda one: one.serves(until(), self.market.buffer), reason)
        except TokenStoreError as error:  # or the directory is gone, as with a drive that is no longer mounted
            token = self._token
            if found or token is None or not token.serves(until(), self.market.buffer):
                raise
            self._remember(token)
            if time.monotonic() >= self._next_save:
                self._next_save = time.monotonic() + ISSUE_INTERVAL
                _warn("The token in memory still serves", error)
            return token
        self._remember(token)
        if not self._store.saved(token) and time.monotonic() >= self._next_save:  # the disk may have room again
            self._next_save = time.monotonic() + self.market.settings.issue_interval
            self._renewer.sync_copies()
        if token.expires_at - timedelta(seconds=self.market.proactive_window) <= now:
            self._renew_beside(token)
            return longest([token, self._token]) or token
        return token  # what is in memory by now may be an earlier one, read by another thread before this one came

    def _unchanged(self) -> bool:
        """Whether one `stat` shows that the remembered token is still current; if so, it is fresh for `FRESH` again."""
        token = self._token
        if token is None or time.time() >= self._calm_until or not self._store.unchanged(token):
            return False
        self._fresh_from = time.time()
        self._fresh_until = self._fresh_from + FRESH
        return True

    def _remember(self, token: Token) -> None:
        expires = token.expires_at.timestamp()
        self._text, self._token = token.access_token, token
        self._calm_until = expires - max(self.market.buffer, self.market.proactive_window) - FRESH
        self._fresh_from = time.time()
        self._fresh_until = min(self._fresh_from + FRESH, expires - self.market.buffer)

    def _renew_beside(self, token: Token) -> None:
        """Try to renew in a thread; the caller, who has a valid token, waits less than a second for it."""
        if time.monotonic() < self._next_try:
            return
        self._next_try = time.monotonic() + AHEAD_PAUSE
        from threading import Event, Thread  # not on the path of a cached token

        begun = Event()
        thread = Thread(target=self._renew_ahead, args=(token, begun), name="tokencore renewal", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # no thread can be started: the present token serves, and a later call tries
            _warn(AHEAD_FAILED, error)
            return
        thread.join(PATIENCE)
        if thread.is_alive():  # if the program exits now, let the request leave; nobody waits for the answer
            import atexit

            atexit.register(lambda: thread.join(LEAVE) if begun.wait(BEGIN) else None)

    def _renew_ahead(self, token: Token, begun: Event) -> None:
        now, interval = datetime.now(UTC), ISSUE_INTERVAL
        try:
            self._reload()
            interval = self.market.settings.issue_interval
            renewer = self._renewer
            renewer.departing = begun.set
            newer = renewer.renew_ahead(
                token, f"ahead {self.market.name}", lambda: self._key.in_served_session(token, now)
            )
        except Exception as error:  # noqa: BLE001 - whatever fails, the present token is served
            self._next_try = time.monotonic() + max(AHEAD_PAUSE, interval)
            _warn(AHEAD_FAILED, error)
        else:
            if newer is not None:
                self._remember(newer)
        finally:
            begun.set()

    def _read_market(self) -> Market:
        """Return the market named by the file prefix, with the credentials and address from the subclass."""
        name = str(self.get_token_file_prefix() or "").rstrip("_")
        return market_of_program(name, self.get_app_credentials, self.get_api_url())

    def _reload(self) -> None:
        """Read the settings again, so that a key replaced while the program runs is used at the next renewal."""
        self._fresh_until = 0.0
        before, market = self.market, self._read_market()
        if (market.fingerprint, market.token_dir, market.store) != (before.fingerprint, before.token_dir, before.store):
            vars(self).pop("_store", None)
            self._forget()
        vars(self).pop("_key", None)
        vars(self).pop("_renewer", None)
        self.market = market

    @cached_property
    def _store(self) -> Store:
        try:
            self.market.identified()
        except ConfigurationError:  # given since, perhaps
            self.market = self._read_market()
            self.market.identified()  # reports a missing key or secret now, not during a renewal at night
        market = self.market  # another thread may meet another key in the settings, and this store stays with its own
        return open_store(market, lambda: [one.name for one in _sharing(market)])

    @cached_property
    def _renewer(self) -> Renewer:
        from tokencore.renewer import Renewer  # not on the path of a cached token

        store, market = self._store, self.market  # in this order: the store may read the settings again
        return Renewer(market, store, lambda: _sharing(market))

    @cached_property
    def _key(self) -> Key:
        from tokencore.keys import Key  # not on the path of a cached token

        store, market = self._store, self.market
        return Key(_sharing(market), store)


@sealed_class()
class TokenManager(BaseTokenManager):
    """Serves the token of a configured market, given by name: `us`, `kr`, or one of the user's own."""

    def __init__(self, market: str) -> None:
        """Read the settings of `market`; KIS is not asked yet.

        Raises:
            ConfigurationError: the settings cannot be read, or the market is not configured.
        """
        self._name = market
        super().__init__()
        with suppress(TokenError):  # the call that asks for the token raises it
            if self.market.app_key and not redaction.in_program and self.is_token_expired():
                _import_ahead()

    def get_api_url(self) -> str:
        """Return the market's base URL, by default that of its environment."""
        return self.market.base_url

    def get_app_credentials(self) -> tuple[str, str]:
        """Return the market's own credentials, or those for all markets.

        Raises:
            ConfigurationError: one of them is not set.
        """
        return self.market.credentials()

    def get_token_file_prefix(self) -> str:
        """Return the market's name and an underscore."""
        return f"{self.market.name}_"

    def _read_market(self) -> Market:
        """Return the market from the settings, with what a subclass gives itself if it overrides one of the three."""
        self.market, own = read_market(self._name), type(self)
        if (own.get_app_credentials, own.get_api_url) != (TokenManager.get_app_credentials, TokenManager.get_api_url):
            return super()._read_market()
        try:
            self.market.name = named(str(self.get_token_file_prefix() or "").removesuffix("_"))
        except ValueError as error:
            raise ConfigurationError(f"{error}.") from None
        return self.market


@sealed_class()
class USTokenManager(TokenManager):
    """Serves the token for the US exchanges."""

    def __init__(self) -> None:
        """Read the settings of `us`; see `TokenManager`."""
        super().__init__("us")


@sealed_class()
class KRTokenManager(TokenManager):
    """Serves the token for the Korean exchanges."""

    def __init__(self) -> None:
        """Read the settings of `kr`; see `TokenManager`."""
        super().__init__("kr")


_WHAT_TO_GIVE = (
    "A subclass of BaseTokenManager has to give get_api_url(), get_app_credentials() and get_token_file_prefix(); "
    "for a market of the settings use TokenManager(name)."
)


def _sharing(market: Market) -> list[Market]:
    """Return the configured markets with the key of `market`, which comes first."""
    return [market, *(one for one in market.settings.sharing(market) if one.name != market.name)]


def _import_ahead() -> None:
    """Import what a renewal needs, before anyone waits for the token.

    A command asks at once, and of a crowd of commands one renews: most of the others need only the lock.
    """
    from importlib import import_module

    for name in ("filelock", "tokencore.kis.gateway", "tokencore.keys", "tokencore.config.settings"):
        import_module(name)


def _refuse_hopeless(token: Token | None, now: datetime, until: datetime, buffer: float) -> None:
    """Raise if a new token, living as long as the present one, would not serve until `until` either."""
    if token is None or token.issued_at is None or not token.serves(now, buffer):
        return
    serves = token.expires_at - timedelta(seconds=buffer)
    reach = now + (serves - token.issued_at)
    if until >= reach:
        raise TokenUnavailableError(
            f"Even a new token would serve only until {format_time(reach)}, which is earlier than was asked for. "
            f"Nothing was issued. The present token serves until {format_time(serves)}; ask again later."
        )


def _warn(what: str, error: Exception) -> None:
    import logging  # not on the path of a cached token

    detail = error if isinstance(error, TokenError) else type(error).__name__  # other texts may hold secrets
    logging.getLogger("tokencore").warning("%s. %s", what, detail)
