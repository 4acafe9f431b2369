"""Renew a token when a person asks for it with the form in the UI.

Requires: credentials of the market (KIS_APP_KEY, KIS_APP_SECRET, or its own); for alerts SLACK_WEBHOOK_URL, or
SLACK_BOT_TOKEN and SLACK_CHANNEL.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple
from uuid import uuid4

from prefect import State, flow
from prefect.flow_runs import apause_flow_run
from prefect.input import RunInput
from prefect.runtime import flow_run
from prefect.states import Completed, Failed
from pydantic import BeforeValidator, Field

from flows import alerts, artifacts, runs
from flows.runs import SAFE, safe_errors
from tokencore import ConfigurationError, IssuanceLimitError, Key, Settings, TokenError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flows.alerts.messages import Notice
    from tokencore import KeyState
    from tokencore.outlook import RefreshWarning

CONFIRM_WITHIN = timedelta(minutes=15)
MINUTE = timedelta(minutes=1)
MARGIN = MINUTE  # then Prefect itself fails a pause that nobody ended because its run was killed
POLL = 2  # seconds between two checks for an answer
HOUR = timedelta(hours=1)  # after an issue, in which a forced refresh needs an answer too: a scheduler may run amok
RENEW = "renew now"


def configured() -> tuple[str, ...]:
    """Return the markets for the form's drop-down: those with credentials or, if none has any, all of the settings."""
    try:
        settings = Settings.load()
    except TokenError:
        return "us", "kr"
    able = [market.name for market in settings.all_markets() if market.app_key]
    return tuple(able or [market.name for market in settings.all_markets()])  # to make deployments without any


if TYPE_CHECKING:
    Market = str
else:
    # With a single market, pydantic's schema has only `const`, for which the form shows no drop-down.
    Market = Annotated[
        Literal[configured()],
        Field(json_schema_extra={"enum": list(configured())}),
        BeforeValidator(lambda given: str(given).lower()),
    ]
# The form and the flow check these, not pydantic, whose error would repeat what was typed in the run's state.
Operator = Annotated[str, Field(json_schema_extra={"maxLength": 40, "pattern": Key.SHORT_WORDS})]
Reason = Annotated[str, Field(json_schema_extra={"maxLength": 80, "pattern": Key.SHORT_WORDS})]


class Confirmation(RunInput):
    """What a person answers to a paused run."""

    decision: Literal["leave the token as it is", "renew now"] = Field("leave the token as it is")


def run_name() -> str:
    """Name a run `refresh us`, or `refresh us (forced)`."""
    given = flow_run.parameters
    return f"refresh {given['market']}" + (" (forced)" if given.get("force") else "")


@runs.described
@flow(flow_run_name=run_name, persist_result=False, log_prints=False)
def refresh_token(market: Market, force: bool = False, reason: Reason = "", operator: Operator = "") -> State:  # noqa: FBT001, FBT002 - the form's switch
    """Renew a market's token now. Every new token costs an issuance and a KakaoTalk message to the account's owner.

    Markets that share an app key share the token: all of them get the new one. Programs that use the present
    token keep it until they look again, within a second.

    **Before KIS is asked for anything**, the run checks what would happen. If it would be a second token in 24 hours,
    change the token inside a session, or bring the same token back (within six hours of its issue), the run goes to
    **Paused** and waits 15 minutes for a person: **Resume** is in the menu (three dots) at the top right of the run's
    page. If there is no valid token to lose, nobody is asked. With `force`, nobody is asked unless KIS has issued
    within the last hour.

    Ends as **Renewed**, **AlreadyValid** (KIS returned the same token, or another run was quicker), **Declined**
    (nobody confirmed, the answer was no, a limit forbids it, or a text in the form looks like a key; the message says
    which, and the present token serves) or **Failed** with the reason. Nothing is tried twice: the present token stays
    as it is, and the next hourly check goes on.

    **Triage:** *Declined* needs nothing. *Failed* with *app key* or *app secret*: correct the settings, `make down`
    and `make up`, run it again. *KIS cannot be reached*, *a fault of its own*: run it again after a minute.

    Args:
        market: The market whose token to renew. KIS is asked for a new one at once; markets with the same app key get
            it too. But if it would be a second one in 24 hours, change inside a session or come back the same, the run
            waits for your answer first: press Resume on its page, within 15 minutes.
        force: Renew without a confirmation, even while KIS would return the same token or when the 24-hour limit
            is reached. Within an hour of an issue, the run waits for your answer anyway; KIS's limit of one request a
            minute always applies.
        reason: Why, at most 80 characters, for the issuance record and Slack. It is stored in clear: no key, no token.
        operator: Your name, for the issuance record and Slack: Prefect knows no users. At most 40 characters.
    """
    asked = Request(market.lower(), force, reason, operator)
    return alerts.guarded(f"refresh_token {asked.market}", lambda settings, now: refresh(settings, asked, now))


class Request(NamedTuple):
    """What a person asked for in the form."""

    market: str
    force: bool
    reason: str
    operator: str


def refresh(settings: Settings, asked: Request, now: datetime) -> State:
    """Renew the market's key, publish the status of the tokens, and return the run's final state.

    Raises:
        ConfigurationError: the market is not configured, or has no credentials.
    """
    try:
        reason, operator = Key.note(asked.reason, asked.operator)
    except ConfigurationError as error:
        return Completed(name="Declined", message=str(error))
    settings.market(asked.market).identified()
    keys = Key.load(settings)
    key = next(key for key in keys if asked.market in [one.name for one in key.markets])
    alerts.resolved(settings, f"refresh_token {asked.market}", now)
    end, trouble = renew(key, asked._replace(reason=reason, operator=operator), now)
    artifacts.update(keys, {key: trouble} if trouble else {})
    return end


def renew(key: Key, asked: Request, now: datetime) -> tuple[State, Exception | None]:
    """Renew once, with a person's consent if it is needed; return the run's final state, and the error if it failed."""
    state, ahead = key.state(now), []
    if not asked.force or any(one.outcome == "issued" and now - one.at < HOUR for one in state.attempts):
        ahead = state.warnings()
    if ahead and (end := unconfirmed(state, ahead)):
        return end, None
    try:
        with safe_errors():
            forced = asked.force or bool(ahead)
            renewed = key.refresh(force=forced, reason=asked.reason or "refresh_token", by=asked.operator)
    except SAFE as error:
        return unrenewed(state, error, asked), error
    state = key.state(datetime.now(UTC))
    kind: Notice = ("forced" if asked.force else "renewed") if renewed else "same"
    alerts.announce(state, kind, by=asked.operator, why=asked.reason)
    if renewed:
        return Completed(name="Renewed", message=f"{state.served}."), None
    return Completed(name="AlreadyValid", message=f"KIS returned the same token. {state.served}."), None


def unconfirmed(before: KeyState, ahead: Sequence[RefreshWarning]) -> State | None:
    """Ask a person to confirm the consequences `ahead`; return the final state unless exactly these are confirmed."""
    consequences = [f"- {before.served}.", *(f"- {one.message}" for one in ahead)]
    decision = ask(f"**Renew the token of {before.key.label} anyway?**\n\n" + "\n".join(consequences))
    after = before.key.state(datetime.now(UTC))
    if decision != RENEW:
        why = "Confirmed: no." if decision else f"Nobody confirmed within {CONFIRM_WITHIN // MINUTE} minutes."
        return Completed(name="Declined", message=f"{why} Nothing was asked of KIS. {after.served}.")
    if after.token and (before.token is None or after.token.expires_at > before.token.expires_at):
        return Completed(name="AlreadyValid", message=f"Another run was quicker. {after.served}.")
    kinds = {one.kind for one in ahead}
    if more := [one.message for one in after.warnings() if one.kind not in kinds]:
        message = f"While it waited, this came up: {' '.join(more)} Nothing was asked of KIS; run it again."
        return Completed(name="Declined", message=message)
    return None


def ask(question: str) -> str | None:
    """Pause the run with the question, which is Markdown, and return a person's answer; None if nobody answers."""
    runs.logger().warning("%s", question.replace("*", ""))
    runs.logger().warning(
        "Press Resume in the menu at the top right of this page within %s minutes.", CONFIRM_WITHIN // MINUTE
    )

    async def answer() -> str:
        # Prefect's own time-out would end the run as Failed, before or after it raises here.
        async with asyncio.timeout(CONFIRM_WITHIN.total_seconds()):
            form = Confirmation.with_initial_data(description=question)
            timeout = round((CONFIRM_WITHIN + MARGIN).total_seconds())
            # After a Retry, Prefect counts a run's pauses from one again, and would refuse a number it already knows.
            given = await apause_flow_run(form, timeout=timeout, poll_interval=POLL, key=uuid4().hex)
        return given.decision

    try:
        return asyncio.run(answer())
    except TimeoutError:
        return None


def unrenewed(before: KeyState, error: Exception, asked: Request) -> State:
    """Return Declined if a limit forbids the renewal and the present token serves, else Failed.

    A limit that endangers no session is only reported to the person who asked: the plan renews in time. If KIS was not
    even asked because of a limit, the state says it all, and nothing is reported.
    """
    state = before.key.state(datetime.now(UTC))
    limited = isinstance(error, IssuanceLimitError)
    was_asked = state.attempts[-1:] != before.attempts[-1:]
    if not limited or was_asked:
        alerts.announce(state, "failed", by=asked.operator, why=asked.reason, error=error)
    declined = limited and state.serves_until is not None
    return Completed(name="Declined", message=str(error)) if declined else Failed(message=str(error))
