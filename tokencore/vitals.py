"""How every configured market is, again and again and cheaply: what monitoring asks, many times an hour.

Read-only, and without a question to KIS. What cannot change between two looks is not computed anew: a file
is parsed when it differs, settings are read once a minute, and sessions are asked for every ten minutes.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

from tokencore import limits, record, rule, sources, status
from tokencore.cache import Cache, longest
from tokencore.errors import ConfigurationError
from tokencore.issuance import with_marks
from tokencore.ledger import Ledger
from tokencore.limits import Standing, tell
from tokencore.lock import KeyLock
from tokencore.market import Market, digest, fingerprint, market_names
from tokencore.record import IssuanceRecord
from tokencore.settings import Settings, overrides

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable
    from datetime import datetime
    from typing import Any

    from tokencore.record import Outcome
    from tokencore.rule import Horizon
    from tokencore.tokens import Token

    Ahead = Callable[[tuple[str, ...], Market], Horizon | None]

FRESH = 60.0  # seconds for which the settings are taken as they were read
SETTLED = 600.0  # the same for sessions: three weeks of them are looked at, of which ten minutes change nothing


class Vitals(NamedTuple):
    """One market at one moment; times are aware UTC, or None where there is none.

    Attributes:
        market, environment: its name, and `real` or `paper`.
        key: the fingerprint of its key; empty where it could not be read.
        status: one of the words of `tokencore check`.
        expires_at, issued_at: of its token.
        need: the present or next time in which it needs a token; None without exchanges.
        covered: whether the token serves until the end of that need; None without exchanges.
        renewal_at: when the key's next renewal will be tried; None if none is planned, or only a person can renew.
        cooldown_until: until when no request for a token is allowed.
        issues, ceiling: of the key in the last 24 hours, and how many are allowed.
        attempts: of the key, by what became of them; None where the record cannot be read.
        trouble: why nothing of this is known; empty where it is.

    """

    market: str
    environment: str
    key: str = ""
    status: str = "UNREADABLE"
    expires_at: datetime | None = None
    issued_at: datetime | None = None
    need: tuple[datetime, datetime] | None = None
    covered: bool | None = None
    renewal_at: datetime | None = None
    cooldown_until: datetime | None = None
    issues: int = 0
    ceiling: int = 0
    attempts: Counter[Outcome] | None = None
    trouble: str = ""

    @property
    def valid(self) -> bool:
        """Whether the token serves now."""
        return self.status in status.VALID

    @property
    def unready(self) -> str:
        """Why the market does not cover its present or next need (a valid token, without exchanges); empty if so."""
        if self.trouble:
            return self.trouble
        if self.covered or (self.covered is None and self.valid):
            return ""
        needed = f"it is needed from {tell(self.need[0])} to {tell(self.need[1])}" if self.need else "it is needed now"
        hope = f"next renewal at {tell(self.renewal_at)}" if self.renewal_at else "no renewal is planned"
        return f"{self._lack}; {needed}; {hope}"

    @property
    def _lack(self) -> str:
        if self.expires_at is None:
            return "there is no token" if self.status == "NO_TOKEN" else "the token file cannot be used"
        if self.status == "REJECTED":
            return "KIS has rejected the token"
        return f"the token {'expires' if self.valid else 'expired'} at {tell(self.expires_at)}"


class Watch:
    """Looks at all configured markets; settings that break while it watches leave it with the last good ones.

    Attributes:
        settings_good: whether the settings could be used when they were last looked at.

    """

    def __init__(self) -> None:
        """Read the settings.

        Raises:
            ConfigurationError: they are malformed, or no market has credentials.

        """
        self._values: dict[str, Any] | None = None
        self._forget_sessions()
        self._read_settings()

    def look(self, now: datetime) -> list[Vitals]:
        """How every market is at `now` (aware), in the settings' order; one that cannot be read has a `trouble`."""
        if time.monotonic() - self._read_at > FRESH:
            try:
                self._read_settings()
            except ConfigurationError:
                self.settings_good = False
        found = {one.market: one for key in self._keys for one in key.look(self._ahead(now), now)}
        return [found[name] for name in self._names]

    def _read_settings(self) -> None:
        self._read_at = time.monotonic()
        if self._read_at - self._asked_at > SETTLED:
            self._forget_sessions()
        values = sources.gather().values
        if values != self._values:
            Settings.load()
            markets = [Market(name, values) for name in market_names(values)]
            able = [one for one in markets if one.app_key]
            if not able:
                markets[0].credentials()  # raises the sentence that says what to set
            self._overrides = overrides()
            self._names = [one.name for one in able]
            self._keys = _keys(able)
            self._values = values
            self._forget_sessions()
        self.settings_good = True

    def _forget_sessions(self) -> None:
        self._asked_at = time.monotonic()
        self._horizons: dict[tuple[tuple[str, ...], float], Horizon] = {}

    def _ahead(self, now: datetime) -> Ahead:
        """What the exchanges need, asked once for each set of them."""

        def asked(codes: tuple[str, ...], of: Market) -> Horizon | None:
            known = codes, of.buffer
            if codes and known not in self._horizons:
                self._horizons[known] = rule.horizon(codes, self._overrides, of, now)
            return self._horizons[known] if codes else None

        return asked


class _Key:
    """The markets of one key, and what they share."""

    def __init__(self, markets: list[Market]) -> None:
        first = markets[0]
        self._markets = markets
        self._cache = Cache(
            first.token_dir, first.base_url, first.environment, str(first.app_key), [f"{one.name}_" for one in markets]
        )
        self._credentials = digest(str(first.app_key), first.app_secret, length=8) if first.app_secret else ""
        self._lock = KeyLock(first.token_dir, self._cache.fingerprint)
        self._ledger = Ledger(IssuanceRecord(first.token_dir, self._cache.fingerprint))
        self._codes = tuple(dict.fromkeys(code for one in markets for code in one.exchanges))

    def look(self, ahead: Ahead, now: datetime) -> list[Vitals]:
        try:
            return self._look(ahead, now)
        except Exception as error:  # noqa: BLE001 - one key's trouble must not hide the others; its text may hold anything
            told = f"it cannot be read ({type(error).__name__})"
            return [Vitals(one.name, one.environment, trouble=told) for one in self._markets]

    def _look(self, ahead: Ahead, now: datetime) -> list[Vitals]:
        first = self._markets[0]
        attempts = with_marks(self._ledger.read(now), self._cache, self._lock)
        found = [self._cache.read(path) for path in self._cache.paths]
        newest = longest(token for token, _ in found)
        issued_at = newest.issued_at if newest else rule.last_issue(attempts)
        planned = rule.outlook(newest, issued_at, ahead(self._codes, first), first, now).next
        last = record.latest(attempts)
        # A secret in the keyring is not fetched to be watched: it is taken for the one that was used last.
        standing = Standing(now, attempts, newest, self._credentials or (last.credentials if last else ""))
        shared = Vitals(
            market="",
            environment=first.environment,
            key=self._cache.fingerprint,
            renewal_at=planned and rule.attempt_at(planned, limits.allowed_from(standing, first), first, now),
            cooldown_until=limits.cooldown_until(attempts, now, first.issue_interval),
            issues=len(record.issued_within(attempts, now)),
            ceiling=first.max_issues_per_day,
            attempts=self._ledger.totals,
        )
        return [
            _of_market(one, *seen, ahead(one.exchanges, one), shared, now)
            for one, seen in zip(self._markets, found, strict=True)
        ]


def _of_market(
    one: Market, token: Token | None, problem: str, ahead: Horizon | None, shared: Vitals, now: datetime
) -> Vitals:
    """The vitals of one market; `shared` has those of its key."""
    coming = (need for need in ahead.needs if need[1] > now) if ahead else iter(())
    need = next(coming, None)
    return shared._replace(
        market=one.name,
        status=status.word(token, problem, one, now),
        expires_at=token.expires_at if token else None,
        issued_at=token.issued_at if token else None,
        need=need,
        covered=status.covers(token, need, one) if need else None,
    )


def _keys(markets: list[Market]) -> list[_Key]:
    """The markets by the key that they share."""
    groups: dict[tuple[str, str], list[Market]] = {}
    for one in markets:
        groups.setdefault((fingerprint(str(one.app_key), one.base_url), one.environment), []).append(one)
    return [_Key(group) for group in groups.values()]
