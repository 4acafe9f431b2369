"""A key: one app key in one environment, with all its markets. KIS's limits belong to it, not to a market."""

from __future__ import annotations

import os
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, NamedTuple

from tokencore import limits, outlook, policy
from tokencore.attempts import Attempt, Note, Outcome, failure, issued_within, last_issue
from tokencore.calendars import sessions
from tokencore.errors import ConfigurationError, TokenError
from tokencore.limits import format_time
from tokencore.outlook import PLAN_DAYS, Plan, RefreshWarning
from tokencore.policy import CLOCK_SLACK
from tokencore.renewer import FOREIGN_AGE, Renewer
from tokencore.sealing import Sensitive, sealed_class
from tokencore.stores import open_store

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tokencore.calendars.sessions import Override
    from tokencore.config.market import Market
    from tokencore.config.settings import Settings
    from tokencore.errors import CredentialsError
    from tokencore.kis.quotes import Evidence
    from tokencore.outlook import Horizon, Outlook
    from tokencore.stores.base import Store
    from tokencore.tokens import Token


@sealed_class()
class Key(Sensitive):
    """One app key in one environment: its markets, where its token is kept, and how it is renewed.

    Attributes:
        markets: the markets that share it, in the settings' order.
        market: the first of them, which has the numbers of the rules.
        store: where its token and issuance record are.
        label: what people call it, such as `us+kr` or `hk (paper)`.
        exchanges: what its markets trade, by order code.

    """

    __slots__ = ("__dict__", "__weakref__")

    def __init__(self, markets: Sequence[Market], known: Mapping[str, Override]) -> None:
        """Serve the key of `markets`; `known` is what the settings say about exchanges. Nothing is opened yet."""
        self.markets = list(markets)
        self.market = markets[0]
        self.name = self.market.name
        self.fingerprint = self.market.fingerprint
        self.store: Store = open_store(self.market, lambda: [one.name for one in self.markets])
        self.label = "+".join(one.name for one in markets) + (" (paper)" if self.market.environment == "paper" else "")
        self.exchanges = list(dict.fromkeys(code for one in markets for code in one.exchanges))
        self.overrides = known
        self._renewer: Renewer | None = None
        self._horizons: dict[tuple[str, ...], tuple[datetime, Horizon | None]] = {}

    def __repr__(self) -> str:
        return f"Key({self.label!r})"

    @classmethod
    def load(cls, settings: Settings) -> list[Key]:
        """Every key of the settings, in the order of its first market.

        Raises:
            ConfigurationError: no market has credentials; the message says what to set.

        """
        groups: dict[tuple[str, str], list[Market]] = {}
        for market in settings.able_markets():
            market.identified()
            groups.setdefault((market.fingerprint, market.environment), []).append(market)
        return [cls(markets, settings.overrides) for markets in groups.values()]

    @classmethod
    def trading(cls, settings: Settings, exchange: str) -> list[Key]:
        """Every key with a market that trades `exchange` (order code or alias).

        Raises:
            ConfigurationError: the exchange is unknown, or no market with credentials trades it.

        """
        place = sessions.exchange(exchange)
        found = [
            key
            for key in cls.load(settings)
            if any(sessions.exchange(code).code == place.code for code in key.exchanges)
        ]
        if not found:
            raise ConfigurationError(
                f"No market of your settings trades {place.code}; add it to one, such as "
                f"KIS_MARKETS__{place.quote_code or place.code}__EXCHANGES={place.code}.",
            )
        return found

    @property
    def renewer(self) -> Renewer:
        """How its token is renewed.

        Raises:
            ConfigurationError: the secret is missing.

        """
        if self._renewer is None:
            self._renewer = Renewer(self.markets, self.store)
        return self._renewer

    def state(self, now: datetime) -> KeyState:
        """All that is known of the key at `now` (aware), read once: token, record and what lies ahead.

        A token that could not be saved is left out, as no other process can use it.

        Raises:
            ConfigurationError: an exchange is unknown.
            TokenStoreError: the store cannot be used.

        """
        attempts = self.store.attempts()  # first: a fleet's store is then asked for the token too
        token, problem = self.store.newest(shared=True), ""
        if token is None:
            problem = self.store.read()[1]
        issued_at = token.issued_at if token else last_issue(attempts)
        ahead = outlook.look(token, issued_at, self.horizon(self.exchanges, now), self.market, now)
        return KeyState(self, now, token, problem, attempts, ahead)

    def horizon(self, codes: Sequence[str], now: datetime) -> Horizon | None:
        """When these exchanges need a token around `now`; asked of the calendars once in ten minutes."""
        known = self._horizons.get(tuple(codes))
        if known is None or not timedelta(0) <= now - known[0] < timedelta(minutes=10):
            known = now, outlook.horizon(codes, self.overrides, self.market.buffer, now)
            self._horizons[tuple(codes)] = known
        return known[1]

    def tick(self, state: KeyState) -> Decision:
        """Follow the renewal rule at `state`: renew if it is due and the limits allow it.

        After a failure the record keeps the pauses (65 s three times, then 5 min), so that any number of callers,
        however often they call, ask KIS no more than the rule does.
        """
        planned = state.outlook.next
        if planned is None or planned.at > state.now:
            return Decision(renewed=False, trouble=None, state=state)
        try:
            renewed = self.renewer.renew_due(state.token, f"rule: {planned.exception or planned.reason}")
        except TokenError as error:
            return Decision(renewed=False, trouble=error, state=self.state(state.now))
        return Decision(renewed=renewed, trouble=None, state=self.state(state.now))

    def obtain(self, until: datetime, now: datetime) -> bool:
        """Have a saved token that lasts to `until` (aware), give or take `CLOCK_SLACK`; whether this call issued it.

        Raises:
            TokenError: no such token can be had; a present one is untouched.

        """
        buffer, began, until = self.market.buffer, self.store.attempts(), until - CLOCK_SLACK
        token = self.store.newest()
        if token is None or not token.serves(until, buffer):
            token = self.renewer.obtain(lambda found: found.serves(max(until, now), buffer), f"get {self.name}")
        self.renewer.require_saved(token)
        last = self.store.attempts()[-1:]
        mine = Outcome.ISSUED, os.getpid(), ""  # a machine of a fleet names the others' only
        return last != began[-1:] and any((one.outcome, one.pid, one.host) == mine for one in last)

    def refresh(self, *, force: bool, reason: str, by: str) -> bool:
        """Renew now; True for a new token, False where KIS returned the present one; see `BaseTokenManager.refresh`."""
        return self.renewer.refresh(force=force, note=Note(reason, by).checked())

    @staticmethod
    def note(reason: str, by: str) -> tuple[str, str]:
        """A reason and a name as the record keeps them: on one line, cut to length, without what a terminal acts on.

        Raises:
            ConfigurationError: one of them contains a word as long as an app key.

        """
        return Note(reason, by).checked()

    def prove(self, token: Token) -> Evidence:
        """What one quote call tells of `token`; never raises because of KIS."""
        from tokencore.kis.quotes import for_exchanges

        return self.renewer.gateway.quote(token.access_token, for_exchanges(self.exchanges))

    def reject(self, token: Token, now: datetime) -> None:
        """Mark `token` dead for all processes."""
        self.renewer.reject(token.access_token, now)

    def sync_exports(self) -> None:
        """Bring the files of other clients up to date with the key's token; never raises."""
        self.renewer.sync_copies()


@sealed_class()
class KeyState(NamedTuple):
    """A key at one moment; times are aware UTC.

    Attributes:
        key: whose state it is.
        now: when it was read.
        token: the token that lasts longest, valid or not; None without one.
        problem: why there is none, where something is stored that cannot be used.
        attempts: the issuance record, oldest first.
        outlook: what lies ahead.

    """

    key: Key
    now: datetime
    token: Token | None
    problem: str
    attempts: list[Attempt]
    outlook: Outlook

    @property
    def status(self) -> str:
        """`VALID`, `EXPIRING_SOON`, `EXPIRED`, `NO_TOKEN`, `REJECTED` or `UNREADABLE`."""
        return outlook.word(self.token, self.problem, self.key.market, self.now)

    @property
    def serves_until(self) -> datetime | None:
        """Until when the present token serves: its expiry less the buffer; None where none serves now."""
        if self.token is None or not self.token.serves(self.now, self.key.market.buffer):
            return None
        return self.token.expires_at - timedelta(seconds=self.key.market.buffer)

    @property
    def served(self) -> str:
        """Whose token serves until when, for people; without a full stop."""
        until = self.serves_until
        return f"{self.key.label}: " + (f"the token serves until {format_time(until)[:-7]} KST" if until else NO_TOKEN)

    @property
    def covered(self) -> bool:
        """Whether the token serves the present or coming need; without any exchange, whether it serves now."""
        if self.outlook.needs:
            return self.outlook.unserved != self.outlook.needs[0]
        return self.serves_until is not None

    def lasts(self, until: datetime) -> bool:
        """Whether the token serves until then."""
        return self.token is not None and self.token.serves(until - CLOCK_SLACK, self.key.market.buffer)

    @property
    def allowed_from(self) -> datetime | None:
        """When a renewal that is due now would be allowed; None where refused credentials forbid it."""
        return self.key.renewer.allowed_from(self.attempts, self.token, self.now)

    @property
    def refusal(self) -> CredentialsError | None:
        """Why only a person can bring about a renewal: KIS refused these credentials; None where it did not."""
        return self.key.renewer.refusal(self.attempts, self.token, self.now)

    @property
    def refused(self) -> bool:
        """Whether KIS refused the credentials."""
        return self.refusal is not None

    @property
    def next_attempt(self) -> datetime | None:
        """When the rule will have something to do next; None if nothing is due, or a person has to act first."""
        return outlook.attempt_at(self.outlook.next, self.allowed_from, self.key.market, self.now)

    @property
    def failed(self) -> tuple[datetime, str] | None:
        """When the last attempt was (aware UTC) and why it brought no token, where a renewal is due; else None."""
        planned = self.outlook.next
        return failure(self.attempts) if planned and planned.at <= self.now else None

    @property
    def cooldown_until(self) -> datetime | None:
        """Until when no request for a token is allowed; None when one is."""
        return limits.cooldown_until(self.attempts, self.now, self.key.market)

    @property
    def issues_last_24h(self) -> int:
        """How many tokens the key has issued in the last 24 hours."""
        return len(issued_within(self.attempts, self.now))

    @property
    def foreign_issue(self) -> datetime | None:
        """When another program issued the present token, aware UTC; None where it is our own, or there is none.

        KIS returned it to us, the record knows no issue of it, and no request of ours from about that time. A token
        that nobody here asked KIS for, such as one put in by a person, is nobody's fault.
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
        """What a refresh now would bring about, for the person who asks for it; empty where it harms nothing."""
        soon = self.now + timedelta(seconds=1)
        needs = {code: sessions.needs([code], self.now, soon, self.key.overrides) for code in self.key.exchanges}
        running = {code: found[-1][1] for code, found in needs.items() if found}
        return outlook.preview_refresh(self.now, self.token, self.attempts, running, self.key.market)

    def need_of(self, market: Market) -> tuple[datetime, datetime] | None:
        """The present or coming need of one of the key's markets; None without exchanges."""
        ahead = self.key.horizon(market.exchanges, self.now)
        return next((need for need in ahead.needs if need[1] > self.now), None) if ahead else None

    def plan(self, days: int = PLAN_DAYS) -> Plan:
        """The coming `days` of KST, if every renewal succeeds."""
        key, ahead, buffer = self.key, self.outlook, timedelta(seconds=self.key.market.buffer)
        start = outlook.plan_start(self.now)
        until = start + timedelta(days=days)
        token = self.token if self.token and self.token.rejected_at is None else None
        refused = self.refused
        coming = [ahead.next] if ahead.next and not key.exchanges and not refused else []
        if key.exchanges and not refused:
            coming = policy.renewals(
                self.now,
                sessions.needs(key.exchanges, self.now - outlook.RAN_BEFORE, until + outlook.AFTER, key.overrides),
                until=until,
                issued_at=self.token.issued_at if self.token else None,
                expires_at=token.expires_at + CLOCK_SLACK if token else None,
                anchor=ahead.anchor,
                buffer=buffer,
            )
        rows = outlook.make_rows(key.exchanges, start, until, key.overrides)
        names = [one.name for one in key.markets]
        return Plan(names, start, self.now, until, self.token, ahead, rows, coming, key.market.buffer, refused)


class Decision(NamedTuple):
    """What a tick did: whether it issued a token, why a renewal that was due failed, and how the key is now."""

    renewed: bool
    trouble: TokenError | None
    state: KeyState


NO_TOKEN = "no valid token"  # noqa: S105 - words
