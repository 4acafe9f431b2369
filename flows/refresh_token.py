"""A person renews a token, from the form in the UI.

Requires: credentials of the market (KIS_APP_KEY, KIS_APP_SECRET, or its own); for alerts SLACK_WEBHOOK_URL, or
SLACK_BOT_TOKEN and SLACK_CHANNEL.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Literal

from prefect import State, flow
from prefect.states import Completed, Failed
from pydantic import Field

from flows import alerts, causes, planned, runs
from flows.messages import still_works
from flows.runs import SAFE, safe_errors
from tokencore import IssuanceLimitError, Settings, TokenError, TokenManager, managers


def configured() -> tuple[str, ...]:
    """The markets of the form's drop-down: those with credentials; without any, those that the settings name."""
    try:
        return tuple(manager.market.name for manager in managers())
    except TokenError:
        pass  # where deployments are made there may be no credentials
    try:
        return tuple({"us": None, "kr": None} | Settings.load().markets)
    except TokenError:
        return "us", "kr"


if TYPE_CHECKING:
    Market = str
else:
    # With one market pydantic says `const` alone, for which the form has no drop-down.
    Market = Annotated[Literal[configured()], Field(json_schema_extra={"enum": list(configured())})]
Reason = Annotated[str, Field(max_length=80)]  # as much as the issuance record keeps


def run_name() -> str:
    """`refresh us`, or `refresh us (forced)`."""
    given = runs.parameters()
    return f"refresh {given['market']}" + (" (forced)" if given.get("force") else "")


@flow(flow_run_name=run_name, persist_result=False, log_prints=False)
def refresh_token(market: Market, force: bool = False, reason: Reason = "") -> State:  # noqa: FBT001, FBT002 - the form's switch
    """Renew a market's token now. Every new token costs an issuance and a KakaoTalk message to the account's owner.

    Markets that share an app key share the token: all of them get the new one. Programs that use the present
    token go on with it until they look again, within a second.

    Ends as **Renewed**, **AlreadyValid** (KIS handed the same token back, as it does for six hours),
    **Declined** (a limit forbids it, and the present token serves; the message says until when) or **Failed** with
    the reason. Nothing is tried twice: the present token stays as it is, and the next hourly check goes on.

    **Triage:** *Declined* needs nothing. *Failed* with *app key* or *app secret*: correct the settings, `make down`
    and `make up`, run it again. *KIS cannot be reached*, *a fault of its own*: run it again after a minute.

    Args:
        market: Whose token. Markets with the same app key are renewed together.
        force: Renew even while KIS would hand back the same token, or when the day's ceiling is reached. KIS's
            limit of one request a minute holds all the same.
        reason: Why and for whom, at most 80 characters, for the issuance record. It is stored in clear.

    """
    now, form = datetime.now(UTC), f"market {market}"  # trouble before there is a key to have it
    try:
        with safe_errors():
            manager = TokenManager(market)
            alerts.all_clear(form, now)
            return renew(manager, now, force=force, reason=reason)
    except SAFE as error:
        alerts.report(form, error, now)
        return Failed(message=str(error))


def renew(manager: TokenManager, now: datetime, *, force: bool, reason: str) -> State:
    """Renew once and say what became of it."""
    try:
        with safe_errors():
            renewed = manager.refresh(force=force, reason=reason or "refresh_token")
    except SAFE as error:
        return unrenewed(manager, error, now)
    alerts.all_clear(manager, datetime.now(UTC))
    planned.update(datetime.now(UTC))
    who = alerts.Subject.of(manager, datetime.now(UTC))
    works = f"{who.label}: {still_works(who.reach)}."
    if renewed:
        return Completed(name="Renewed", message=works)
    return Completed(name="AlreadyValid", message=f"KIS handed the same token back. {works}")


def unrenewed(manager: TokenManager, error: Exception, now: datetime) -> State:
    """Declined where a limit forbids it and the present token serves, else Failed.

    Slack hears of what more people must know than who started it.
    """
    limited = isinstance(error, IssuanceLimitError)
    if not limited or causes.cause_of(error, manager.history()) in causes.REFUSED:
        alerts.report(manager, error, now)
    serves = alerts.Subject.of(manager, now).reach is not None
    return Completed(name="Declined", message=str(error)) if limited and serves else Failed(message=str(error))
