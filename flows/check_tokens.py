"""Every hour: follow the renewal rule for every key, and publish the status of the tokens.

Requires: credentials of at least one market (KIS_APP_KEY, KIS_APP_SECRET); for alerts SLACK_WEBHOOK_URL, or
SLACK_BOT_TOKEN and SLACK_CHANNEL.
"""

from __future__ import annotations

from datetime import UTC, datetime, time, timedelta
from typing import TYPE_CHECKING

from prefect import State, flow, task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from flows import alerts, artifacts, runs, upcoming
from flows.runs import KST, SAFE, Done, kis_is_down, safe_errors
from tokencore import Key

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tokencore import KeyState, Settings

HOUR, DAY = timedelta(hours=1), timedelta(days=1)
TRY_FOR = timedelta(minutes=45)  # how long a run retries while KIS is down; then the next hourly run takes over


def run_name() -> str:
    """Name a run by when it was due, `check-tokens 2026-11-23 07:05 UTC`; a planned renewal keeps its first name."""
    if upcoming.TAG in flow_run.tags:
        return str(flow_run.name)
    return f"check-tokens {flow_run.scheduled_start_time.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


@runs.described
@flow(flow_run_name=run_name, persist_result=False, log_prints=False)
def check_tokens() -> State:
    """Follow the renewal rule for every key, and publish how the tokens are.

    See the artifacts [tokens](/v2/artifacts/key/tokens), a row per market, and [plan](/v2/artifacts/key/plan), the
    days ahead; open the newest entry of each.

    A key is renewed when the rule says so: once a day, in the time that is quiet on all its exchanges. On a day
    with a session one quote call proves that KIS accepts the token (`KIS_PROVE_TOKENS`); one that KIS rejects is
    renewed as soon as KIS issues another. One key's trouble does not stop the others. The next renewal of each key
    is a scheduled run of this deployment. While KIS is down and the coming need is not covered, the run keeps trying
    for most of its hour, never inside the cool-down.

    Ends as **Renewed**, **AlreadyValid**, **Completed** (no token, and none needed yet), **SkippedLate** (a
    later check is due and does it) or **Failed**: a renewal that was due did not happen, or KIS rejects the token
    or refuses the key, and the coming need is not covered.

    **Triage:** the state's message says what happened and what still works. *KIS refused ... one a minute*: another
    program issues with this key. *app key*, *app secret*: correct the settings, then run `refresh_token`. *KIS
    cannot be reached*, *a fault of its own*: wait. *KIS returns the same token*: KIS has rejected it, and the message
    says when another is possible.
    """
    # A person who retries a run that failed earlier wants a check now.
    due = flow_run.scheduled_start_time if flow_run.run_count <= 1 else datetime.now(UTC)
    return alerts.guarded(alerts.ALL_KEYS, lambda settings, now: check(settings, due, now))


def check(settings: Settings, due: datetime, now: datetime) -> State:
    """Do what the run that was due at `due` has to do at `now`, and return its final state; times are aware.

    Raises:
        ConfigurationError: no market has credentials.
    """
    if now - due >= HOUR:  # after a downtime, the last check makes up for all
        return Completed(name="SkippedLate", message="Started an hour late; a later check is due and does everything.")
    keys = Key.load(settings)
    results = runs.each_key(advance, keys, TRY_FOR)
    alerts.resolved(settings, alerts.ALL_KEYS, now)
    artifacts.update(keys, results)
    return ended(results)


@task(persist_result=False, cache_policy=NO_CACHE, retry_condition_fn=kis_is_down)
def advance(key: Key, again_in: float | None = None, now: datetime | None = None) -> Done:
    """Make one decision of the renewal rule for the key, and report trouble once it matters.

    `again_in` is the number of seconds after which Prefect retries while KIS is down; None if it does not.

    Raises:
        TokenError: a renewal that was due did not happen, or KIS rejects the token, and the coming need is not
            covered. A present token is untouched.
    """
    settings, now = key.market.settings, now or datetime.now(UTC)
    try:
        with safe_errors():
            done = Done(key.state(now))
            if is_session_day(done.state):
                done = runs.proven(done.state)
            decision = key.tick(done.state)
            key.sync_exports()
    except SAFE as error:
        raise artifacts.met(key, alerts.report(settings, key, error, now, again_in), again_in) from None
    state = decision.state
    lasting = state.forbidden if is_dead(state) else state.refusal
    trouble = decision.trouble or (None if decision.renewed else done.trouble or lasting)
    if trouble:
        met = alerts.report(settings, state, trouble, now, again_in)
        if not state.covered:
            raise artifacts.met(key, met, again_in)
    elif state.covered:
        alerts.resolved(settings, state, now)
    return Done(state, decision.renewed, done.remark, trouble)


def is_session_day(state: KeyState) -> bool:
    """Whether a need runs or starts on this day in KST; every day counts for a key without exchanges."""
    day = state.now.astimezone(KST).date() + timedelta(days=1)
    needs = state.outlook.needs
    return not state.key.exchanges or bool(needs and needs[0][0] < datetime.combine(day, time(), KST))


def is_dead(state: KeyState) -> bool:
    """Whether KIS rejects the key's token, and the next need starts within a day, or nobody knows when it starts."""
    token, needs = state.token, state.outlook.needs
    return bool(token and token.rejected_at) and not (needs and needs[0][0] >= state.now + DAY)


def ended(results: Mapping[Key, Done | Exception]) -> State:
    """Return the final state of a run with these results by key."""
    if failures := runs.failures(results):
        return Failed(message=failures)
    done = [result for result in results.values() if isinstance(result, Done)]
    said = " ".join(f"{one.said}; {artifacts.next_renewal(one.state)}." for one in done)
    if any(one.renewed for one in done):
        return Completed(name="Renewed", message=said)
    if all(one.state.serves_until for one in done):
        return Completed(name="AlreadyValid", message=said)
    return Completed(message=said)
