"""The approval key of KIS's websocket, requested once a day and shared by all processes, like the token.

KIS documents a life of 24 hours and no limit on requests. Requests are paced like the token's anyway, with a document
and a lock of their own, so that neither waits for the other.
"""

from __future__ import annotations

import contextlib
import logging
import os
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from tokencore import attempts as record
from tokencore import limits
from tokencore.attempts import Attempt, Outcome
from tokencore.errors import (
    IssuanceLimitError,
    IssuerUnavailableError,
    TokenError,
    TokenStoreError,
    TokenUnavailableError,
)
from tokencore.sealing import Sensitive, sealed_class
from tokencore.tokens import Token, format_time, sane

if TYPE_CHECKING:
    from tokencore.config.market import Market
    from tokencore.renewer import Renewer
    from tokencore.stores.base import Store

_log = logging.getLogger("tokencore")
LIFE = timedelta(hours=24)  # as KIS documents; its answer does not say


@sealed_class()
class ApprovalKeys(Sensitive):
    """The approval key of one app key; its document holds the present key, and the last request with its outcome."""

    __slots__ = ("_document", "_market", "_renewer", "_store")

    def __init__(self, market: Market, store: Store, renewer: Renewer) -> None:
        """Serve the app key of `store`, with the limits of `market`'s settings and the gateway of `renewer`."""
        self._market = market
        self._store = store
        self._renewer = renewer
        self._document = store.document("approval")

    def obtain(self, rejected: str = "") -> str:
        """Return a living key other than the `rejected` one; the present one goes on serving whatever fails.

        Raises:
            IssuanceLimitError: the last request was less than KIS_ISSUE_INTERVAL ago; the next is allowed at
                `retry_at`.
            CredentialsError, IssuerUnavailableError: the request failed.
            TokenUnavailableError: another process holds the lock for too long.
            TokenStoreError: the token directory cannot be used; no request was made.
        """
        try:
            return (self.serving(rejected, self._market.buffer) or self._renewed(rejected)).access_token
        except TokenError as error:
            if not (last := self.serving(rejected, 0)):
                raise
            _log.warning("The approval key was not renewed, and the present one goes on serving: %s", error)
            return last.access_token

    def serving(self, rejected: str, buffer: float) -> Token | None:
        """Return the present key if it lives for more than `buffer` seconds and is not the `rejected` one."""
        found = approval_key(self._store)
        return found if found and found.access_token != rejected and found.serves(datetime.now(UTC), buffer) else None

    def _renewed(self, rejected: str) -> Token:
        began, wait, buffer = datetime.now(UTC), self._renewer.lock_wait, self._market.buffer
        with self._document.lock(wait=wait, give_up=lambda: self.serving(rejected, buffer) is not None) as held:
            if found := self.serving(rejected, buffer):
                return found
            if not held:
                raise TokenUnavailableError(
                    f"Another process has been asking KIS for an approval key for {wait:.0f} s; try again, or look "
                    f"for a hanging process that uses {self._document.place}."
                )
            self._drop(rejected)
            self._check(began, datetime.now(UTC))
            return self._issued()

    def _drop(self, rejected: str) -> None:
        """Serve the `rejected` key to nobody any more, even if no other can be requested yet."""
        content = self._document.read()
        if rejected and content.get("approval_key") == rejected:
            with contextlib.suppress(OSError):
                self._document.write({"attempt": content.get("attempt")})

    def _check(self, began: datetime, now: datetime) -> None:
        """Check that the last request allows another one now, and raise otherwise."""
        asked = record.parse(str(self._document.read().get("attempt")))
        asked = [one for one in asked if one.at <= now + record.CLOCK_NOISE]  # else the clock was set back since
        both = sorted([*asked, *self._store.attempts()], key=lambda attempt: attempt.at)  # KIS refuses both alike
        standing = limits.Standing(now, self._market, both, self._store.newest())
        if refused := limits.refusal(standing):
            raise refused
        if until := limits.cooldown_until(asked, now, self._market):
            raise IssuanceLimitError(
                f"The last request for an approval key was at {format_time(asked[-1].at)} "
                f"({asked[-1].outcome}). The next is made from {format_time(until)} on.",
                retry_at=until,
                cause="minute",
            )
        if asked and asked[-1].outcome is Outcome.UNREACHABLE and asked[-1].at >= began:
            raise IssuerUnavailableError(
                "KIS cannot be reached, as another process has just found. Check the network; then try again."
            )

    def _issued(self) -> Token:
        """Make one request, recorded before it is sent; an issued key reaches its caller even if it cannot be saved."""
        gateway, before = self._renewer.gateway, approval_key(self._store)
        attempt = Attempt(datetime.now(UTC), Outcome.SENT, credentials=self._market.credentials_digest, pid=os.getpid())
        try:
            self._write(before, attempt)
        except OSError as error:
            raise TokenStoreError(
                f"The request for an approval key could not be recorded, so none was made: {self._document.place}: "
                f"{error.strerror}. Fix its permissions or free space."
            ) from None
        answer, now = gateway.approve(), datetime.now(UTC)
        if isinstance(answer, str):
            key = before if before and before.access_token == answer else Token(answer, now + LIFE, now)
            self._complete(key, attempt._replace(at=now, outcome=Outcome.ISSUED))
            return key
        self._complete(before, attempt._replace(at=now, outcome=answer.outcome, code=answer.code))
        retry_at = now + timedelta(seconds=self._market.settings.issue_interval)
        raise answer.as_error("There is no new approval key.", retry_at)

    def _complete(self, key: Token | None, attempt: Attempt) -> None:
        try:
            self._write(key, attempt)
        except OSError as error:
            _log.critical("The outcome of a request for an approval key could not be saved: %s", error.strerror)

    def _write(self, key: Token | None, attempt: Attempt) -> None:
        content = {"attempt": record.as_line(attempt)}
        if key and key.issued_at:
            content |= {
                "approval_key": key.access_token,
                "issued_at": key.issued_at.isoformat(),
                "expires_at": key.expires_at.isoformat(),
                "key_fingerprint": self._store.fingerprint,  # read by version 0.1
            }
        self._document.write(content)


def approval_key(store: Store) -> Token | None:
    """Return the app key's last approval key, as a token that lives for `LIFE`; None without a readable one."""
    content = store.document("approval").read()
    try:
        issued_at = datetime.fromisoformat(content["issued_at"]).astimezone(UTC)
        return Token(content["approval_key"], issued_at + LIFE, issued_at) if sane(issued_at) else None
    except (ValueError, KeyError, TypeError, OverflowError, AttributeError):
        return None
