"""One key's renewal: check, lock, check again, ask the record, issue, save, for every market of the key.

The old token is never given up before its successor is on disk, and no refusal is answered with
another request: a call makes two requests at most, with a whole cool-down between them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from tokencore import imports, limits, record, sources, store
from tokencore.errors import (
    ConfigurationError,
    IssuanceLimitError,
    IssuerUnavailableError,
    TokenError,
    TokenStoreError,
    TokenUnavailableError,
)
from tokencore.limits import Intent, Standing
from tokencore.lock import KeyLock, pause_after
from tokencore.market import digest
from tokencore.record import Attempt, IssuanceRecord, Outcome
from tokencore.remarks import Note
from tokencore.tokens import Token

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tokencore.cache import Cache
    from tokencore.issuer import Issuer
    from tokencore.market import Market
    from tokencore.outlets import Outlets
    from tokencore.refusals import Refusal

_log = logging.getLogger("tokencore")
LOCK_WAIT = 8  # time-outs: a holder that tries to connect four times and then waits for an answer is done by then
FOREIGN_AGE = timedelta(minutes=10)  # of a token that answers our request: more than clocks differ, so not our issue


class Keeper:
    """Renews the token of one key for all its markets; any number of them, in any process, act as one."""

    __slots__ = ("__dict__", "_secrets")  # what `vars` shows has no secret

    def __init__(self, market: Market, cache: Cache, credentials: tuple[str, str], base_url: str) -> None:
        """Serve the key of `cache`; `market` gives the numbers of the rules."""
        self._market = market
        self._cache = cache
        self._secrets = credentials
        self._base_url = base_url
        self._issuer_made: Issuer | None = None
        self._credentials = digest(*credentials, length=8)
        self._lock = KeyLock(cache.folder, cache.fingerprint)
        self.record = IssuanceRecord(cache.folder, cache.fingerprint)

    def __repr__(self) -> str:
        return f"Keeper({self._cache.fingerprint!r})"

    def __reduce__(self) -> str:
        raise TypeError("a Keeper knows credentials and is not pickled; make it anew where it is needed")

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
            last = record.latest(self._attempts())
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
        self._require_saved(token)
        return issued and _newer(token, present)

    def allowed_from(self, now: datetime) -> datetime | None:
        """When the limits allow a renewal that is due at `now`; None where refused credentials forbid it."""
        standing = Standing(now, self._attempts(), self._cache.newest(), self._credentials)
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
        self._require_saved(token)
        return before is None or token.access_token != before.access_token

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
            self._note_import(token, now)
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
        self._issuer.revoke(access_token)

    def probe(self, access_token: str, *, domestic: bool) -> tuple[bool | None, str]:
        """Whether KIS accepts the token, see `Issuer.probe`."""
        return self._issuer.probe(access_token, domestic=domestic)

    @property
    def _issuer(self) -> Issuer:
        """Made by the one who asks KIS: HTTP and the validation of settings cost more than all the rest."""
        if self._issuer_made is None:
            from tokencore.issuer import Issuer

            self._issuer_made = Issuer.checked(self._base_url, self._secrets, timeout=self._market.timeout)
        return self._issuer_made

    @property
    def _outlets(self) -> Outlets:
        """For those who export only: it validates the settings."""
        from tokencore.outlets import Outlets

        return Outlets(self._cache, self._secrets, self._market.environment)

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
            standing = Standing(now, self._attempts(), present, self._credentials, waited_out)
            limits.check(intent, standing, self._market)
            self._share_failure(standing, began)
            if unwanted():
                raise TokenUnavailableError(
                    "The present token serves the running session to its end: no swap inside it."
                )
            token = self._issue(note, standing)
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

    def _require_saved(self, token: Token) -> None:
        """Who renews for others has not done so while the token is in no file."""
        if self._cache.is_only_here(token):
            raise TokenStoreError(
                f"KIS issued a token that could not be saved in {self._cache.folder}: only this process has it. Free "
                "space or mend the permissions, and renew again: for six hours KIS hands the same one out."
            )

    def _serving(self, serves: Callable[[Token], bool]) -> Token | None:
        token = self._cache.newest()
        return token if token and serves(token) else None

    @contextlib.contextmanager
    def _holding(self, wait: float, give_up: Callable[[], bool] = lambda: False) -> Iterator[bool]:
        """The lock in a folder that is there; yields whether it was had.

        What changed under it reaches the copies for other clients before it is released.
        """
        store.private_folder(self._cache.folder)
        with self._lock.hold(wait=wait, give_up=give_up) as held:
            before = self._cache.newest()
            try:
                yield held
            finally:
                if held and self._exporting():
                    self._outlets.publish(before)

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

    def _attempts(self) -> list[Attempt]:
        """The record, with what is known besides it where the record was lost or could not be written."""
        return with_marks(self.record.attempts(), self._cache, self._lock)

    def _await(self, serves: Callable[[Token], bool]) -> Token | None:
        """Poll the cache for the winner's token until the cool-down is over, by the monotonic clock."""
        until = limits.cooldown_until(self._attempts(), datetime.now(UTC), self._market.issue_interval)
        left = (until - datetime.now(UTC)).total_seconds() if until else 0.0
        if left > 1:
            _log.warning("Waiting %.0f s: KIS allows one request a minute.", left)
        began = time.monotonic()
        end = began + min(left, limits.pause(1, self._market.issue_interval).total_seconds())
        while not (token := self._serving(serves)) and (now := time.monotonic()) < end:
            time.sleep(min(pause_after(now - began), end - now))
        return token

    def _issue(self, note: Note, standing: Standing) -> Token:
        issuer = self._issuer
        if not self._lock.intact():
            raise TokenStoreError(f"{self._lock.path} was replaced while held. Nothing was issued; try again.")
        attempt = Attempt(
            datetime.now(UTC),
            Outcome.SENT,
            reason=note.reason,
            by=note.by,
            credentials=self._credentials,
            pid=os.getpid(),
        )
        position = self._begin(attempt)
        answer = issuer.issue()
        now = datetime.now(UTC)
        if not isinstance(answer, Token):
            self._complete(position, attempt._replace(at=now, outcome=answer.outcome, code=answer.code))
            raise self._refused(answer, standing.token, now)
        same = _handed_back(answer, standing)
        self._save(answer, now, issued_at=(answer.issued_at if same else None) or now)
        outcome = Outcome.SAME if same else Outcome.ISSUED
        self._complete(position, attempt._replace(at=now, outcome=outcome, expires_at=answer.expires_at))
        return answer

    def _begin(self, attempt: Attempt) -> int | None:
        try:
            return self.record.begin(attempt)
        except OSError as error:
            _log.error(
                "The issuance record cannot be written: %s. The lock file keeps the time.",
                error.strerror,
            )
            self._lock.mark_unrecorded(attempt.at)
            return None

    def _note_import(self, token: Token, now: datetime) -> None:
        """The record and the marks learn of an issue elsewhere; the token is saved, so their failure is only told."""
        reason, mark = f"import {self._market.name}", self._cache.issued_mark()
        attempt = Attempt(now, Outcome.IMPORTED, None, token.expires_at, reason, self._credentials, os.getpid())
        try:
            self.record.begin(attempt)
            if token.issued_at and (mark is None or mark < token.issued_at):
                self._cache.mark_issued(token.issued_at)
        except OSError as error:
            _log.error("The import could not be recorded: %s", error.strerror)

    def _complete(self, position: int | None, attempt: Attempt) -> None:
        if position is None:
            self._lock.mark_unrecorded(attempt.at)
            return
        try:
            self.record.complete(position, attempt)
        except OSError as error:
            _log.error("The outcome %s could not be recorded: %s", attempt.outcome, error.strerror)

    def _save(self, token: Token, now: datetime, *, issued_at: datetime) -> None:
        """Save for every market; a token that was paid for goes to its caller even where that fails."""
        try:
            self._cache.save(token, now)
        except OSError as error:
            self._cache.keep(token)
            _log.critical(
                "A token was issued but could not be saved (%s); only this process has it. Free space or mend "
                "the permissions of %s: the next process would issue again.",
                error.strerror,
                self._cache.folder,
            )
        try:
            self._cache.mark_issued(issued_at)
        except OSError as error:  # the record knows it too
            _log.error("The mark of the issue cannot be written: %s", error.strerror)

    def _refused(self, refusal: Refusal, present: Token | None, now: datetime) -> TokenError:
        serves = limits.what_serves(present, now, self._market.buffer)
        text = f"{refusal.what}. {serves} To do: {refusal.cure}."
        if refusal.error is IssuanceLimitError:
            retry_at = now + timedelta(seconds=self._market.issue_interval)
            return IssuanceLimitError(text, retry_at=retry_at, cause="minute")
        return refusal.error(text)


def with_marks(attempts: list[Attempt], cache: Cache, lock: KeyLock) -> list[Attempt]:
    """The recorded `attempts` of a key, and after them what only its marks and its lock file tell."""
    # A mark names no key, so it only counts where the record is lost; the lock's time is this key's own.
    known = attempts[-1].at if attempts else datetime.min.replace(tzinfo=UTC)
    issued = None if attempts else cache.issued_mark()
    if issued:
        issued += timedelta(seconds=1)  # it is cut to whole ones, and KIS counts the rest of it too
    marks = sorted(mark for mark in (issued, lock.unrecorded()) if mark)
    return attempts + [Attempt(at, Outcome.ISSUED) for at in marks if at > known]


def _handed_back(answer: Token, standing: Standing) -> bool:
    """Whether KIS repeated a token: its expiry is known, or it was issued long before our request, by someone else.

    What else is known of it holds for the answer then.
    """
    present = standing.token if standing.token and standing.token.expires_at == answer.expires_at else None
    # The record also knows a token whose file was deleted.
    earlier = [attempt.at for attempt in standing.attempts if attempt.expires_at == answer.expires_at]
    if present:
        answer.rejected_at = present.rejected_at
    issues = [answer.issued_at, present and present.issued_at, *earlier]
    answer.issued_at = min((at for at in issues if at), default=None)
    foreign = answer.issued_at is not None and answer.issued_at < standing.now - FOREIGN_AGE
    return bool(present or earlier or foreign)


def _newer(token: Token, before: Token | None) -> bool:
    return token.rejected_at is None and (before is None or token.expires_at > before.expires_at)
