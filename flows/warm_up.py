"""Before an exchange opens: a token that lasts to the end of the session's need, or an alarm in good time.

Requires: credentials of a market that trades the exchange (KIS_APP_KEY, KIS_APP_SECRET); for alerts
SLACK_WEBHOOK_URL, or SLACK_BOT_TOKEN and SLACK_CHANNEL.
"""

from __future__ import annotations

import os
from datetime import UTC, date, datetime
from typing import TYPE_CHECKING, Literal, NamedTuple

from prefect import State, flow, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, Failed

from flows import alerts, board, planned, runs
from flows.causes import as_met
from flows.runs import SAFE, clock, kis_is_down, local_date, safe_errors
from tokencore import CLOCK_SLACK, TokenManager, overrides, sessions, trading

if TYPE_CHECKING:
    from collections.abc import Mapping


Exchange = Literal["KRX", "NXT", "NASD", "NYSE", "AMEX", "SEHK", "SHAA", "SZAA", "TKSE", "VNSE", "HASE"]
ISSUED = "issued"  # the record's word for a new token


class Day(NamedTuple):
    """An exchange's day with a session: when it trades and until when a token must be valid; aware UTC."""

    exchange: str
    date: date
    session: sessions.Session
    until: datetime


class Kept(NamedTuple):
    """A key whose token lasts: its name for people, until when, and whether this run issued it."""

    label: str
    reach: datetime
    issued: bool


def run_name() -> str:
    """`warm-up NASD 2026-11-23`, the day in the exchange's zone."""
    return runs.warm_up_name(runs.parameters()["exchange"], runs.due())


@runs.described
@flow(flow_run_name=run_name, persist_result=False, log_prints=False)
def warm_up(exchange: Exchange) -> State:
    """Have a token for an exchange's session: valid now and until the session's need ends.

    Where the present token lasts, nothing is asked of KIS. Where it does not, it is renewed under the key's
    lock: runs that start in the same minute for one key make one request together. While KIS is down the
    run goes on trying until the open, never inside the cool-down.

    Ends as **Warm**, **Renewed**, **MarketClosed** (no session that day), **SkippedLate** (a stale run: the
    session is over, or it is open and the token valid) or **Failed** with the reason.

    **Triage:** the state's message says what happened and what still works. *KIS refused ... one a minute*:
    another program issues with this key. *app key*, *app secret*: correct the settings, then run
    `refresh_token`. *KIS cannot be reached*, *a fault of its own*: nothing but patience; `check_tokens` goes on
    after the open. *No market of your settings trades ...*: pause this deployment.

    Args:
        exchange: The exchange by KIS's order code: NASD is Nasdaq, SEHK Hong Kong, SHAA and SZAA Shanghai and
            Shenzhen, TKSE Tokyo, VNSE and HASE Ho Chi Minh City and Hanoi.

    """
    now = datetime.now(UTC)
    try:
        with safe_errors():
            return visit(exchange, runs.due(), now)
    except SAFE as error:
        alerts.report(exchange, error, now)
        return Failed(message=str(error))


def visit(exchange: str, due: datetime, now: datetime) -> State:
    """What the run of `exchange` that was due then has to do now, and how it ended; times aware.

    Raises:
        ConfigurationError: no market trades the exchange, or the settings are malformed.

    """
    day = trading_day(exchange, local_date(exchange, due))
    if day is None:
        why = sessions.closure(exchange, local_date(exchange, due), overrides())
        return Completed(name="MarketClosed", message=f"{exchange} closed: {why}")
    if day.session.close <= now:
        return Completed(name="SkippedLate", message=f"{exchange}'s session of {day.date} is over.")
    keys = trading(exchange)
    alerts.all_clear(exchange, now)  # of what kept a run from coming to its keys; they have incidents of their own
    if due < day.session.open <= now and all(lasts(manager, day.until) for manager in keys):
        return Completed(name="SkippedLate", message=f"{exchange} is open and the token valid; this run came too late.")
    results = runs.each_key(ensure, keys, day.session.open - now, day.until)
    if any(isinstance(one, Exception) or one.issued for one in results.values()):
        board.update(datetime.now(UTC))
    planned.update(datetime.now(UTC))
    return ended(day, results)


@task(task_run_name="token of {market}", persist_result=False, cache_policy=NO_CACHE, retry_condition_fn=kis_is_down)
def ensure(market: str, until: datetime, again_in: float | None) -> Kept:
    """Have a token of the market's key that lasts `until` then; trouble is told at once, not after the last try.

    Args:
        market: One of the key's markets.
        until: When the need ends, aware.
        again_in: After how many seconds Prefect tries again while KIS is down; None if it does not.

    """
    with safe_errors():
        return keep(TokenManager(market), until, again_in)


def keep(manager: TokenManager, until: datetime, again_in: float | None = None) -> Kept:
    """See `ensure`.

    Raises:
        TokenError: no token that lasts could be had; a present one is untouched.

    """
    started = datetime.now(UTC)
    try:
        with safe_errors():
            manager.get_valid_token(valid_until=until - CLOCK_SLACK)
            manager.require_saved()
    except SAFE as error:
        alerts.report(manager, error, datetime.now(UTC), again_in)
        raise as_met(error, manager.history()) from None
    now = datetime.now(UTC)
    alerts.all_clear(manager, now)
    who = alerts.Subject.of(manager, now)
    # Of all runs that waited for the same renewal, one sent the request.
    issued = any(a.pid == os.getpid() and a.at >= started and a.outcome == ISSUED for a in manager.history())
    return Kept(who.label, who.reach or now, issued)


def ended(day: Day, results: Mapping[str, Kept | Exception]) -> State:
    """The state of a run with these results by key."""
    if failures := runs.failures(results):
        return Failed(message=failures)
    kept = [result for result in results.values() if isinstance(result, Kept)]
    told = "; ".join(f"{one.label}: the token serves until {clock(one.reach)}" for one in kept)
    name = "Renewed" if any(one.issued for one in kept) else "Warm"
    return Completed(name=name, message=f"{told}. {day.exchange} needs it until {clock(day.until)}.")


def trading_day(exchange: str, day: date) -> Day | None:
    """The exchange's day; None without a session."""
    known = overrides()
    session, need = sessions.session(exchange, day, known), sessions.need(exchange, day, known)
    return Day(exchange, day, session, need[1]) if session and need else None


def lasts(manager: TokenManager, until: datetime) -> bool:
    """Whether the key's present token serves until then."""
    token = manager.newest_token()
    return token is not None and token.serves(until - CLOCK_SLACK, manager.market.buffer)
