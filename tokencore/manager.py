"""The managers: one market's token, served to programs, and looked at, renewed and handed over for people."""

from __future__ import annotations

from tokencore.errors import TokenUnavailableError
from tokencore.moments import UTC, datetime
from tokencore.serving import Serving

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tokencore.configured import Configured
    from tokencore.market import Market
    from tokencore.record import Attempt
    from tokencore.status import TokenStatus
    from tokencore.tokens import Token


class BaseTokenManager(Serving):
    """Serves one market's token; thread-safe, fork-safe, and at one with every other process of the machine.

    A subclass states what is its own: `get_api_url`, `get_app_credentials` and `get_token_file_prefix`;
    everything else comes from the settings. It is not pickled: make one where it is needed.
    """

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

    def renew_due(self, present: Token | None, reason: str) -> bool:
        """Have a successor of `present`, on which the rule was judged; False where another was quicker.

        It waits while another process renews, but for no cool-down.

        Raises:
            TokenError: a limit or a pause after failures forbids it, or the request failed; the present
                token is untouched.

        """
        self._fresh_until = 0.0
        return self._keeper.renew_due(present, reason)

    def require_saved(self) -> None:
        """Return where the key's token is in a file, or there is none: for who renews for others.

        Raises:
            TokenStoreError: only this process has it, as no file could be written.

        """
        if token := self._cache.newest():
            self._keeper.require_saved(token)

    def renewal_allowed_from(self, now: datetime) -> datetime | None:
        """When the limits allow a renewal that is due at `now` (aware); None where only a person can bring it about."""
        return self._keeper.allowed_from(now)

    def history(self) -> list[Attempt]:
        """The key's issuance record, oldest attempt first; reading changes nothing."""
        from tokencore.record import IssuanceRecord  # not on the path of a cached token

        return IssuanceRecord(self._cache.folder, self._cache.fingerprint).attempts()


class TokenManager(BaseTokenManager):
    """The token of a configured market, by its name: `us`, `kr`, or one of the user's own."""

    def __init__(self, market: str, *, configured: Configured | None = None) -> None:
        """Take the settings and see whether there is a valid token; KIS is not asked yet.

        With `configured`, which many managers share, no token is looked for: most of them are read once, and later.

        Raises:
            ConfigurationError: the settings cannot be read, or the market is not configured.

        """
        self._name = market
        super().__init__(configured=configured)
        if not self.market.app_key:
            return
        if configured:
            self._app_key()  # a secret that is missing is said now
        elif self.is_token_expired():
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

    def _app_key(self) -> str:
        """The key alone: its secret may be in a keyring, which is slow and may ask a person for a password."""
        if type(self).get_app_credentials is TokenManager.get_app_credentials:
            return self.market.identified()
        return super()._app_key()


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
