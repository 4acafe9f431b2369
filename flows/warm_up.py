"""Before an exchange opens: get a token that lasts to the end of the session's need, or alert people in good time.

Requires: credentials of a market that trades the exchange (KIS_APP_KEY, KIS_APP_SECRET); for alerts
SLACK_WEBHOOK_URL, or SLACK_BOT_TOKEN and SLACK_CHANNEL.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Literal

from prefect import State, flow, task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run
from prefect.states import Completed, Failed
from pydantic import BeforeValidator

from flows import alerts, artifacts, runs
from flows.runs import SAFE, Done, clock, kis_is_down, local_date, safe_errors
from tokencore import ConfigurationError, Key, Settings, sessions

if TYPE_CHECKING:
    from collections.abc import Mapping

    Exchange = str
else:
    Exchange = Literal[tuple(sessions.EXCHANGES)]


def order_code(given: object) -> object:
    """Return the order code of a known alias such as NASDAQ, NAS or XNAS; anything else unchanged, to be refused."""
    try:
        return sessions.exchange(str(given)).code
    except ConfigurationError:
        return given


def run_name() -> str:
    """Name a run `warm-up NASD 2026-11-23`, by the date in the exchange's zone."""
    exchange = flow_run.parameters["exchange"]
    return f"warm-up {exchange} {runs.local_date(exchange, flow_run.scheduled_start_time)}"


@runs.described
@flow(flow_run_name=run_name, persist_result=False, log_prints=False)
def warm_up(exchange: Annotated[Exchange, BeforeValidator(order_code)]) -> State:
    """Make sure that an exchange's session has a token: valid now and until the session's need ends.

    If the present token lasts, one quote call proves that KIS accepts it (`KIS_PROVE_TOKENS`). If it does not last,
    or KIS rejects it, it is renewed under the key's lock: runs that start in the same minute for the same key make
    only one request. While KIS is down, the run keeps trying until the open, never inside the cool-down.

    Ends as **Warm**, **Renewed**, **MarketClosed** (no session that day), **SkippedLate** (a stale run: the
    session is over, or it is open and the token valid) or **Failed** with the reason.

    **Triage:** the state's message says what happened and what still works. *KIS refused ... one a minute*:
    another program issues with this key. *app key*, *app secret*: correct the settings, then run
    `refresh_token`. *KIS cannot be reached*, *a fault of its own*: wait; `check_tokens` goes on after the open.
    *KIS returns the same token*: the token is dead, and the message says when a new one is possible.
    *No market of your settings trades ...*: pause this deployment.

    Args:
        exchange: The exchange by KIS's order code: NASD is Nasdaq, SEHK Hong Kong, SHAA and SZAA Shanghai and
            Shenzhen, TKSE Tokyo, VNSE and HASE Ho Chi Minh City and Hanoi.
    """
    return alerts.guarded(exchange, lambda settings, now: visit(settings, exchange, flow_run.scheduled_start_time, now))


def visit(settings: Settings, exchange: str, due: datetime, now: datetime) -> State:
    """Do what the run of `exchange` that was due at `due` has to do at `now`; return its final state. Times are aware.

    Raises:
        ConfigurationError: no market trades the exchange.
    """
    day, known = local_date(exchange, due), settings.overrides
    session, need = sessions.session(exchange, day, known), sessions.need(exchange, day, known)
    if session is None or need is None:
        return Completed(name="MarketClosed", message=f"{exchange} closed: {sessions.closure(exchange, day, known)}")
    if session.close <= now:
        return Completed(name="SkippedLate", message=f"{exchange}'s session of {day} is over.")
    keys, until = Key.trading(settings, exchange), need[1]
    alerts.resolved(settings, exchange, now)  # ends an incident of a run that reached no key
    if due < session.open <= now and all(key.state(now).lasts(until) for key in keys):
        return Completed(name="SkippedLate", message=f"{exchange} is open and the token valid; this run came too late.")
    results = runs.each_key(ensure, keys, session.open - now, until)
    artifacts.update(Key.load(settings), results)  # a token may be another process's: news for the table and the plan
    return ended(exchange, until, results)


@task(persist_result=False, cache_policy=NO_CACHE, retry_condition_fn=kis_is_down)
def ensure(key: Key, until: datetime, again_in: float | None = None) -> Done:
    """Make sure that the key has a token that lasts until `until`; report trouble at once, not after the last retry.

    `again_in` is the number of seconds after which Prefect retries while KIS is down; None if it does not.

    Raises:
        TokenError: there is no token that lasts; a present one is untouched.
    """
    now = datetime.now(UTC)
    try:
        with safe_errors():
            done = Done(key.state(now))
            if done.state.lasts(until):
                done = runs.proven(done.state)
            if not done.state.lasts(until):
                issued = key.obtain(until, now)
                done = Done(key.state(datetime.now(UTC)), issued)
    except SAFE as error:
        met = alerts.report(key.market.settings, key, error, now, again_in)
        raise artifacts.met(key, met, again_in) from None
    if done.trouble:
        alerts.report(key.market.settings, done.state, done.trouble, done.state.now)
    else:
        alerts.resolved(key.market.settings, done.state, done.state.now)
    return done


def ended(exchange: str, until: datetime, results: Mapping[Key, Done | Exception]) -> State:
    """Return the final state of a run with these results by key; `exchange` needs a token until `until`."""
    if failures := runs.failures(results):
        return Failed(message=failures)
    done = [result for result in results.values() if isinstance(result, Done)]
    said = "; ".join(one.said for one in done)
    name = "Renewed" if any(one.renewed for one in done) else "Warm"
    return Completed(name=name, message=f"{said}. {exchange} needs it until {clock(until)}.")
