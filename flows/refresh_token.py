"""A person renews a token, from the form in the UI.

Requires: credentials of the market (KIS_APP_KEY, KIS_APP_SECRET, or its own); for alerts SLACK_WEBHOOK_URL, or
SLACK_BOT_TOKEN and SLACK_CHANNEL.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Literal
from uuid import uuid4

from prefect import State, flow
from prefect.flow_runs import apause_flow_run
from prefect.input import RunInput
from prefect.states import Completed, Failed
from pydantic import Field

from flows import alerts, board, causes, planned, runs
from flows.runs import SAFE, safe_errors
from tokencore import (
    NOTE_FIELDS,
    ConfigurationError,
    IssuanceLimitError,
    Note,
    Settings,
    TokenError,
    TokenManager,
    foresee,
    managers,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tokencore import Consequence

PATIENCE = timedelta(minutes=15)  # for a person to confirm
MARGIN = timedelta(minutes=1)  # after which Prefect itself fails a pause that nobody ended: a killed run's
LOOK = 2  # seconds between two looks at whether somebody has answered


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
# The form checks these, and the flow does: a pydantic error would repeat in the run's state what was typed.
Operator = Annotated[str, Field(json_schema_extra={"minLength": 1, **NOTE_FIELDS["by"]})]
Reason = Annotated[str, Field(json_schema_extra=NOTE_FIELDS["reason"])]


class Confirmation(RunInput):
    """What a person answers to a paused run."""

    decision: Literal["leave the token as it is", "renew now"] = Field("leave the token as it is")


def run_name() -> str:
    """`refresh us`, or `refresh us (forced)`."""
    given = runs.parameters()
    return f"refresh {given['market']}" + (" (forced)" if given.get("force") else "")


@runs.described
@flow(flow_run_name=run_name, persist_result=False, log_prints=False)
def refresh_token(market: Market, operator: Operator, reason: Reason = "", force: bool = False) -> State:  # noqa: FBT001, FBT002 - the form's switch
    """Renew a market's token now. Every new token costs an issuance and a KakaoTalk message to the account's owner.

    Markets that share an app key share the token: all of them get the new one. Programs that use the present
    token go on with it until they look again, within a second.

    **Before anything is asked of KIS** the run looks at what would happen. If it would be a second token in 24 hours,
    change the token inside a session, or bring the same token back (within six hours of its issue), the run goes to
    **Paused** and waits 15 minutes for a person: press **Resume** at the top right of the run's page, read, choose and
    submit. `force` with a reason asks nobody.

    Ends as **Renewed**, **AlreadyValid** (KIS handed the same token back, or another run was quicker), **Declined**
    (nobody confirmed, the answer was no, a limit forbids it, or the form was incomplete; the message says which, and
    the present token serves) or **Failed** with the reason. Nothing is tried twice: the present token stays as it
    is, and the next hourly check goes on.

    **Triage:** *Declined* needs nothing. *Failed* with *app key* or *app secret*: correct the settings, `make down`
    and `make up`, run it again. *KIS cannot be reached*, *a fault of its own*: run it again after a minute.

    Args:
        market: Whose token. KIS is asked for a new one at once; markets with the same app key get it too. Only where it
            would be a second one in 24 hours, change inside a session or come back the same, the run waits for your
            answer first: press Resume on its page, within 15 minutes.
        operator: Your name, for the issuance record and Slack: Prefect knows no users. At most 40 characters.
        reason: Why, at most 80 characters, for the issuance record and Slack. It is stored in clear: no key, no token.
        force: Renew without a confirmation, also while KIS would hand back the same token or when the day's ceiling
            is reached; needs a reason. KIS's limit of one request a minute holds all the same.

    """
    now, form = datetime.now(UTC), f"market {market}"  # trouble before there is a key to have it
    note = Note(reason.strip(), operator.strip())
    try:
        with safe_errors():
            if why := objection(note, force=force):
                return Completed(name="Declined", message=why)
            manager = TokenManager(market)
            alerts.all_clear(form, now)
            end = renew(manager, now, force=force, note=note)
            board.update(datetime.now(UTC))
            planned.update(datetime.now(UTC))
            return end
    except SAFE as error:
        alerts.report(form, error, now)
        return Failed(message=str(error))


def objection(note: Note, *, force: bool) -> str:
    """What is missing in the form, or must not be in it; empty where it is as it should be."""
    if not note.by:
        return "Who asks? Give your name as operator, and run it again. Nothing was asked of KIS."
    if force and not note.reason:
        return "Force needs a reason, for the record. Nothing was asked of KIS; run it again with one."
    try:
        note.checked()
    except ConfigurationError as error:
        return str(error)
    return ""


def renew(manager: TokenManager, now: datetime, *, force: bool, note: Note) -> State:
    """Renew once, with a person's consent where that is needed, and say what became of it."""
    ahead = [] if force else foresee(manager, now)
    if ahead and (end := unconfirmed(manager, ahead)):
        return end
    try:
        with safe_errors():
            renewed = manager.refresh(force=force or bool(ahead), reason=note.reason or "refresh_token", by=note.by)
    except SAFE as error:
        return unrenewed(manager, error, note, now)
    alerts.all_clear(manager, datetime.now(UTC))
    told: alerts.Notice = ("forced" if force else "renewed") if renewed else "same"
    alerts.announce(manager, told, who=note.by, why=note.reason, now=datetime.now(UTC))
    if renewed:
        return Completed(name="Renewed", message=works_now(manager))
    return Completed(name="AlreadyValid", message=f"KIS handed the same token back. {works_now(manager)}")


def unconfirmed(manager: TokenManager, ahead: Sequence[Consequence]) -> State | None:
    """The end of a run that was to have these consequences, unless a person wants them, all of them and no others."""
    before = manager.newest_token()
    decision = ask(question(manager, ahead))
    if decision != "renew now":
        why = (
            f"Nobody confirmed within {PATIENCE // timedelta(minutes=1)} minutes."
            if decision is None
            else "Confirmed: no."
        )
        return Completed(name="Declined", message=f"{why} Nothing was asked of KIS. {works_now(manager)}")
    after = manager.newest_token()
    if after and (before is None or after.expires_at > before.expires_at):
        return Completed(name="AlreadyValid", message=f"Another run was quicker. {works_now(manager)}")
    kinds = {one.kind for one in ahead}
    if more := [one.told for one in foresee(manager, datetime.now(UTC)) if one.kind not in kinds]:
        return Completed(
            name="Declined",
            message=f"While it waited, this came up: {' '.join(more)} Nothing was asked of KIS; run it again.",
        )
    return None


def question(manager: TokenManager, ahead: Sequence[Consequence]) -> str:
    """What a person reads before the answer, as Markdown."""
    who = alerts.Subject.of(manager, datetime.now(UTC)).label
    return "\n".join([f"**Renew the token of {who} all the same?**", "", *(f"- {one.told}" for one in ahead)])


def ask(text: str) -> str | None:
    """A person's answer to the paused run, or None."""
    wait = PATIENCE // timedelta(minutes=1)
    runs.logger().warning("%s", text.replace("*", ""))
    runs.logger().warning("Press Resume at the top right of this page, choose and submit, within %s minutes.", wait)
    try:
        return asyncio.run(_answer(text))
    except TimeoutError:
        return None


async def _answer(text: str) -> str:
    # Prefect's own time-out would end the run as Failed, sooner or later than it raises here.
    async with asyncio.timeout(PATIENCE.total_seconds()):
        asked = Confirmation.with_initial_data(description=text)
        # Prefect counts a run's pauses from one again after Retry, and would refuse the second question of that number.
        given = await apause_flow_run(
            asked, timeout=round((PATIENCE + MARGIN).total_seconds()), poll_interval=LOOK, key=uuid4().hex
        )
    return given.decision


def works_now(manager: TokenManager) -> str:
    """Whose token serves until when, as one sentence."""
    return f"{alerts.Subject.of(manager, datetime.now(UTC)).served}."


def unrenewed(manager: TokenManager, error: Exception, note: Note, now: datetime) -> State:
    """Declined where a limit forbids it and the present token serves, else Failed.

    Slack hears of what more people must know than who started it, and who did.
    """
    limited = isinstance(error, IssuanceLimitError)
    if not limited or causes.cause_of(error, manager.history()) in causes.REFUSED:
        alerts.report(manager, error, now)
        alerts.announce(manager, "failed", who=note.by, why=note.reason, now=now)
    serves = alerts.Subject.of(manager, now).reach is not None
    return Completed(name="Declined", message=str(error)) if limited and serves else Failed(message=str(error))
