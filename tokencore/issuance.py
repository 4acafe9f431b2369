"""One request for a token: recorded before it is sent, judged and recorded after, and its token saved.

Whoever calls holds the key's lock, and has asked the limits.
"""

from __future__ import annotations

import logging
import os
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from tokencore import limits
from tokencore.errors import IssuanceLimitError, TokenError, TokenStoreError
from tokencore.market import digest
from tokencore.record import Attempt, IssuanceRecord, Outcome
from tokencore.tokens import Token

if TYPE_CHECKING:
    from tokencore.cache import Cache
    from tokencore.issuer import Issuer
    from tokencore.limits import Standing
    from tokencore.lock import KeyLock
    from tokencore.market import Market
    from tokencore.refusals import Refusal
    from tokencore.remarks import Note

_log = logging.getLogger("tokencore")
PROMPT = timedelta(seconds=1)  # from the record's line to the request; after slow tries to connect it is a minute
FOREIGN_AGE = timedelta(minutes=10)  # of a token that answers our request: more than clocks differ, so not our issue


class Issuance:
    """The issue requests of one key, and what is on record of them."""

    __slots__ = ("__dict__", "_secrets")  # what `vars` shows has no secret

    def __init__(
        self, market: Market, cache: Cache, lock: KeyLock, credentials: tuple[str, str], base_url: str
    ) -> None:
        """Serve the key of `cache`; `market` gives the numbers of the rules."""
        self.credentials = digest(*credentials, length=8)
        self._market = market
        self._cache = cache
        self._lock = lock
        self._secrets = credentials
        self._base_url = base_url
        self._issuer_made: Issuer | None = None
        self._record = IssuanceRecord(cache.folder, cache.fingerprint)

    def __repr__(self) -> str:
        return f"Issuance({self._cache.fingerprint!r})"

    def __reduce__(self) -> str:
        raise TypeError("an Issuance knows credentials and is not pickled; make it anew where it is needed")

    @property
    def issuer(self) -> Issuer:
        """Made by the one who asks KIS: HTTP and the validation of settings cost more than all the rest."""
        if self._issuer_made is None:
            from tokencore.issuer import Issuer

            self._issuer_made = Issuer.checked(self._base_url, self._secrets, timeout=self._market.timeout)
        return self._issuer_made

    def attempts(self) -> list[Attempt]:
        """The record, with what is known besides it where the record was lost or could not be written."""
        return with_marks(self._record.attempts(), self._cache, self._lock)

    def issue(self, note: Note, standing: Standing) -> Token:
        """Make one request, and save its token; `standing` is what the limits have judged.

        Raises:
            TokenError: KIS gave none, and what was there before still is; the record has the attempt.
            TokenStoreError: the lock file was replaced meanwhile; nothing was sent.

        """
        issuer = self.issuer
        if not self._lock.intact():
            raise TokenStoreError(f"{self._lock.path} was replaced while held. Nothing was issued; try again.")
        attempt = Attempt(
            datetime.now(UTC),
            Outcome.SENT,
            reason=note.reason,
            by=note.by,
            credentials=self.credentials,
            pid=os.getpid(),
        )
        position = self._begin(attempt)
        answer = issuer.issue(lambda: self._date(position, attempt))
        now = datetime.now(UTC)
        if not isinstance(answer, Token):
            self._complete(position, attempt._replace(at=now, outcome=answer.outcome, code=answer.code))
            raise self._refused(answer, standing.token, now)
        same = _handed_back(answer, standing)
        self._save(answer, now, issued_at=(answer.issued_at if same else None) or now)
        outcome = Outcome.SAME if same else Outcome.ISSUED
        self._complete(position, attempt._replace(at=now, outcome=outcome, expires_at=answer.expires_at))
        return answer

    def note_import(self, token: Token, now: datetime) -> None:
        """The record and the marks learn of an issue elsewhere; the token is saved, so their failure is only told."""
        reason, mark = f"import {self._market.name}", self._cache.issued_mark()
        attempt = Attempt(now, Outcome.IMPORTED, None, token.expires_at, reason, self.credentials, os.getpid())
        try:
            self._record.begin(attempt)
            if token.issued_at and (mark is None or mark < token.issued_at):
                self._cache.mark_issued(token.issued_at)
        except OSError as error:
            _log.error("The import could not be recorded: %s", error.strerror)

    def _begin(self, attempt: Attempt) -> int | None:
        try:
            return self._record.begin(attempt)
        except OSError as error:
            _log.error(
                "The issuance record cannot be written: %s. The lock file keeps the time.",
                error.strerror,
            )
            self._lock.mark_unrecorded(attempt.at, begun=False)
            return None

    def _date(self, position: int | None, attempt: Attempt) -> None:
        """The request leaves now: its line, which KIS's minute is counted from where we get no further, says so."""
        now = datetime.now(UTC)
        if now - attempt.at > PROMPT:
            self._complete(position, attempt._replace(at=now))

    def _complete(self, position: int | None, attempt: Attempt) -> None:
        if position is None:
            self._lock.mark_unrecorded(attempt.at, begun=False)
            return
        try:
            self._record.complete(position, attempt)
        except OSError as error:
            _log.error("The outcome %s could not be recorded: %s", attempt.outcome, error.strerror)
            self._lock.mark_unrecorded(attempt.at, begun=True)  # the request may have left long after its line

    def _save(self, token: Token, now: datetime, *, issued_at: datetime) -> None:
        """Save for every market; a token that was paid for goes to its caller even where that fails."""
        try:
            self._cache.save(token, now)
        except OSError as error:
            self._tell_unsaved(token, error)
            self._cache.keep(token)
        try:
            self._cache.mark_issued(issued_at)
        except OSError as error:  # the record knows it too
            _log.error("The mark of the issue cannot be written: %s", error.strerror)

    def _tell_unsaved(self, token: Token, error: OSError) -> None:
        if not self._cache.is_only_here(token):
            _log.error(
                "The new token is saved, but not for every market of the key, or not safe from a power cut (%s); each "
                "process finds it. Free space or mend the permissions of %s.",
                error.strerror,
                self._cache.folder,
            )
            return
        _log.critical(
            "A token was issued but could not be saved (%s); only this process has it. Free space or mend "
            "the permissions of %s: the next process would issue again.",
            error.strerror,
            self._cache.folder,
        )

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
    unrecorded, begun = lock.unrecorded() or (None, False)
    if unrecorded and unrecorded > known and begun and attempts and attempts[-1].outcome is Outcome.SENT:
        return [*attempts[:-1], attempts[-1]._replace(at=unrecorded)]
    marks = sorted(mark for mark in (issued, unrecorded) if mark)
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
