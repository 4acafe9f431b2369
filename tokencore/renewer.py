"""Renewing one key's token: check, lock, check again, ask the limits, record, request, save.

When threads, processes and machines want the token at the same time, one of them sends a request and the others get its
token. The old token is never given up before its successor is stored, and a refusal never leads to an immediate second
request.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import random
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from tokencore import limits, redaction
from tokencore.attempts import Attempt, Outcome, latest
from tokencore.clients.exports import Exports
from tokencore.errors import (
    ConfigurationError,
    IssuanceLimitError,
    IssuerUnavailableError,
    TokenError,
    TokenStoreError,
    TokenUnavailableError,
)
from tokencore.limits import Intent, Standing
from tokencore.sealing import Sensitive
from tokencore.stores import lock
from tokencore.tokens import Token, format_time

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tokencore.config.market import Market
    from tokencore.kis.gateway import Gateway
    from tokencore.stores.base import Fence, Store

    Serves = Callable[[Token], bool]

_log = logging.getLogger("tokencore")
ADOPTED = "issued by another client"  # the recorded reason for a token found in another client's file
FOREIGN_AGE = timedelta(minutes=10)  # a token this old when it arrives was not issued for our request
POLL = 0.1  # seconds between two checks for the winner's token
ROUNDS, REQUESTS = 4, 2  # how many cool-downs a caller without a token waits out, and requests it makes, at most
SPREAD = 0.1  # the part of a cool-down over which waiters spread, so that they do not all ask in the same second


class Renewer(Sensitive):
    """Renews the token of one key in its store; any number of renewers, in any process, act as one.

    If a limit forbids a renewal, KIS refuses it or the store fails, a `TokenError` is raised and the present token
    stays.
    """

    __slots__ = ("__dict__",)

    def __init__(self, market: Market, store: Store, sharing: Callable[[], Sequence[Market]]) -> None:
        """Serve the key of `store` by the settings of `market`; `sharing` returns all markets of the key when needed.

        Raises:
            ConfigurationError: KIS_TIMEOUT is malformed.
        """
        self._market = market
        self._store = store
        self._sharing = sharing
        self.lock_wait = lock.WAIT * market.timeout  # seconds to wait for a holder that is asking KIS
        self.departing: Callable[[], object] = lambda: None  # called right before a request is sent

    def __repr__(self) -> str:
        return f"Renewer({self._store.fingerprint!r})"

    @functools.cached_property
    def copies(self) -> Exports:
        """The copies in other clients' files, made only under the lock: who waits for a token needs no more settings.

        Raises:
            ConfigurationError: the settings are malformed.
        """
        return Exports(self._sharing(), self._store)

    @functools.cached_property
    def gateway(self) -> Gateway:
        """KIS's gateway, made only when KIS is asked because its imports cost more than everything else here."""
        from tokencore.kis.gateway import Gateway

        timeout = self._market.settings.timeout  # validates all settings before anything is sent
        return Gateway(self._market.base_url, self._market.credentials(), timeout=timeout)

    def obtain(self, serves: Serves, reason: str, *, strict: bool = False) -> tuple[Token, bool]:
        """Return a token that `serves`, renewed if necessary, and whether it is new and was issued here.

        During a cool-down, wait for another caller's token or for a turn to ask. If `strict`, KIS is not asked where
        the token could not be saved.

        Raises:
            TokenError: a limit forbids it even after the wait, the request failed, or KIS's token would not serve; the
                stored token stays.
        """
        waited_out: datetime | None = None
        rounds = refused = 0
        while True:
            try:
                token, outcome = self._renew(Intent.REQUIRED, serves, reason, strict=strict, waited_out=waited_out)
            except IssuanceLimitError as limit:
                last, rounds = latest(self._store.attempts()), rounds + 1
                refused += _is_own_refusal(last)
                if limit.cause != "minute" or rounds == ROUNDS or refused == REQUESTS:
                    raise
            else:
                return token, outcome is Outcome.ISSUED
            if found := self._await(serves):
                return found, False
            waited_out = last.at if last else None

    def renew_ahead(self, present: Token, reason: str, unwanted: Callable[[], bool]) -> Token | None:
        """Try to get a successor while `present` still serves.

        Return None if a limit forbids it, another process is renewing, or it is `unwanted`.

        Raises:
            TokenError: the request failed, or KIS refused this process's last one; `present` goes on serving.
        """
        try:
            serves = functools.partial(newer, before=present)
            return self._renew(Intent.AHEAD, serves, reason, strict=False, unwanted=unwanted)[0]
        except (TokenUnavailableError, IssuanceLimitError) as error:
            minute = isinstance(error, IssuanceLimitError) and error.cause == "minute"
            if minute and _is_own_refusal(latest(self._store.attempts())):
                raise
            _log.debug("No renewal ahead: %s", error)
        return None

    def renew_due(self, present: Token | None, reason: str) -> bool:
        """Get a saved successor of `present` without waiting for a cool-down; False if another process was quicker.

        Raises:
            TokenError: a limit forbids it, the request failed, or the token could not be saved; `present` is untouched.
        """
        token, outcome = self._renew(Intent.DUE, lambda found: newer(found, present), reason)
        self.require_saved(token)
        return outcome is not None and newer(token, present)

    def refresh(self, *, force: bool, reason: str, by: str) -> bool:
        """Renew now and require that the token is saved; True if it is new, False if KIS returned the present one.

        Raises:
            TokenError: a limit forbids it, the request failed, or the token could not be saved; the present one stays.
        """
        with self._store.lock(wait=0):  # a fleet's store may have the token that this machine lacks
            before = self._store.newest() or self._store.read()[0]
        intent = Intent.FORCE if force else Intent.REFRESH
        token, _ = self._renew(intent, lambda found: newer(found, before), reason, by)
        self.require_saved(token)
        return before is None or token.access_token != before.access_token

    def adopt(self, token: Token, *, force: bool, proven: bool) -> bool:
        """Store a token that was issued elsewhere; return False if it was known already.

        KIS's six hours and the renewal rule's 24 hours count from the issue time that the token states. As it was no
        request of ours, it affects neither the cool-down nor the ceiling.

        Raises:
            TokenError: the present token lasts longer, this one is known to be dead, or it could not be saved; the
                present one stays.
        """
        with self.changing():
            present = self._store.newest()
            if present and not force:
                _check_better(token, present, proven=proven)
            self._store.save(token)
            if present and present.access_token == token.access_token and present.rejected_at is None:
                return False
            self._note(Outcome.IMPORTED, f"import {self._market.name}", token)
            return True

    def reject(self, access_token: str, now: datetime) -> None:
        """Mark this token as rejected by KIS, so that no process serves it again; any other token is left alone.

        Raises:
            TokenStoreError: the mark could not be saved; other processes may still serve the token.
        """
        with self.changing():
            token = self._store.newest()
            if token and token.access_token == access_token:
                if token.rejected_at is None:
                    token.rejected_at = now
                    if not redaction.in_program:  # whoever gave the command knows
                        _log.warning("KIS rejected the token. %s", limits.what_serves(token, now, self._market.buffer))
                self._store.save(token)
            elif token:
                self._keep(token)

    def revoke(self, token: Token) -> None:
        """Have KIS revoke `token`, and remove it for every market; the record keeps that KIS may return a dead one.

        Raises:
            IssuerUnavailableError: KIS did not revoke it; it stays valid.
            TokenStoreError: KIS has revoked it, but it could not be removed.
        """
        self.gateway.revoke(token.access_token)
        reason = f"revoke {self._market.name}"
        try:
            with self.changing():
                self._store.clear()
                self._note(Outcome.REVOKED, reason, token)
        except TokenError as error:
            raise TokenStoreError(f"KIS has revoked the token, but it could not be removed. {error}") from None

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Hold the lock for a change of the store; an `OSError` inside becomes a `TokenStoreError`.

        Raises:
            TokenStoreError: another process holds the lock for too long, or the store cannot be written.
        """
        with self._locked(self.lock_wait) as held:
            if not held:
                raise TokenStoreError(self._busy(self.lock_wait))
            try:
                yield
            except OSError as error:
                raise self._unwritable(error) from None

    def require_saved(self, token: Token) -> None:
        """Check that the token is stored, so that others can use it.

        Raises:
            TokenStoreError: only this process has the token.
        """
        if not self._store.saved(token):
            raise TokenStoreError(
                f"KIS issued a token that could not be saved at {self._store.place}: only this process has it. Free "
                "space or fix the permissions, and renew again: for six hours KIS returns the same one."
            )

    def sync_copies(self) -> None:
        """Adopt a longer-lasting token from another client's file, and update the files of all clients; never raises.

        A token that could not be saved before is saved now. If another process holds the lock, it does all this.
        """
        try:
            with self._locked(0) as held:
                if held and (token := self._adopted(lambda _: True) or self._store.newest()):
                    self._keep(token)
        except (TokenError, OSError) as error:
            _log.error("The copies for other clients could not be updated: %s", error)

    @contextlib.contextmanager
    def _locked(self, wait: float, give_up: Callable[[], bool] = lambda: False) -> Iterator[bool]:
        with self._store.lock(wait=wait, give_up=give_up) as held:
            copies = self._checked(give_up) if held else None
            try:
                yield held
            finally:
                if copies:
                    copies.sync(self._store.newest())

    def _checked(self, give_up: Callable[[], bool]) -> Exports | None:
        """Return the copies, before anything is changed, as the settings may be malformed; None if a token has come."""
        try:
            return self.copies
        except ConfigurationError:
            if not give_up():
                raise
            return None

    def _renew(
        self,
        intent: Intent,
        serves: Serves,
        reason: str,
        by: str = "",
        *,
        strict: bool = True,
        waited_out: datetime | None = None,
        unwanted: Callable[[], bool] = lambda: False,
    ) -> tuple[Token, Outcome | None]:
        """Return a token that `serves` and the request's outcome, which is None if no request was needed.

        If `strict`, only a token that others can use too is worth a request.
        """
        wait, store, began = 0.0 if intent is Intent.AHEAD else self.lock_wait, self._store, datetime.now(UTC)
        if intent is not Intent.REFRESH:  # which is declined without the secret
            self._market.credentials()  # before the lock, as a keyring may prompt a person
        with self._locked(wait, lambda: self._serving(serves) is not None) as held:
            if token := self._serving(serves) or (self._adopted(serves) if held else None):
                if held:
                    self._keep(token)
                return token, None
            if not held:
                raise TokenUnavailableError(self._busy(wait))
            standing = Standing(datetime.now(UTC), self._market, store.attempts(), store.newest(), waited_out)
            limits.check(intent, standing)
            self._share_failure(standing, began)
            if unwanted():
                raise TokenUnavailableError(
                    "The present token serves to the end of the session and is not replaced in it."
                )
            token, outcome = self._issue(reason, by, standing, strict=strict) or self._others(serves)
        if token.rejected_at is not None:  # KIS returned the dead token, so raise for the six hours, which alone matter
            limits.check(Intent.REFRESH, standing._replace(token=token, attempts=()))
        if intent is Intent.REQUIRED and not serves(token):
            raise TokenUnavailableError(self._useless(token))
        return token, outcome

    def _others(self, serves: Serves) -> tuple[Token, None]:
        """Return the token of the machine that was quicker; raise if it has none yet."""
        if token := self._serving(serves):
            return token, None
        text = "Another machine is asking KIS for this key's token, or the attempt could not be recorded"
        raise IssuanceLimitError(f"{text}. Nothing was sent; try again.", cause="minute")

    def _serving(self, serves: Serves) -> Token | None:
        token = self._store.newest()
        return token if token and serves(token) else None

    def _adopted(self, serves: Serves) -> Token | None:
        """Return the token that another client has issued with this key, if it `serves`: it saves us an issue."""
        token = self.copies.found(datetime.now(UTC))
        if token is None or not serves(token):
            return None
        _log.warning("Another client has issued a token with this key; it is used, and nothing was issued.")
        self._note(Outcome.IMPORTED, ADOPTED, token)
        return token

    def _note(self, outcome: Outcome, reason: str, token: Token) -> None:
        with contextlib.suppress(OSError):  # a full disk: the token itself is saved, or gone
            self._store.note(self._attempt(outcome, reason, expires_at=token.expires_at))

    def _keep(self, token: Token) -> None:
        """Save in the key's file a token that only a market's view, another client's file or this process has."""
        if self._store.read()[0] is not token or not self._store.saved(token):
            with contextlib.suppress(OSError):
                self._store.save(token)

    def _attempt(self, outcome: Outcome, reason: str, by: str = "", expires_at: datetime | None = None) -> Attempt:
        credentials = self._market.credentials_digest if outcome is Outcome.SENT else ""
        return Attempt(datetime.now(UTC), outcome, None, expires_at, reason, credentials, os.getpid(), by)

    def _issue(self, reason: str, by: str, standing: Standing, *, strict: bool) -> tuple[Token, Outcome] | None:
        """Make one request: record it before it is sent, add its outcome after it, and save its token.

        Return None if another machine was quicker; nothing was sent then. If `strict`, nothing is sent either where the
        token could not be saved.
        """
        gateway = self.gateway
        attempt = self._attempt(Outcome.SENT, reason, by)
        try:
            fence = self._store.begin(attempt, strict=strict)
        except OSError as error:
            raise self._unwritable(error) from None
        if fence is None:
            return None
        overtaken = False

        def depart() -> bool:
            nonlocal overtaken
            self.departing()
            overtaken = not self._store.depart(fence)
            return not overtaken

        answer = gateway.issue(depart)
        now = datetime.now(UTC)
        if isinstance(answer, Token):
            outcome = Outcome.SAME if _returned(answer, standing) else Outcome.ISSUED
            self._finish(fence, attempt._replace(at=now, outcome=outcome, expires_at=answer.expires_at), answer)
            return answer, outcome
        self._finish(fence, attempt._replace(at=now, outcome=answer.outcome, code=answer.code))
        if overtaken:
            return None
        retry_at = now + timedelta(seconds=self._market.settings.issue_interval)
        raise answer.as_error(standing._replace(now=now).serves, retry_at)

    def _finish(self, fence: Fence, attempt: Attempt, token: Token | None = None) -> None:
        """Save outcome and token; only log a failure, so that an issued token reaches its caller even if unsaved."""
        try:
            self._store.finish(fence, attempt, token)
        except (OSError, TokenStoreError) as error:
            what = "A token was issued but could not be saved" if token else f"{attempt.outcome} could not be recorded"
            why = getattr(error, "strerror", None) or "the token directory is refused"
            only = "Only this process has it; free" if token else "Free"
            _log.critical("%s at %s (%s). %s space or fix the permissions.", what, self._store.place, why, only)

    def _share_failure(self, standing: Standing, began: datetime) -> None:
        """Raise if KIS was found unreachable while this caller waited for the lock; it need not find that out again."""
        last = standing.attempts[-1] if standing.attempts else None
        if last and last.outcome is Outcome.UNREACHABLE and last.at >= began:
            raise IssuerUnavailableError(
                f"KIS cannot be reached, as another process found at {format_time(last.at)}. {standing.serves} "
                "To do: check the network and KIS_BASE_URL; then try again."
            )

    def _await(self, serves: Serves) -> Token | None:
        """Poll for the winner's token until the cool-down is over by the monotonic clock, plus up to `SPREAD` of it."""
        now = datetime.now(UTC)
        until = limits.cooldown_until(self._store.attempts(), now, self._market)
        left = (until - now).total_seconds() if until else 0.0
        if left > 1 and redaction.is_followed():
            _log.warning("Waiting %.0f s: KIS allows one request a minute.", left)
        left += self._market.settings.issue_interval * random.uniform(0, SPREAD)  # noqa: S311 - spreads waiters, no secret
        end = time.monotonic() + left
        while not (token := self._serving(serves)) and (rest := end - time.monotonic()) > 0:
            time.sleep(min(POLL, rest))
        return token

    def _useless(self, token: Token) -> str:
        if token.rejected_at is not None:
            since = format_time(token.rejected_at)
            return f"KIS returned the token that it has rejected since {since}. See KIS's notices; try again later."
        return (
            f"KIS's token expires earlier than was asked for, at {format_time(token.expires_at)} "
            f"(and KIS_BUFFER is {self._market.buffer:.0f} s). It is saved; ask for a shorter time, or later."
        )

    def _busy(self, wait: float) -> str:
        return (
            f"Another process has held the key's lock for {wait:.0f} s. Nothing was changed; `tokencore doctor` shows "
            f"which process holds the lock of the key {self._store.fingerprint}."
        )

    def _unwritable(self, error: OSError) -> TokenStoreError:
        draft = not isinstance(error.filename, str) or error.filename.endswith(".tmp")  # nobody knows that name
        place, why = self._store.place if draft else error.filename, error.strerror or type(error).__name__
        return TokenStoreError(
            f"The token store cannot be used: {place}: {why}. Nothing was issued; fix its permissions or free space."
        )


def newer(token: Token, before: Token | None) -> bool:
    """Whether `token` is not rejected and lasts longer than `before`, if there is one."""
    return token.rejected_at is None and (before is None or token.expires_at > before.expires_at)


def _is_own_refusal(last: Attempt | None) -> bool:
    """Whether KIS refused the last request by the minute limit, and this process sent it."""
    return last is not None and last.outcome is Outcome.LIMIT and (last.pid, last.host) == (os.getpid(), "")


def _returned(answer: Token, standing: Standing) -> bool:
    """Whether KIS returned an earlier token, issued by us or someone else, as its expiry or its age shows.

    What is known of that token, its issue time and a rejection, is set on `answer`.
    """
    present = standing.token if standing.token and standing.token.expires_at == answer.expires_at else None
    # The record still has a token whose file was deleted.
    earlier = {one.outcome: one.at for one in reversed(standing.attempts) if one.expires_at == answer.expires_at}
    answer.rejected_at = present.rejected_at if present else earlier.get(Outcome.REVOKED)
    issues = [answer.issued_at, present and present.issued_at, *earlier.values()]
    answer.issued_at = issued_at = min((at for at in issues if at), default=standing.now)
    age = standing.now - issued_at
    # If a full disk kept an issue out of the record, only its time is known; its token is nearer to that than to now.
    unsaved = [one.at for one in standing.attempts if one.outcome is Outcome.ISSUED and one.expires_at is None]
    return bool(present or earlier) or age > FOREIGN_AGE or any(abs(issued_at - at) < age for at in unsaved)


def _check_better(token: Token, present: Token, *, proven: bool) -> None:
    """Check that `token` may replace the `present` one, and raise otherwise."""
    if present.access_token == token.access_token:
        if present.rejected_at is not None and not proven:
            raise TokenUnavailableError(
                f"KIS has rejected this token at {format_time(present.rejected_at)}. Nothing was saved; leave out "
                "--offline to ask KIS whether it works again."
            )
    elif newer(present, None) and present.expires_at >= max(token.expires_at, datetime.now(UTC)):
        raise ConfigurationError(
            f"The present token lasts longer, until {format_time(present.expires_at)}; this one until "
            f"{format_time(token.expires_at)}. Nothing was saved; --force takes it anyway."
        )
