"""One key's renewal: check, lock, check again, ask the record, issue, save, for every market of the key.

The old token is never given up before its successor is on disk, and no refusal is answered with
another request: a call makes two requests at most, with a whole cool-down between them.
"""

from __future__ import annotations

import logging
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from tokencore import limits, record
from tokencore.custody import LOCK_WAIT, Custody
from tokencore.errors import IssuanceLimitError, IssuerUnavailableError, TokenStoreError, TokenUnavailableError
from tokencore.limits import Intent, Standing
from tokencore.lock import pause_after
from tokencore.record import Outcome
from tokencore.remarks import Note

if TYPE_CHECKING:
    from collections.abc import Callable

    from tokencore.tokens import Token

_log = logging.getLogger("tokencore")


class Keeper(Custody):
    """Renews the token of one key for all its markets; any number of them, in any process, act as one."""

    def obtain(self, serves: Callable[[Token], bool], reason: str) -> Token:
        """A token that `serves`, renewed if it must be; in a cool-down it waits, once, for the winner's or its turn.

        Raises:
            IssuanceLimitError: a rule forbids a request until `retry_at`, also after the wait.
            CredentialsError, IssuerUnavailableError, TokenStoreError: what the request met.
            TokenUnavailableError: another process holds the key's lock for too long, or KIS's token does not serve.
                In every case the present token stays where it is.

        """
        try:
            return self._renew(Intent.REQUIRED, serves, Note(reason))[0]
        except IssuanceLimitError as limit:
            if limit.cause != "minute":
                raise
            last = record.latest(self._issuance.attempts())
        if token := self._await(serves):
            return token
        return self._renew(Intent.REQUIRED, serves, Note(reason), waited_out=last.at if last else None)[0]

    def renew_ahead(self, present: Token, reason: str, unwanted: Callable[[], bool]) -> Token | None:
        """Try to have a successor of `present` while that still serves; None when it is not to be had now.

        It waits for nobody: while another thread or process renews, it answers None. Whether a renewal is
        `unwanted` is asked last, by the one who would issue.

        Raises:
            CredentialsError, IssuerUnavailableError, TokenStoreError: what the request met.
                The present token goes on serving.

        """
        try:
            return self._renew(
                Intent.AHEAD, lambda found: _newer(found, present), Note(reason), wait=0, unwanted=unwanted
            )[0]
        except (IssuanceLimitError, TokenUnavailableError) as pause:
            _log.debug("No renewal ahead: %s", pause)
        return None

    def renew_due(self, present: Token | None, reason: str) -> bool:
        """Have a successor of `present`, waiting for the lock but for no cool-down; False where another was quicker.

        Raises:
            TokenError: a rule or a pause forbids it, or the request failed; the present token is untouched.
            TokenStoreError: also where the new token could not be saved; this process goes on with it all the same.

        """
        token, issued = self._renew(Intent.DUE, lambda found: _newer(found, present), Note(reason))
        self.require_saved(token)
        return issued and _newer(token, present)

    def allowed_from(self, now: datetime) -> datetime | None:
        """When the limits allow a renewal that is due at `now`; None where refused credentials forbid it."""
        standing = Standing(now, self._issuance.attempts(), self._cache.newest(), self._issuance.credentials)
        return limits.allowed_from(standing, self._market)

    def refresh(self, *, force: bool, note: Note) -> bool:
        """Renew now; True for a new token, False where KIS handed back the present one.

        Raises:
            TokenError: a rule forbids it, or the request failed; the present token is untouched.
            TokenStoreError: also where the new token could not be saved; this process goes on with it all the same.

        """
        before = self._cache.newest()
        intent = Intent.FORCE if force else Intent.REFRESH
        token, _ = self._renew(intent, lambda found: before is None or found.expires_at > before.expires_at, note)
        self.require_saved(token)
        return before is None or token.access_token != before.access_token

    def _renew(
        self,
        intent: Intent,
        serves: Callable[[Token], bool],
        note: Note,
        *,
        waited_out: datetime | None = None,
        wait: float | None = None,
        unwanted: Callable[[], bool] = lambda: False,
    ) -> tuple[Token, bool]:
        """A token that `serves`, and whether it was issued here rather than by someone quicker."""
        wait = LOCK_WAIT * self._market.timeout if wait is None else wait
        began = datetime.now(UTC)
        with self._holding(wait, lambda: self._serving(serves) is not None) as held:
            if token := self._serving(serves):
                self._adopt(token, held=held)
                return token, False
            if not held:
                raise TokenUnavailableError(self._busy(wait))
            now, present = datetime.now(UTC), self._cache.newest()
            standing = Standing(now, self._issuance.attempts(), present, self._issuance.credentials, waited_out)
            limits.check(intent, standing, self._market)
            self._share_failure(standing, began)
            if unwanted():
                raise TokenUnavailableError(
                    "The present token serves the running session to its end: no swap inside it."
                )
            token = self._issuance.issue(note, standing)
        if token.rejected_at is not None:  # KIS handed the dead one back: only the six hours speak now
            limits.check(Intent.REFRESH, standing._replace(token=token, attempts=()), self._market)
        if intent is Intent.REQUIRED and not serves(token):
            raise TokenUnavailableError(self._useless(token))
        return token, True

    def _share_failure(self, standing: Standing, began: datetime) -> None:
        """Who waited for the lock while its holder could not reach KIS need not find that out again."""
        last = standing.attempts[-1] if standing.attempts else None
        if last and last.outcome is Outcome.UNREACHABLE and last.at >= began:
            serves = limits.what_serves(standing.token, standing.now, self._market.buffer)
            raise IssuerUnavailableError(
                f"KIS cannot be reached, as another process found at {limits.tell(last.at)}. {serves} "
                "To do: check the network and KIS_BASE_URL; then try again."
            )

    def _useless(self, token: Token) -> str:
        if token.rejected_at is not None:
            return (
                f"KIS handed back the token that it has rejected since {limits.tell(token.rejected_at)}. "
                "Look at KIS's notices of maintenance, and try again later."
            )
        return (
            f"KIS's token expires too early for what was asked, at {limits.tell(token.expires_at)} "
            f"(and KIS_BUFFER is {self._market.buffer:.0f} s). It is saved; ask for less, or later."
        )

    def require_saved(self, token: Token) -> None:
        """Return where a market's file has `token`: who renews for others has not renewed what one process keeps.

        Raises:
            TokenStoreError: none has it, as none could be written.

        """
        if self._cache.is_only_here(token):
            raise TokenStoreError(
                f"KIS issued a token that could not be saved in {self._cache.folder}: only this process has it. Free "
                "space or mend the permissions, and renew again: for six hours KIS hands the same one out."
            )

    def _serving(self, serves: Callable[[Token], bool]) -> Token | None:
        token = self._cache.newest()
        return token if token and serves(token) else None

    def _await(self, serves: Callable[[Token], bool]) -> Token | None:
        """Poll the cache for the winner's token until the cool-down is over, by the monotonic clock."""
        until = limits.cooldown_until(self._issuance.attempts(), datetime.now(UTC), self._market.issue_interval)
        left = (until - datetime.now(UTC)).total_seconds() if until else 0.0
        if left > 1:
            _log.warning("Waiting %.0f s: KIS allows one request a minute.", left)
        began = time.monotonic()
        end = began + min(left, limits.pause(1, self._market.issue_interval).total_seconds())
        while not (token := self._serving(serves)) and (now := time.monotonic()) < end:
            time.sleep(min(pause_after(now - began), end - now))
        return token


def _newer(token: Token, before: Token | None) -> bool:
    return token.rejected_at is None and (before is None or token.expires_at > before.expires_at)
