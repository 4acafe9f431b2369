"""Renewing one key's token: check, lock, check again, ask the limits, record, request, save.

Of all threads, processes and machines that want the token at once one sends a request; the others get its token. The
old token is never given up before its successor is stored, and no refusal is answered by another request at once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from tokencore import limits
from tokencore.attempts import Attempt, Note, Outcome, latest
from tokencore.clients.exports import Exports
from tokencore.config.market import digest
from tokencore.errors import (
    CredentialsError,
    IssuanceLimitError,
    IssuerUnavailableError,
    TokenError,
    TokenStoreError,
    TokenUnavailableError,
)
from tokencore.limits import Intent, Standing, format_time
from tokencore.sealing import Sensitive
from tokencore.tokens import Token

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tokencore.config.market import Market
    from tokencore.kis.gateway import Gateway
    from tokencore.stores.base import Fence, Store

    Serves = Callable[[Token], bool]

_log = logging.getLogger("tokencore")
ADOPTED = "issued by another client"  # what the record says of a token that another client's file brought
FOREIGN_AGE = timedelta(minutes=10)  # a token this old at its arrival was not issued for our request
POLL = 0.1  # seconds between two looks for the token of whoever was first
ROUNDS, REQUESTS = 4, 2  # cool-downs that a caller without a token waits out, and requests it makes, at most
SPREAD = 0.1  # of a cool-down by which waiters start apart, so that not all ask in the same second


class Renewer(Sensitive):
    """Renews the token of one key in its store; any number of them, in any process, act as one."""

    __slots__ = ("__dict__", "_secrets")  # what `vars` shows has no secret

    def __init__(self, markets: Sequence[Market], store: Store) -> None:
        """Serve the key of `store`, which `markets` share; the first gives the numbers of the rules.

        Raises:
            ConfigurationError: the settings are malformed, or the secret is missing.

        """
        self._market = markets[0]
        self._store = store
        self._secrets = self._market.credentials()
        self.credentials = digest(*self._secrets, length=8)
        self.copies = Exports(markets, store)
        self.departing: Callable[[], object] = lambda: None  # called as a request leaves
        self._gateway: Gateway | None = None

    def __repr__(self) -> str:
        return f"Renewer({self._store.fingerprint!r})"

    @property
    def gateway(self) -> Gateway:
        """Made when KIS is asked: its imports cost more than all the rest.

        Raises:
            ConfigurationError: the base URL is no https address, nor one on loopback; nothing was sent.

        """
        if self._gateway is None:
            from tokencore.kis.gateway import Gateway

            self._gateway = Gateway(self._market.base_url, self._secrets, timeout=self._market.settings.timeout)
        return self._gateway

    def obtain(self, serves: Serves, reason: str) -> Token:
        """A token that `serves`, renewed if it must be; inside a cool-down it waits for another's token or its turn.

        Raises:
            TokenError: a limit forbids it also after the wait, or the request failed. The present token stays.

        """
        waited_out: datetime | None = None
        refused = 0
        for left in reversed(range(ROUNDS)):
            try:
                return self._renew(Intent.REQUIRED, serves, Note(reason), waited_out=waited_out)[0]
            except IssuanceLimitError as limit:
                last = latest(self._store.attempts())
                refused += _is_own_refusal(last)
                if limit.cause != "minute" or not left or refused == REQUESTS:
                    raise
            if token := self._await(serves):
                return token
            waited_out = last.at if last else None
        raise AssertionError("unreachable")

    def renew_ahead(self, present: Token, reason: str, unwanted: Callable[[], bool]) -> Token | None:
        """Try to get a successor while `present` still serves; None where another process renews or it is unwanted.

        Raises:
            TokenError: a limit forbids it, or the request failed. The present token goes on serving.

        """
        try:
            return self._renew(
                Intent.AHEAD, lambda found: newer(found, present), Note(reason), wait=0, unwanted=unwanted
            )[0]
        except TokenUnavailableError as busy:
            _log.debug("No renewal ahead: %s", busy)
        except IssuanceLimitError as limit:
            if limit.cause == "minute" and _is_own_refusal(latest(self._store.attempts())):
                raise
            _log.debug("No renewal ahead: %s", limit)
        return None

    def renew_due(self, present: Token | None, reason: str) -> bool:
        """Have a successor of `present`, without waiting for a cool-down; False where another process was quicker.

        Raises:
            TokenError: a limit forbids it, the request failed, or the new token could not be saved.

        """
        token, issued = self._renew(Intent.DUE, lambda found: newer(found, present), Note(reason))
        self.require_saved(token)
        return issued and newer(token, present)

    def refresh(self, *, force: bool, note: Note) -> bool:
        """Renew now; True for a new token, False where KIS returned the present one.

        Raises:
            TokenError: a limit forbids it, the request failed, or the new token could not be saved.

        """
        before = self._store.newest()
        intent = Intent.FORCE if force else Intent.REFRESH
        token, _ = self._renew(intent, lambda found: before is None or found.expires_at > before.expires_at, note)
        self.require_saved(token)
        return before is None or token.access_token != before.access_token

    def allowed_from(self, attempts: list[Attempt], token: Token | None, now: datetime) -> datetime | None:
        """When the limits allow a renewal that is due at `now`; None where refused credentials forbid it."""
        return limits.allowed_from(Standing(now, attempts, token, self.credentials), self._market)

    def refusal(self, attempts: list[Attempt], token: Token | None, now: datetime) -> CredentialsError | None:
        """What forbids a renewal until a person acts: KIS refused these credentials; None where it did not."""
        try:
            limits.check_credentials(Intent.DUE, Standing(now, attempts, token, self.credentials), self._market)
        except CredentialsError as error:
            return error.with_traceback(None)
        return None

    def adopt(self, token: Token, check: Callable[[Token | None], None]) -> bool:
        """Store a token that was issued elsewhere, if `check` accepts it; False where it was known already.

        Its issue, which the token tells, starts KIS's six hours and the day of the renewal rule; as no request of
        ours it moves neither the cool-down nor the ceiling.

        Raises:
            TokenError: from `check`, or the token could not be written.

        """
        with self.changing():
            present = self._store.newest()
            check(present)
            self._store.save(token)
            if present and present.access_token == token.access_token and present.rejected_at is None:
                return False
            self._store.note(self._imported(token, f"import {self._market.name}"))
            return True

    def reject(self, access_token: str, now: datetime) -> None:
        """Note that KIS rejected this token, so that no process serves it again; another token is left alone.

        Raises:
            TokenStoreError: the note could not be written.

        """
        with self.changing():
            token = self._store.newest()
            if token and token.access_token == access_token and token.rejected_at is None:
                token.rejected_at = now
                _log.warning("KIS rejected the token. %s", limits.what_serves(token, now, self._market.buffer))
            if token:
                self._store.save(token)

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """The lock for a change of what is stored; what the system refuses becomes one error.

        Raises:
            TokenStoreError: another process holds the lock for too long, or the store cannot be written.

        """
        wait = limits.lock_wait(self._market)
        with self._locked(wait) as held:
            if not held:
                raise TokenStoreError(self._busy(wait))
            try:
                yield
            except OSError as error:
                raise self._unwritable(error) from None

    def require_saved(self, token: Token) -> None:
        """Return where the token is stored for others too.

        Raises:
            TokenStoreError: only this process has it.

        """
        if not self._store.saved(token):
            raise TokenStoreError(
                f"KIS issued a token that could not be saved at {self._store.place}: only this process has it. Free "
                "space or fix the permissions, and renew again: for six hours KIS returns the same one."
            )

    def sync_copies(self) -> None:
        """Adopt a token that lasts longer from another client's file, and bring all the files up to date; never raises.

        A token that could not be saved before is saved now. Where another process holds the lock, it does so.
        """
        try:
            with self._locked(0) as held:
                if held and (token := self._adopted(lambda _: True) or self._store.newest()):
                    self._keep(token, held=held)
        except (TokenError, OSError) as error:
            _log.error("The copies for other clients could not be updated: %s", error)

    @contextlib.contextmanager
    def _locked(self, wait: float, give_up: Callable[[], bool] = lambda: False) -> Iterator[bool]:
        with self._store.lock(wait=wait, give_up=give_up) as held:
            try:
                yield held
            finally:
                if held:
                    token = self._store.newest()
                    living = token and token.rejected_at is None and token.expires_at > datetime.now(UTC)
                    self.copies.sync(token if living else None)

    def _renew(
        self,
        intent: Intent,
        serves: Serves,
        note: Note,
        *,
        waited_out: datetime | None = None,
        wait: float | None = None,
        unwanted: Callable[[], bool] = lambda: False,
    ) -> tuple[Token, bool]:
        """A token that `serves`, and whether it was issued here rather than by a quicker process."""
        wait = limits.lock_wait(self._market) if wait is None else wait
        began = datetime.now(UTC)
        with self._locked(wait, lambda: self._serving(serves) is not None) as held:
            if token := self._serving(serves) or (self._adopted(serves) if held else None):
                self._keep(token, held=held)
                return token, False
            if not held:
                raise TokenUnavailableError(self._busy(wait))
            now = datetime.now(UTC)
            standing = Standing(now, self._store.attempts(), self._store.newest(), self.credentials, waited_out)
            limits.check(intent, standing, self._market)
            self._share_failure(standing, began)
            if unwanted():
                raise TokenUnavailableError("The present token serves the open session to its end: no swap inside it.")
            issued = self._issue(note, standing)
            if issued is None:
                if token := self._serving(serves):
                    return token, False
                text = "Another machine is asking KIS for this key's token, or the attempt could not be recorded"
                raise IssuanceLimitError(f"{text}. Nothing was sent; try again.", retry_at=None, cause="minute")
            token = issued
        if token.rejected_at is not None:  # KIS returned the dead one: now only the six hours matter
            limits.check(Intent.REFRESH, standing._replace(token=token, attempts=()), self._market)
        if intent is Intent.REQUIRED and not serves(token):
            raise TokenUnavailableError(self._useless(token))
        return token, True

    def _serving(self, serves: Serves) -> Token | None:
        token = self._store.newest()
        return token if token and serves(token) else None

    def _adopted(self, serves: Serves) -> Token | None:
        """A token of this key that another client has issued by itself since: it is the newest one, for no issue."""
        now = datetime.now(UTC)
        token = self.copies.found(now)
        if token is None or not serves(token):
            return None
        _log.warning("Another client has issued a token with this key; it is used, and nothing was issued.")
        with contextlib.suppress(OSError):
            self._store.note(self._imported(token, ADOPTED))
        return token

    def _keep(self, token: Token, *, held: bool) -> None:
        """The key's file gets what only a market's view, another client's file or this process has."""
        if held and (self._store.read()[0] is not token or not self._store.saved(token)):
            with contextlib.suppress(OSError):
                self._store.save(token)

    def _issue(self, note: Note, standing: Standing) -> Token | None:
        """One request: recorded before it is sent and completed after it, and its token saved.

        None where another machine was quicker: nothing was sent.
        """
        gateway = self.gateway
        attempt = self._attempt(Outcome.SENT, note)
        try:
            fence = self._store.begin(attempt)
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
        if overtaken:
            self._finish(fence, attempt._replace(at=now, outcome=Outcome.UNREACHABLE))
            return None
        if not isinstance(answer, Token):
            self._finish(fence, attempt._replace(at=now, outcome=answer.outcome, code=answer.code))
            serves = limits.what_serves(standing.token, now, self._market.buffer)
            raise answer.as_error(serves, now + timedelta(seconds=self._market.settings.issue_interval))
        same = _returned(answer, standing)
        outcome = Outcome.SAME if same else Outcome.ISSUED
        self._finish(fence, attempt._replace(at=now, outcome=outcome, expires_at=answer.expires_at), answer)
        return answer

    def _finish(self, fence: Fence, attempt: Attempt, token: Token | None = None) -> None:
        """A token that was issued reaches its caller even where it cannot be saved."""
        try:
            self._store.finish(fence, attempt, token)
        except OSError as error:
            what = "A token was issued but could not be saved" if token else f"{attempt.outcome} could not be recorded"
            _log.critical(
                "%s at %s (%s). Only this process has it; free space or fix the permissions.",
                what,
                self._store.place,
                error.strerror,
            )

    def _attempt(self, outcome: Outcome, note: Note) -> Attempt:
        return Attempt(
            datetime.now(UTC), outcome, reason=note.reason, by=note.by, credentials=self.credentials, pid=os.getpid()
        )

    def _imported(self, token: Token, reason: str) -> Attempt:
        return self._attempt(Outcome.IMPORTED, Note(reason))._replace(expires_at=token.expires_at)

    def _share_failure(self, standing: Standing, began: datetime) -> None:
        """Who waited for the lock while its holder could not reach KIS need not find that out again."""
        last = standing.attempts[-1] if standing.attempts else None
        if last and last.outcome is Outcome.UNREACHABLE and last.at >= began:
            serves = limits.what_serves(standing.token, standing.now, self._market.buffer)
            raise IssuerUnavailableError(
                f"KIS cannot be reached, as another process found at {format_time(last.at)}. {serves} "
                "To do: check the network and KIS_BASE_URL; then try again."
            )

    def _await(self, serves: Serves) -> Token | None:
        """Poll for the winner's token until the cool-down is over, by the monotonic clock."""
        now = datetime.now(UTC)
        until = limits.cooldown_until(self._store.attempts(), now, self._market)
        left = (until - now).total_seconds() if until else 0.0
        if left > 1:
            _log.warning("Waiting %.0f s: KIS allows one request a minute.", left)
        left += self._market.settings.issue_interval * random.uniform(0, SPREAD)  # noqa: S311 - spreads waiters, no secret
        end = time.monotonic() + left
        while not (token := self._serving(serves)) and (rest := end - time.monotonic()) > 0:
            time.sleep(min(POLL, rest))
        return token

    def _useless(self, token: Token) -> str:
        if token.rejected_at is not None:
            return (
                f"KIS returned the token that it has rejected since {format_time(token.rejected_at)}. "
                "See KIS's notices of maintenance, and try again later."
            )
        return (
            f"KIS's token expires too early for what was asked, at {format_time(token.expires_at)} "
            f"(and KIS_BUFFER is {self._market.buffer:.0f} s). It is saved; ask for less, or later."
        )

    def _busy(self, wait: float) -> str:
        return (
            f"Another process has held the key's lock for {wait:.0f} s. Nothing was changed; `tokencore doctor` names "
            f"the process that holds the lock of the key {self._store.fingerprint}."
        )

    def _unwritable(self, error: OSError) -> TokenStoreError:
        return TokenStoreError(
            f"The token store cannot be used: {self._store.place}: {error.strerror or type(error).__name__}. "
            "Nothing was issued; fix its permissions or free space."
        )


def newer(token: Token, before: Token | None) -> bool:
    """Whether `token` is a living successor of `before`."""
    return token.rejected_at is None and (before is None or token.expires_at > before.expires_at)


def _is_own_refusal(last: Attempt | None) -> bool:
    """Whether KIS refused the last request, and this process sent it."""
    return last is not None and last.outcome is Outcome.LIMIT and (last.pid, last.host) == (os.getpid(), "")


def _returned(answer: Token, standing: Standing) -> bool:
    """Whether KIS returned an earlier token: its expiry is known, or it was issued long before, by someone else.

    What else is known of it holds for the answer then.
    """
    now = standing.now
    present = standing.token if standing.token and standing.token.expires_at == answer.expires_at else None
    # The record also knows a token whose file was deleted.
    earlier = [
        one.at for one in standing.attempts if one.expires_at == answer.expires_at or _is_issue(one, answer, now)
    ]
    if present:
        answer.rejected_at = present.rejected_at
    issues = [answer.issued_at, present and present.issued_at, *earlier]
    answer.issued_at = min((at for at in issues if at), default=None)
    foreign = answer.issued_at is not None and answer.issued_at < now - FOREIGN_AGE
    return bool(present or earlier or foreign)


def _is_issue(attempt: Attempt, answer: Token, now: datetime) -> bool:
    """Whether an issue of which only the time is known brought this answer: it tells a time nearer to that than now."""
    if attempt.outcome is not Outcome.ISSUED or attempt.expires_at is not None or answer.issued_at is None:
        return False
    return abs(attempt.at - answer.issued_at) < abs(now - answer.issued_at)
