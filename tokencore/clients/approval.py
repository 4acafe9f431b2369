"""The approval key of KIS's websocket: asked for once a day and shared by all processes, as the token is.

KIS documents 24 hours of life and no limit on requests. As nobody knows, its requests are paced like the token's, in a
document and under a lock of their own: neither waits for the other.
"""

from __future__ import annotations

import logging
import os
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, NamedTuple

from tokencore import limits
from tokencore.attempts import CREDENTIALS, Attempt, Outcome, latest
from tokencore.errors import (
    CredentialsError,
    IssuanceLimitError,
    IssuerUnavailableError,
    TokenError,
    TokenStoreError,
    TokenUnavailableError,
)
from tokencore.sealing import sealed_class
from tokencore.stores import record
from tokencore.tokens import sane

if TYPE_CHECKING:
    from tokencore.config.market import Market
    from tokencore.kis.codes import Refusal
    from tokencore.renewer import Renewer
    from tokencore.stores.base import Document, Store

_log = logging.getLogger("tokencore")
LIFE = timedelta(hours=24)  # by KIS's documentation; its answer does not say
LOCK_WAIT = 8  # time-outs, as for the token: connecting four times, and waiting for an answer
REMEMBERED = 20  # attempts


class Approval(NamedTuple):
    """An approval key and when it was issued, aware UTC."""

    text: str
    issued_at: datetime

    def __repr__(self) -> str:
        return f"Approval(issued_at={self.issued_at.isoformat()})"

    def serves(self, until: datetime) -> bool:
        """Whether it lives at `until`."""
        return until < self.issued_at + LIFE


@sealed_class()
class ApprovalKeys:
    """The approval key of one app key, for all its markets and any number of processes."""

    __slots__ = ("_document", "_market", "_renewer", "_store")

    def __init__(self, market: Market, store: Store, renewer: Renewer) -> None:
        """Serve the app key of `store`; `market` gives the numbers of the rules, and `renewer` knows how to ask KIS."""
        self._market = market
        self._store = store
        self._renewer = renewer
        self._document = store.document("approval")

    def __repr__(self) -> str:
        return f"ApprovalKeys({self._store.fingerprint!r})"

    def __reduce__(self) -> str:
        raise TypeError("ApprovalKeys know credentials and are not pickled; make them anew where they are needed")

    def obtain(self, rejected: str = "") -> str:
        """A key that lives and is not the `rejected` one; the present one goes on serving whatever fails.

        Raises:
            IssuanceLimitError: the last request was less than KIS_ISSUE_INTERVAL ago; `retry_at` says when the next
                may be made.
            CredentialsError, IssuerUnavailableError: what the request met.
            TokenUnavailableError: another process holds the lock for too long.
            TokenStoreError: the token directory cannot be used; nothing was asked.

        """
        soon = datetime.now(UTC) + timedelta(seconds=self._market.buffer)
        if found := self._serving(rejected, soon):
            return found.text
        try:
            return self._renewed(rejected, soon).text
        except TokenError as error:
            last = self._serving(rejected, datetime.now(UTC))
            if last is None:
                raise
            _log.warning("The approval key was not renewed, and the present one goes on serving: %s", error)
            return last.text

    def _renewed(self, rejected: str, until: datetime) -> Approval:
        began, wait = datetime.now(UTC), LOCK_WAIT * self._market.settings.timeout
        with self._document.lock(wait=wait, give_up=lambda: self._serving(rejected, until) is not None) as held:
            if found := self._serving(rejected, until):
                return found
            if not held:
                raise TokenUnavailableError(
                    f"Another process has been asking KIS for an approval key for {wait:.0f} s; try again, or look "
                    f"for a hanging process that uses {self._document.place}."
                )
            attempts = self._attempts()
            self._check(attempts, began)
            return self._issue(attempts)

    def _check(self, attempts: list[Attempt], began: datetime) -> None:
        now = datetime.now(UTC)
        self._check_credentials(attempts)
        if until := limits.cooldown_until(attempts, now, self._market):
            last = attempts[-1]
            raise IssuanceLimitError(
                f"The last request for an approval key was at {limits.format_time(last.at)} ({last.outcome}). "
                f"The next is made from {limits.format_time(until)} on.",
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
        last = latest(sorted([*attempts, *self._store.attempts()], key=lambda attempt: attempt.at))
        if last and last.outcome in CREDENTIALS and last.credentials == self._renewer.credentials:
            raise CredentialsError(
                f"KIS refused these credentials at {limits.format_time(last.at)} ({last.code}), so they are not tried "
                f"again for an approval key. Correct them, or run `tokencore refresh {self._market.name}` when KIS "
                "has restored them.",
            )

    def _issue(self, attempts: list[Attempt]) -> Approval:
        """One request, recorded before it is sent; a key that was issued reaches its caller even if it is not saved."""
        gateway, before = self._renewer.gateway, self._read()
        attempt = Attempt(datetime.now(UTC), Outcome.SENT, credentials=self._renewer.credentials, pid=os.getpid())
        try:
            self._write(before, [*attempts, attempt])
        except OSError as error:
            raise TokenStoreError(
                f"The request for an approval key could not be recorded, so none was made: {self._document.place}: "
                f"{error.strerror}. Fix its permissions or free space."
            ) from None
        answer = gateway.approve()
        now = datetime.now(UTC)
        if not isinstance(answer, str):
            self._complete(before, [*attempts, attempt._replace(at=now, outcome=answer.outcome, code=answer.code)])
            raise self._refused(answer, now)
        same = before is not None and before.text == answer
        approval = before if before and same else Approval(answer, now)
        outcome = Outcome.SAME if same else Outcome.ISSUED
        done = attempt._replace(at=now, outcome=outcome, expires_at=approval.issued_at + LIFE)
        self._complete(approval, [*attempts, done])
        return approval

    def _refused(self, refusal: Refusal, now: datetime) -> TokenError:
        text = f"There is no new approval key. {refusal.what}. To do: {refusal.fix}."
        if refusal.error is IssuanceLimitError:
            retry_at = now + timedelta(seconds=self._market.settings.issue_interval)
            return IssuanceLimitError(text, retry_at=retry_at, cause="minute")
        return refusal.error(text)

    def _serving(self, rejected: str, until: datetime) -> Approval | None:
        found = self._read()
        return found if found and found.text != rejected and found.serves(until) else None

    def _read(self) -> Approval | None:
        return _read(self._document, self._store.fingerprint)

    def _attempts(self) -> list[Attempt]:
        lines = self._document.read().get("attempts")
        return record.parse("\n".join(map(str, lines))) if isinstance(lines, list) else []

    def _complete(self, approval: Approval | None, attempts: list[Attempt]) -> None:
        try:
            self._write(approval, attempts)
        except OSError as error:
            _log.critical("The outcome of a request for an approval key could not be saved: %s", error.strerror)

    def _write(self, approval: Approval | None, attempts: list[Attempt]) -> None:
        content: dict[str, object] = {"attempts": record.render(attempts[-REMEMBERED:]).splitlines()}
        if approval:
            content |= {
                "approval_key": approval.text,
                "issued_at": approval.issued_at.isoformat(),
                "expires_at": (approval.issued_at + LIFE).isoformat(),
                "environment": self._market.environment,
                "key_fingerprint": self._store.fingerprint,
            }
        self._document.write(content)


def approval_expiry(store: Store) -> datetime | None:
    """When the last approval key of this app key expires, aware UTC; None where none was ever asked for."""
    found = _read(store.document("approval"), store.fingerprint)
    return found.issued_at + LIFE if found else None


def _read(document: Document, fingerprint: str) -> Approval | None:
    """The key in the document; None where there is none of this app key that could be read."""
    content = document.read()
    try:
        issued_at = datetime.fromisoformat(content["issued_at"]).astimezone(UTC)
        known = content["key_fingerprint"] == fingerprint and sane(issued_at)
        return Approval(str(content["approval_key"]), issued_at) if known else None
    except (ValueError, KeyError, TypeError, OverflowError):
        return None
