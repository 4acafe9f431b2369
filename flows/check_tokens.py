"""Every hour: every key follows the renewal rule, and everybody can see how the tokens are.

Requires: credentials of one market at least (KIS_APP_KEY, KIS_APP_SECRET); for alerts SLACK_WEBHOOK_URL, or
SLACK_BOT_TOKEN and SLACK_CHANNEL.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, NamedTuple

from prefect import State, flow, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, Failed

from flows import alerts, board, planned, runs
from flows.causes import as_met
from flows.runs import SAFE, clock, kis_is_down, safe_errors
from tokencore import TokenManager, managers, next_attempt, tick

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tokencore import Decision

EVERYONE = "all markets"
HOUR = timedelta(hours=1)
PATIENCE = timedelta(minutes=45)  # with KIS being down; then the next hourly run goes on


class Progress(NamedTuple):
    """What became of a key: for people, whether it has a token, and whether that is new."""

    told: str
    valid: bool
    renewed: bool


def run_name() -> str:
    """`check-tokens 2026-11-23 07:05 UTC`, when it was due; a planned renewal keeps the name that announced it."""
    return planned.kept_name() or runs.check_name(runs.due())


@runs.described
@flow(flow_run_name=run_name, persist_result=False, log_prints=False)
def check_tokens() -> State:
    """Follow the renewal rule for every key, and publish how the tokens are.

    See the artifacts [tokens](/artifacts/key/tokens), a row per market, and [plan](/artifacts/key/plan), the days
    ahead: of each, open the newest entry.

    A key is renewed when the rule says so: once a day, in the time that is quiet on all its exchanges.
    One key's trouble does not stop the others. The next renewal of each key stands as a scheduled run of
    this deployment at its moment. While KIS is down and the coming need is not covered, the
    run goes on trying for most of its hour, never inside the cool-down.

    Ends as **Renewed**, **AlreadyValid**, **Completed** (no token, and none needed yet), **SkippedLate** (a
    later check is due and does it) or **Failed**: a renewal that was due did not come about, and the coming need
    is not covered.

    **Triage:** the state's message says what happened and what still works; Slack was told when it began to
    press. *KIS refused ... one a minute*: another program issues with this key. *app key*, *app secret*: correct
    the settings, then run `refresh_token`. *KIS cannot be reached*, *a fault of its own*: nothing but patience.
    """
    now = datetime.now(UTC)
    try:
        with safe_errors():
            if overtaken(runs.due(), now):
                return Completed(name="SkippedLate", message="An hour late: a later check is due and does it all.")
            results = runs.each_key(advance, managers(one_per_key=True), PATIENCE)
    except SAFE as error:
        alerts.report(EVERYONE, error, now)
        return Failed(message=str(error))
    alerts.all_clear(EVERYONE, now)
    board.update(datetime.now(UTC))
    planned.update(datetime.now(UTC))
    planned.name_ahead()
    return ended(results)


@task(task_run_name="key of {market}", persist_result=False, cache_policy=NO_CACHE, retry_condition_fn=kis_is_down)
def advance(market: str, again_in: float | None) -> Progress:
    """One decision of the renewal rule for the market's key.

    Args:
        market: One of the key's markets.
        again_in: After how many seconds Prefect tries again while KIS is down; None if it does not.

    """
    with safe_errors():
        return follow(TokenManager(market), datetime.now(UTC), again_in)


def follow(manager: TokenManager, now: datetime, again_in: float | None = None) -> Progress:
    """Renew the manager's key if the rule says so at `now` (aware), and tell of trouble once it presses.

    Raises:
        TokenError: a renewal that was due did not come about, and the coming need is not covered.
            The present token is untouched.

    """
    try:
        with safe_errors():
            decision = tick(manager, now)
            manager.copy_token()
    except SAFE as error:
        alerts.report(manager, error, now, again_in)
        raise
    covered = is_covered(manager, decision, now)
    if decision.trouble:
        alerts.report(manager, decision.trouble, now, again_in)
        if not covered:
            raise as_met(decision.trouble, manager.history()) from None
    elif covered:
        alerts.all_clear(manager, now)
    else:
        alerts.foreign(manager, now)
    return progress(manager, decision, now)


def is_covered(manager: TokenManager, decision: Decision, now: datetime) -> bool:
    """Whether the token serves the present or coming need; without any exchange, whether it serves now."""
    ahead = decision.outlook
    if ahead.needs:
        return ahead.unserved != ahead.needs[0]
    return alerts.Subject.of(manager, now).reach is not None


def progress(manager: TokenManager, decision: Decision, now: datetime) -> Progress:
    """What the decision did, in words."""
    who, planned = alerts.Subject.of(manager, now), decision.outlook.next
    told = [who.served]
    if decision.trouble:
        told.append(str(decision.trouble))
    tried = next_attempt(manager, now)
    if planned:
        told.append(f"next renewal {clock(tried)}, {planned.reason}" if tried else board.REFUSED)
    else:
        told.append("no renewal is needed")
    return Progress("; ".join(told), who.reach is not None, decision.renewed)


def ended(results: Mapping[str, Progress | Exception]) -> State:
    """The state of a run with these results by key."""
    if failures := runs.failures(results):
        return Failed(message=failures)
    done = [result for result in results.values() if isinstance(result, Progress)]
    told = ". ".join(one.told for one in done) + "."
    if any(one.renewed for one in done):
        return Completed(name="Renewed", message=told)
    if all(one.valid for one in done):
        return Completed(name="AlreadyValid", message=told)
    return Completed(message=told)


def overtaken(due: datetime, now: datetime) -> bool:
    """Whether the next hourly check is due as well: after a down-time the last one does it for all."""
    return now - due >= HOUR
