"""KIS: whether it can be reached, whether the clocks agree, and what it answers to quote calls with the token."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

from tokencore import quotes, sessions
from tokencore.doctor.finding import NO_TOKEN, UNREACHABLE, State, fail, ok, skipped, warn
from tokencore.doctor.reach import PATIENCE, Reached, UnreachedError, ask
from tokencore.issuer import Issuer
from tokencore.status import CLOCK_SLACK

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tokencore.doctor.finding import Finding
    from tokencore.exchanges import Exchange
    from tokencore.manager import TokenManager
    from tokencore.quotes import Evidence, Quote

NOTICEABLE = 5.0  # seconds: the Date header knows whole ones, and the answer takes its time
TOO_OFTEN = "EGW00201"  # calls a second: says nothing about the token
BREATH = 1.1  # seconds after which the next call is welcome again


def check(url: str, managers: list[TokenManager]) -> list[Finding]:
    """The gateway at `url`, and one key of each of `managers` there."""
    began = time.monotonic()
    try:
        # Neither key nor tr_id: it counts as no call, and any answer at all proves name, connection and certificate.
        answer = ask("GET", f"{url}/")
    except UnreachedError as error:
        reason = fail("kis", f"{url}: {error}", error.cure, UNREACHABLE)
        names = ["clock", *(f"token accepted {_named(manager)}" for manager in managers)]
        return [reason, *(skipped(name, "KIS cannot be reached") for name in names)]
    took = time.monotonic() - began
    reached = ok("kis", f"{url} answers in {took * 1e3:.0f} ms (HTTP {answer.status} to GET /, which issues nothing)")
    return [reached, _clock(answer, took), *(one for manager in managers for one in _accepted(manager))]


def _clock(answer: Reached, took: float) -> Finding:
    try:
        theirs = parsedate_to_datetime(answer.headers["Date"])
        ahead = (datetime.now(UTC) - theirs).total_seconds() - took / 2 - 0.5
    except (KeyError, ValueError, TypeError):
        return skipped("clock", "KIS's answer has no Date header to compare with")
    told = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} KIS's"
    cure = "let the system keep it by NTP (timedatectl set-ntp true)"
    if abs(ahead) > CLOCK_SLACK.total_seconds():
        return fail("clock", f"{told}: renewals come at wrong moments", cure)
    if abs(ahead) > NOTICEABLE:
        return warn("clock", told, cure)
    return ok("clock", "agrees with KIS's to within seconds")


def _accepted(manager: TokenManager) -> Iterator[Finding]:
    """Quote calls with the key's token, one after the other, until one shows that KIS rejects it."""
    name, token = f"token accepted {_named(manager)}", manager.newest_token()
    if token is None or not token.serves(datetime.now(UTC), manager.market.buffer):
        yield skipped(name, "there is no valid token to try")
        return
    issuer = Issuer.checked(
        manager.get_api_url(), manager.get_app_credentials(), timeout=min(manager.market.timeout, PATIENCE)
    )
    for what, asked, meaning in _calls([sessions.exchange(code) for code in manager.key_exchanges()]):
        found = _shown(name, what, asked, issuer, token.access_token)
        yield found._replace(detail=found.detail + meaning) if found.detail.endswith("rows=0") else found
        if found.state is State.FAIL:
            return


def _calls(places: list[Exchange]) -> Iterator[tuple[str, Quote, str]]:
    """What to ask for a key that trades on these exchanges, and what it means if no rows come."""
    abroad = next((place for place in places if place.quote_code), None)
    if abroad is None or any(place.quote_code is None for place in places):
        yield "domestic price", quotes.domestic(), ""
    if abroad and abroad.quote_code:
        symbol = quotes.SYMBOLS[abroad.quote_code]
        yield "overseas price", quotes.overseas(abroad.quote_code), ""
        yield "overseas daily price", quotes.daily(abroad.quote_code, symbol), ""
        meaning = f" - as it must be: {abroad.code} is for orders; quotes want {abroad.quote_code}"
        yield "order code", quotes.daily(abroad.code, symbol), meaning


def _shown(name: str, what: str, asked: Quote, issuer: Issuer, access_token: str) -> Finding:
    told = issuer.quote(access_token, asked)
    if told.msg_cd == TOO_OFTEN:
        time.sleep(BREATH)
        told = issuer.quote(access_token, asked)
    line = f"{what}: {asked.tr_id} {asked.code} {asked.symbol} -> {_evidence(told)}"
    if told.accepted:
        return ok(name, line)
    if told.accepted is False:
        cure = "tokencore refresh, once the token is six hours old; until then KIS hands the same one out"
        return fail(name, f"{line}; KIS rejects the token", cure, NO_TOKEN)
    return warn(name, f"{line}; {told.told}: says nothing about the token", "try again later; look at KIS's notices")


def _evidence(told: Evidence) -> str:
    if told.status is None:
        return "no answer"
    return f"HTTP {told.status} rt_cd={told.rt_cd or '-'} msg_cd={told.msg_cd or '-'}, rows={told.rows}"


def _named(manager: TokenManager) -> str:
    return "+".join(manager.sharing())
