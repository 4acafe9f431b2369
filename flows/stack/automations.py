"""What Prefect watches and tells by itself, as code: what the flows cannot tell, because they do not run.

Requires: for messages SLACK_WEBHOOK_URL, or SLACK_BOT_TOKEN and SLACK_CHANNEL. Without them the automations still mark
runs whose process is gone.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState, DoNothing, SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

from flows.stack import notices
from flows.stack.server import CHECKED
from flows.words import LANGUAGES
from tokencore import Settings

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from uuid import UUID

    from prefect.events.actions import ActionTypes

    from flows.words import Words

OWNED = "tokencore"  # the tag of the automations that are ours to change and to remove
RUN, POOL = "prefect.flow-run.", "prefect.work-pool."
_ID = "prefect.resource.id"
UNHEARD = "Nobody is told: the settings have no way to Slack."
ALIVE = ("Pending", "Submitting", "Running", "heartbeat")  # the events after which a run has to show another


class Patience(NamedTuple):
    """How long each absence is borne before it is told."""

    late: timedelta = timedelta(minutes=5)
    worker: timedelta = timedelta(minutes=1)  # after the server has missed three of its heartbeats
    life: timedelta = timedelta(minutes=4)  # of a run without a heartbeat, which it gives every minute
    check: timedelta = timedelta(minutes=90)


class Rule(NamedTuple):
    """An automation: its name, what it is for, when it fires, what it does; an empty notice tells nobody.

    Attributes:
        name: known by it across deploys.
        about: for the page.
        trigger: when it fires.
        notice: what Slack is told.
        action: what is done beside it.

    """

    name: str
    about: str
    trigger: EventTrigger
    notice: notices.Notice | None = None
    action: ActionTypes | None = None


def rules(patience: Patience, words: Words) -> list[Rule]:
    """Every automation of ours, its messages in that language."""
    ended = EventTrigger(expect={f"{RUN}Crashed"}, match={_ID: f"{RUN}*"})
    late = _absent(
        f"{RUN}Pending",
        within=patience.late,
        after=[f"{RUN}Late"],
        each="related:work-pool:prefect.resource.id",
        flows=["warm-up", "refresh-token"],
    )
    idle = _absent(f"{POOL}ready", within=patience.worker, after=[f"{POOL}not-ready"], each=_ID, of=POOL)
    lifeless = _absent(f"{RUN}*", within=patience.life, after=[RUN + name for name in ALIVE], each=_ID)
    unchecked = _absent(*(RUN + name for name in CHECKED), within=patience.check, flows=["check-tokens"])
    buried = ChangeFlowRunState(name=None, state=StateType.CRASHED, message=words("server.life"), force=False)
    return [
        Rule(
            "A run crashed",
            "A run's process ended before the run did. Failed runs tell it themselves.",
            ended,
            notices.crashed(words),
        ),
        Rule(
            "A run is late",
            "A warm-up or a refresh is due, and none of them is being started.",
            late,
            notices.late(words),
        ),
        Rule("No worker", "The work pool has no worker that is alive: nothing runs.", idle, notices.no_worker(words)),
        Rule(
            "A run shows no life",
            "A run whose process is gone, killed together with its worker, is marked Crashed, and that is told.",
            lifeless,
            action=buried,
        ),
        Rule(
            "The hourly check is missing",
            "No check has ended for a while; told again each time that it passes.",
            unchecked,
            notices.no_check(words, patience.check),
        ),
    ]


def upsert(patience: Patience | None = None) -> None:
    """Make the automations and the way to Slack on the server of this process's settings, or bring them up to date.

    Known by name and our tag: made twice they are the same, one that is not ours any more is removed, those of others
    are left alone. One that a person switched off stays off.
    """
    settings = Settings.load()
    block = notices.save(settings)
    wanted = {rule.name: rule for rule in rules(patience or Patience(), LANGUAGES[settings.slack_language])}
    with get_client(sync_client=True) as client:
        ours = [one for one in client.read_automations() if OWNED in one.tags]
        there = {one.name: one for one in ours}
        for one in ours:
            if one.name not in wanted or one is not there[one.name]:
                client.delete_automation(one.id)
        for name, rule in wanted.items():
            if known := there.get(name):
                update = _automation(rule, block, enabled=known.enabled)
                # The client leaves out whatever was not given, and the server then misses it; the owner it refuses.
                client.update_automation(
                    known.id, AutomationCore.model_validate(update.model_dump(exclude={"owner_resource"}))
                )
            else:
                client.create_automation(_automation(rule, block, enabled=True))


def _automation(rule: Rule, block: UUID | None, *, enabled: bool) -> AutomationCore:
    return AutomationCore(
        name=rule.name,
        description=rule.about if block or not rule.notice else f"{rule.about} {UNHEARD}",
        enabled=enabled,
        tags=[OWNED],
        trigger=rule.trigger,
        actions=[*_actions(rule, block)] or [DoNothing()],
    )


def _actions(rule: Rule, block: UUID | None) -> Sequence[ActionTypes]:
    told = [SendNotification(block_document_id=block, **rule.notice._asdict())] if block and rule.notice else []
    return [*([rule.action] if rule.action else []), *told]


def _absent(
    *expected: str,
    within: timedelta,
    after: Iterable[str] = (),
    each: str = "",
    flows: Sequence[str] = (),
    of: str = RUN,
) -> EventTrigger:
    """Fires when none of the events comes in time: after others, for each thing of its own, or of these flows only."""
    return EventTrigger(
        after={*after},
        expect={*expected},
        match={_ID: f"{of}*"},
        match_related={"prefect.resource.role": "flow", "prefect.resource.name": [*flows]} if flows else {},
        for_each={each} if each else set(),
        posture=Posture.Proactive,
        within=within,
    )
