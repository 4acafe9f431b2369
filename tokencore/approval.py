"""The approval key of KIS's websocket: asked for once a day and shared by all processes, as the token is.

KIS documents 24 hours of life and no limit on requests. As nobody knows, its attempts are paced like the token's, in
a record and under a lock of their own: neither waits for the other.
"""

from __future__ import annotations

import json
import logging
import os
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, NamedTuple

from tokencore import limits, store
from tokencore.errors import (
    CredentialsError,
    IssuanceLimitError,
    IssuerUnavailableError,
    TokenError,
    TokenUnavailableError,
)
from tokencore.lock import KeyLock
from tokencore.market import digest
from tokencore.record import CREDENTIALS, Attempt, IssuanceRecord, Outcome, latest
from tokencore.tokens import sane

if TYPE_CHECKING:
    from tokencore.market import Market
    from tokencore.refusals import Refusal

_log = logging.getLogger("tokencore")
LIFE = timedelta(hours=24)  # by KIS's documentation; its answer does not say
LOCK_WAIT = 8  # time-outs, as for the token: connecting four times, and waiting for an answer


class Approval(NamedTuple):
    """An approval key and when it was issued, aware UTC."""

    text: str
    issued_at: datetime

    def __repr__(self) -> str:
        return f"Approval(issued_at={self.issued_at.isoformat()})"

    def serves(self, until: datetime) -> bool:
        """Whether it lives at `until`."""
        return until < self.issued_at + LIFE


class ApprovalKeys:
    """The approval key of one app key, for all its markets and any number of processes."""

    __slots__ = ("__dict__", "_secrets")  # what `vars` shows has no secret

    def __init__(self, market: Market, fingerprint: str, credentials: tuple[str, str], base_url: str) -> None:
        """Serve the app key with this `fingerprint`; `market` gives the folder and the numbers of the rules."""
        name = f"{fingerprint}-approval"
        self.path = os.path.join(market.token_dir, f"key-{name}.json")
        self._market = market
        self._fingerprint = fingerprint
        self._secrets = credentials
        self._credentials = digest(*credentials, length=8)
        self._base_url = base_url
        self._lock = KeyLock(market.token_dir, name)
        self._record = IssuanceRecord(market.token_dir, name)

    def __repr__(self) -> str:
        return f"ApprovalKeys({self._fingerprint!r})"

    def __reduce__(self) -> str:
        raise TypeError("an ApprovalKeys knows credentials and is not pickled; make it anew where it is needed")

    def obtain(self, rejected: str = "") -> str:
        """A key that lives and is not the `rejected` one; the present one goes on serving whatever fails.

        Raises:
            IssuanceLimitError: the last request was less than KIS_ISSUE_INTERVAL ago; `retry_at` tells when the next
                may be made.
            CredentialsError, IssuerUnavailableError: what the request met.
            TokenUnavailableError: another process holds the lock for too long.
            TokenStoreError: the token directory cannot be used.

        """
        now = datetime.now(UTC)
        present = self._serving(rejected, now + timedelta(seconds=self._market.buffer))
        ahead = now + timedelta(seconds=max(self._market.buffer, self._market.proactive_window))
        if present and present.serves(ahead):
            return present.text
        try:
            return self._renewed(rejected, ahead, patient=present is None)
        except TokenError as error:
            if present is None:
                raise
            _log.warning("The approval key was not renewed ahead: %s", error)
            return present.text

    def _renewed(self, rejected: str, until: datetime, *, patient: bool) -> str:
        store.private_folder(self._market.token_dir)
        wait, began = LOCK_WAIT * self._market.timeout if patient else 0, datetime.now(UTC)
        with self._lock.hold(wait=wait, give_up=lambda: self._serving(rejected, until) is not None) as held:
            if found := self._serving(rejected, until):
                return found.text
            if not held:
                raise TokenUnavailableError(f"Another process asks for an approval key and holds {self._lock.path}.")
            self._check_pace(began, patient=patient)
            return self._issue()

    def _check_pace(self, began: datetime, *, patient: bool) -> None:
        attempts, now = self._record.attempts(), datetime.now(UTC)
        self._check_credentials(attempts)
        interval = self._market.issue_interval
        until = limits.cooldown_until(attempts, now, interval)
        if until is None and not patient:
            until = limits.paused_until(attempts, now, interval)
        if until:
            last = attempts[-1]
            raise IssuanceLimitError(
                f"The last request for an approval key was at {limits.tell(last.at)} ({last.outcome}). "
                f"The next is made from {limits.tell(until)} on.",
                retry_at=until,
                cause="minute",
            )
        if attempts and attempts[-1].outcome is Outcome.UNREACHABLE and attempts[-1].at >= began:
            raise IssuerUnavailableError(
                "KIS cannot be reached for an approval key, as another process has just found. "
                "Check the network and KIS_BASE_URL; then try again.",
            )

    def _check_credentials(self, attempts: list[Attempt]) -> None:
        """Credentials that KIS refused are not tried again, until it has issued a token with them since."""
        issuances = IssuanceRecord(self._market.token_dir, self._fingerprint).attempts()
        last = latest(sorted([*attempts, *issuances], key=lambda attempt: attempt.at))
        if last and last.outcome in CREDENTIALS and last.credentials == self._credentials:
            raise CredentialsError(
                f"KIS refused these credentials at {limits.tell(last.at)} ({last.code}), so they are not tried again "
                f"for an approval key. Correct them, or run `tokencore refresh {self._market.name}` when KIS has "
                "restored them.",
            )

    def _issue(self) -> str:
        from tokencore.issuer import Issuer  # HTTP, which a cached key does not need

        issuer = Issuer.checked(self._base_url, self._secrets, timeout=self._market.timeout)
        attempt = Attempt(datetime.now(UTC), Outcome.SENT, credentials=self._credentials, pid=os.getpid())
        try:
            position = self._record.begin(attempt)
        except OSError as error:
            raise store.unusable(self._record.path, error) from None
        answer, before = issuer.approve(), self._read()
        now = datetime.now(UTC)
        if not isinstance(answer, str):
            self._complete(position, attempt._replace(at=now, outcome=answer.outcome, code=answer.code))
            raise self._refused(answer, now)
        same = before is not None and before.text == answer
        approval = before if before and same else Approval(answer, now)
        self._save(approval)
        outcome = Outcome.SAME if same else Outcome.ISSUED
        self._complete(position, attempt._replace(at=now, outcome=outcome, expires_at=approval.issued_at + LIFE))
        return answer

    def _complete(self, position: int, attempt: Attempt) -> None:
        try:
            self._record.complete(position, attempt)
        except OSError as error:
            _log.error("The outcome %s could not be recorded: %s", attempt.outcome, error.strerror)

    def _refused(self, refusal: Refusal, now: datetime) -> TokenError:
        text = f"There is no new approval key. {refusal.what}. To do: {refusal.cure}."
        if refusal.error is IssuanceLimitError:
            retry_at = now + timedelta(seconds=self._market.issue_interval)
            return IssuanceLimitError(text, retry_at=retry_at, cause="minute")
        return refusal.error(text)

    def _serving(self, rejected: str, until: datetime) -> Approval | None:
        found = self._read()
        return found if found and found.text != rejected and found.serves(until) else None

    def _read(self) -> Approval | None:
        """The key in the file; None where there is none of this app key that could be read."""
        try:
            content = json.loads(store.read_text(self.path) or "{}")
            issued_at = datetime.fromisoformat(content["issued_at"]).astimezone(UTC)
            known = content["key_fingerprint"] == self._fingerprint and sane(issued_at)
            return Approval(str(content["approval_key"]), issued_at) if known else None
        except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
            return None

    def _save(self, approval: Approval) -> None:
        """Save it; a key that was issued goes to its caller even where that fails."""
        content = {
            "approval_key": approval.text,
            "issued_at": approval.issued_at.isoformat(),
            "expires_at": (approval.issued_at + LIFE).isoformat(),
            "environment": self._market.environment,
            "key_fingerprint": self._fingerprint,
        }
        try:
            store.write_text(self.path, json.dumps(content, indent=2) + "\n", temporary="approval")
        except OSError as error:
            _log.critical("An approval key was issued but could not be saved: %s", error.strerror)
