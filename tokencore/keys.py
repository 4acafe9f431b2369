"""A key: one app key in one environment, with all its markets. KIS's limits apply to the key, not to a market."""

from __future__ import annotations

import re
from datetime import UTC, datetime, time, timedelta
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from tokencore import limits, outlook, policy
from tokencore.attempts import (
    BY_LENGTH,
    REASON_LENGTH,
    Attempt,
    Outcome,
    failure,
    issued_within,
    retry_delay,
)
from tokencore.calendars import sessions
from tokencore.clients.approval import approval_key
from tokencore.errors import ConfigurationError, CredentialsError, IssuanceLimitError, TokenError
from tokencore.limits import Standing
from tokencore.outlook import PLAN_DAYS, Plan, RefreshWarning
from tokencore.policy import CLOCK_SLACK
from tokencore.redaction import clean
from tokencore.renewer import FOREIGN_AGE, Renewer
from tokencore.sealing import Sensitive, sealed_class
from tokencore.stores import open_store
from tokencore.tokens import KST, format_time

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tokencore.config.market import Market
    from tokencore.config.settings import Settings
    from tokencore.kis.gateway import Evidence
    from tokencore.outlook import Need, Outlook
    from tokencore.stores.base import Store
    from tokencore.tokens import Token

    Horizons = dict[tuple[str, ...], tuple[datetime, Outlook]]

HORIZON_AGE = timedelta(minutes=10)  # how long an answer of the calendars is kept before they are asked again


@sealed_class()
class Key(Sensitive):
    """One app key in one environment: its `markets`, the `store` of its token, and how the token is renewed.

    `market` is the first market, whose settings (buffer, intervals, limits) apply to the key; `label` is the key's name
    for people, such as `us+kr` or `hk (paper)`; `exchanges` are the order codes that its markets trade. Whatever
    asks KIS raises ConfigurationError if the secret is missing.
    """

    __slots__ = ("__dict__", "__weakref__")
    SHORT_WORDS = r"^[!-~]{0,35}([^!-~][!-~]{0,35})*$"  # no run of visible ASCII as long as an app key (36)

    def __init__(self, markets: Sequence[Market], store: Store | None = None, horizons: Horizons | None = None) -> None:
        """Serve the key that `markets` share; keys of the same settings may share `horizons`. Nothing is read yet."""
        self.markets = list(markets)
        self.market = markets[0]
        self.name = self.market.name
        self.fingerprint = self.market.fingerprint
        self.store = store or self.store_of(self.market)
        self.label = "+".join(one.name for one in markets) + (" (paper)" if self.market.environment == "paper" else "")
        self.exchanges = list(dict.fromkeys(code for one in markets for code in one.exchanges))
        self.overrides = self.market.settings.overrides
        self._renewer: Renewer | None = None
        self._horizons: Horizons = {} if horizons is None else horizons

    def __repr__(self) -> str:
        return f"Key({self.label!r})"

    @classmethod
    def load(cls, settings: Settings, markets: Iterable[Market] = ()) -> list[Key]:
        """Return every key of the settings, or only those of `markets`, ordered by each key's first market.

        Raises:
            ConfigurationError: no market has credentials, or one of `markets` has none; the message says what to set.
        """
        groups: dict[str, list[Market]] = {}
        horizons: Horizons = {}
        for market in markets or settings.able_markets():
            market.identified()
            groups.setdefault(market.key_name, []).append(market)
        return [cls(sharing, horizons=horizons) for sharing in groups.values()]

    @classmethod
    def trading(cls, settings: Settings, exchange: str) -> list[Key]:
        """Return every key with a market that trades `exchange` (order code or alias).

        Raises:
            ConfigurationError: the exchange is unknown, or no market with credentials trades it.
        """
        place = sessions.exchange(exchange)
        found = [key for key in cls.load(settings) if place in map(sessions.exchange, key.exchanges)]
        if not found:
            raise ConfigurationError(
                f"No market of your settings trades {place.code}; add it to one, such as "
                f"KIS_MARKETS__{place.quote_code or place.code}__EXCHANGES={place.code}.",
            )
        return found

    @property
    def renewer(self) -> Renewer:
        """The object that renews the key's token, made on first use."""
        if self._renewer is None:
            self._renewer = Renewer(self.market, self.store, lambda: self.markets)
        return self._renewer

    def store_of(self, market: Market) -> Store:
        """Return the key's store as seen by `market`, one of its markets."""
        return open_store(market, lambda: [one.name for one in self.markets])

    def state(self, now: datetime, *, shared: bool = True) -> KeyState:
        """Read the key's token and record once, and return all that is known of the key at `now` (aware).

        A token that could not be saved, and so is of no use to other processes, is left out unless `shared` is False.

        Raises:
            TokenStoreError: the store cannot be used.
        """
        attempts = self.store.attempts()  # read first: a fleet's store is then asked for the token too
        token, problem = self.store.read()
        if token and shared and not self.store.saved(token):
            token = self.store.newest(shared=True)
        return KeyState(self, now, token, problem, attempts)

    def horizon(self, codes: Sequence[str], now: datetime) -> Outlook:
        """Return when these exchanges need a token around `now`, from the cache if that is recent."""
        known = self._horizons.get(tuple(codes))
        if known is None or not timedelta(0) <= now - known[0] < HORIZON_AGE:
            known = now, outlook.horizon(codes, self.overrides, self.market.buffer, now)
            self._horizons[tuple(codes)] = known
        return known[1]

    def running(self, now: datetime) -> dict[str, datetime]:
        """Return the exchanges that need a token now, each with the end of its need."""
        soon = now + timedelta(seconds=1)
        needs = {code: sessions.needs([code], now, soon, self.overrides) for code in self.exchanges}
        return {code: found[0][1] for code, found in needs.items() if found and found[0][0] <= now}

    def in_served_session(self, token: Token, now: datetime) -> bool:
        """Whether some exchange needs a token now and `token` serves to the end, so that no swap should happen now."""
        running = self.running(now)
        return bool(running) and token.serves(max(running.values()) - CLOCK_SLACK, self.market.buffer)

    def tick(self, state: KeyState) -> Decision:
        """Apply the renewal rule to `state`: renew if that is due and the limits allow it; extra calls do no harm.

        Raises:
            TokenStoreError: after a renewal that was due, the store cannot be used.
        """
        planned, renewed, trouble = state.outlook.next, False, None
        if planned is None or planned.at > state.now:
            return Decision(renewed, trouble, state)
        try:
            renewed = self.renewer.renew_due(state.token, f"rule: {planned.exception or planned.reason}")
        except TokenError as error:
            trouble = error
        return Decision(renewed, trouble, self.state(state.now))

    def obtain(self, until: datetime, now: datetime) -> bool:
        """Ensure a saved token that lasts to `until` (aware) less `CLOCK_SLACK`; return whether this call issued it.

        Raises:
            TokenError: there is no such token and none could be issued; a present one is untouched.
        """
        until, buffer, issued = until - CLOCK_SLACK, self.market.buffer, False
        token = self.store.newest()
        if token is None or not token.serves(until, buffer):
            reason = f"get {self.name}"
            token, issued = self.renewer.obtain(lambda one: one.serves(max(until, now), buffer), reason, strict=True)
        self.renewer.require_saved(token)
        return issued

    def refresh(self, *, force: bool, reason: str, by: str) -> bool:
        """Renew now; return False if KIS returned the present token again. See `BaseTokenManager.refresh`."""
        reason, by = self.note(reason, by)
        return self.renewer.refresh(force=force, reason=reason, by=by)

    @classmethod
    def note(cls, reason: str, by: str) -> tuple[str, str]:
        """Return the reason for an issue and the person asking as the record keeps them: cleaned, and cut to length.

        Raises:
            ConfigurationError: one of them holds a word as long as an app key; no request was sent to KIS.
        """
        reason, by = clean(reason), clean(by)
        for name, text in (("reason", reason), ("name", by)):
            if not re.fullmatch(cls.SHORT_WORDS, text):
                raise ConfigurationError(
                    f"The {name} contains a word of 36 characters or more, as keys and tokens are, so it is not kept. "
                    "Nothing was asked of KIS; use shorter words."
                )
        return reason[:REASON_LENGTH].rstrip(), by[:BY_LENGTH].rstrip()

    retry_delay = staticmethod(retry_delay)

    def prove(self, token: Token) -> Evidence:
        """Make one quote call and return what it shows about `token`; no answer of KIS makes it raise."""
        return self.renewer.gateway.quote(token.access_token, self.exchanges)

    def reject(self, token: Token, now: datetime) -> None:
        """Mark `token` dead for all processes.

        Raises:
            TokenError: the secret is missing, or the mark could not be saved; other processes may still serve it.
        """
        self.renewer.reject(token.access_token, now)

    def sync_exports(self) -> None:
        """Bring the files of other clients up to date with the key's token, and log what fails."""
        self.renewer.sync_copies()


@sealed_class()
class KeyState(Sensitive):
    """The state of a key at one moment; times are aware UTC.

    `refusal`, `forbidden` and `plan` raise ConfigurationError if the secret is missing.

    Attributes:
        key: the key.
        now: the moment of the state.
        token: the present token, valid or not; None without one.
        problem: why there is no token although something is stored; empty otherwise.
        attempts: the issuance record, oldest first.
        status: `VALID`, `EXPIRING_SOON`, `EXPIRED`, `NO_TOKEN`, `REJECTED` or `UNREADABLE`.
        serves_until: the token's expiry less the buffer; None if no token serves now.
        cooldown_until: until when no request for a token is allowed; None if one is allowed now.
        issues_last_24h: how many tokens the key has issued in the last 24 hours.
    """

    def __init__(self, key: Key, now: datetime, token: Token | None, problem: str, attempts: list[Attempt]) -> None:
        """Take what was read from the store; the outlook is computed on first use."""
        self.key = key
        self.now = now
        self.token = token
        self.problem = problem
        self.attempts = attempts
        self.status = _status(token, problem, key.market, now)
        serving = token if token and token.serves(now, key.market.buffer) else None
        self.serves_until = serving.expires_at - timedelta(seconds=key.market.buffer) if serving else None
        self.cooldown_until = limits.cooldown_until(attempts, now, key.market)
        self.issues_last_24h = len(issued_within(attempts, now))

    @cached_property
    def outlook(self) -> Outlook:
        """What lies ahead of the key: its needs, the anchor and the next renewal.

        Raises:
            ConfigurationError: an exchange is unknown.
        """
        ahead = self.key.horizon(self.key.exchanges, self.now) if self.key.exchanges else None
        return outlook.look(self.token, self.attempts, ahead, self.key.market, self.now)

    def without_token(self, problem: str) -> KeyState:
        """Return the same state without a token, for a market whose own file has a `problem`."""
        return KeyState(self.key, self.now, None, problem, self.attempts)

    @property
    def served(self) -> str:
        """The key's label and until when its token serves, for people; without a full stop."""
        until = self.serves_until
        said = f"the token serves until {format_time(until)[:-7]} KST" if until else "no valid token"
        return f"{self.key.label}: {said}"

    @property
    def covered(self) -> bool:
        """Whether the token serves the present or next need; without exchanges, whether it serves now."""
        if self.outlook.needs:
            return self.outlook.unserved != self.outlook.needs[0]
        return self.serves_until is not None

    @cached_property
    def approval_expires_at(self) -> datetime | None:
        """When the websocket's approval key expires (aware UTC); None if none was requested, or it cannot be read."""
        approval = approval_key(self.key.store)
        return approval.expires_at if approval else None

    def lasts(self, until: datetime) -> bool:
        """Whether the token serves until `until`, allowing for a small difference between our clock and KIS's."""
        return self.token is not None and self.token.serves(until - CLOCK_SLACK, self.key.market.buffer)

    @property
    def refusal(self) -> CredentialsError | None:
        """The error if KIS refused these credentials, so that only a person can get a renewal; None otherwise."""
        return limits.refusal(self._standing)

    @property
    def forbidden(self) -> TokenError | None:
        """The error if even a caller without a token may send no request, for longer than the minute; else None."""
        try:
            limits.check(limits.Intent.REQUIRED, self._standing)
        except IssuanceLimitError as limit:
            return None if limit.cause == "minute" else limit
        except CredentialsError as refused:
            return refused
        return None

    @property
    def next_attempt(self) -> datetime | None:
        """When a renewal is tried next; None if none is needed, or a person has to act first.

        That is when it is planned. If it is due already, it is when limits and pauses allow it or, if they allow it
        now, one issue interval from now.
        """
        planned, market = self.outlook.next, self.key.market
        try:
            allowed = limits.allowed_from(self._standing) if planned else None
        except ConfigurationError:  # the keyring with the secret is locked
            return None
        if planned is None or allowed is None:
            return None
        if planned.at > self.now:
            return planned.at
        return allowed if allowed > self.now else self.now + timedelta(seconds=market.settings.issue_interval)

    @property
    def failed(self) -> tuple[datetime, str] | None:
        """When the last attempt was (aware UTC) and why it failed; None if it did not, or if no renewal is due."""
        planned = self.outlook.next
        return failure(self.attempts) if planned and planned.at <= self.now else None

    @property
    def foreign_issue(self) -> datetime | None:
        """When another program issued the present token, aware UTC; None if we issued it, or there is none.

        It was another program if KIS returned the token to us, and the record has neither its issue nor any request of
        ours from about that time.
        """
        if self.token is None or self.token.issued_at is None:
            return None
        issued_at, expires_at = self.token.issued_at, self.token.expires_at
        first = next((one for one in self.attempts if one.expires_at == expires_at), None)
        if first is None or first.outcome is not Outcome.SAME:
            return None
        ours = any(abs(one.at - issued_at) <= FOREIGN_AGE for one in self.attempts if one.counts)
        return None if ours else issued_at

    def warnings(self) -> list[RefreshWarning]:
        """Return what a person should know before a refresh now; empty if it would do no harm."""
        return outlook.preview_refresh(self.now, self.token, self.attempts, self.key.running(self.now), self.key.market)

    def need_of(self, market: Market) -> Need | None:
        """Return the present or next need of `market`, one of the key's markets; None without exchanges."""
        ahead = self.key.horizon(market.exchanges, self.now)
        return next((need for need in ahead.needs if need[1] > self.now), None)

    def plan(self, days: int = PLAN_DAYS) -> Plan:
        """Plan the coming `days` in KST, today included, assuming that every renewal succeeds."""
        key, ahead, buffer, refused = self.key, self.outlook, self.key.market.buffer, self.refusal is not None
        start = datetime.combine(self.now.astimezone(KST).date(), time(), KST).astimezone(UTC)
        until = start + timedelta(days=days)
        coming = [ahead.next] if ahead.next and ahead.next.at <= until else []
        if coming and key.exchanges:
            (first,) = coming
            at = (first.reason == outlook.LOST and outlook.last_issue(self.attempts)) or first.at
            coming += policy.renewals(
                first.at,
                sessions.needs(key.exchanges, self.now - outlook.RAN_BEFORE, until + outlook.AFTER, key.overrides),
                until=until,
                issued_at=at,
                expires_at=at + policy.LIFE,
                anchor=ahead.anchor,
                buffer=buffer,
            )
        rows, names = outlook.make_rows(key.exchanges, start, until, key.overrides), [one.name for one in key.markets]
        return Plan(names, start, self.now, until, self.token, ahead, rows, [] if refused else coming, buffer, refused)

    @property
    def _standing(self) -> Standing:
        return Standing(self.now, self.key.market, self.attempts, self.token)


def _status(token: Token | None, problem: str, market: Market, now: datetime) -> str:
    if token is None:
        return "UNREADABLE" if problem else "NO_TOKEN"
    if token.rejected_at is not None:
        return "REJECTED"
    if not token.serves(now, market.buffer):
        return "EXPIRED"
    return "VALID" if token.serves(now, market.proactive_window) else "EXPIRING_SOON"


class Decision(NamedTuple):
    """What a tick did: whether it brought a new token, why a due renewal failed, and the key's state afterwards."""

    renewed: bool
    trouble: TokenError | None
    state: KeyState
