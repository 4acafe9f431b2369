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
    from collections.abc import Sequence
    from uuid import UUID

    from prefect.events.actions import ActionTypes

    from flows.words import Words

OWNED = "tokencore"  # the tag of the automations that are ours to change and to remove
RUN, POOL = "prefect.flow-run.", "prefect.work-pool."
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
    return [
        Rule(
            "A run crashed",
            "A run's process ended before the run did. Failed runs tell it themselves.",
            EventTrigger(expect={f"{RUN}Crashed"}, match={"prefect.resource.id": f"{RUN}*"}),
            notices.crashed(words),
        ),
        Rule(
            "A run is late",
            "A warm-up or a refresh is due, and none of them is being started.",
            EventTrigger(
                after={f"{RUN}Late"},
                expect={f"{RUN}Pending"},
                match={"prefect.resource.id": f"{RUN}*"},
                match_related=_of_flows("warm-up", "refresh-token"),
                for_each={"related:work-pool:prefect.resource.id"},
                posture=Posture.Proactive,
                within=patience.late,
            ),
            notices.late(words),
        ),
        Rule(
            "No worker",
            "The work pool has no worker that is alive: nothing runs.",
            EventTrigger(
                after={f"{POOL}not-ready"},
                expect={f"{POOL}ready"},
                match={"prefect.resource.id": f"{POOL}*"},
                for_each={"prefect.resource.id"},
                posture=Posture.Proactive,
                within=patience.worker,
            ),
            notices.no_worker(words),
        ),
        Rule(
            "A run shows no life",
            "A run whose process is gone, killed together with its worker, is marked Crashed, and that is told.",
            EventTrigger(
                after={RUN + name for name in ALIVE},
                expect={f"{RUN}*"},
                match={"prefect.resource.id": f"{RUN}*"},
                for_each={"prefect.resource.id"},
                posture=Posture.Proactive,
                within=patience.life,
            ),
            action=ChangeFlowRunState(name=None, state=StateType.CRASHED, message=words("server.life"), force=False),
        ),
        Rule(
            "The hourly check is missing",
            "No check has ended for a while; told again each time that it passes.",
            EventTrigger(
                expect={RUN + name for name in CHECKED},
                match={"prefect.resource.id": f"{RUN}*"},
                match_related=_of_flows("check-tokens"),
                posture=Posture.Proactive,
                within=patience.check,
            ),
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
        description=rule.about,
        enabled=enabled,
        tags=[OWNED],
        trigger=rule.trigger,
        actions=[*_actions(rule, block)] or [DoNothing()],
    )


def _actions(rule: Rule, block: UUID | None) -> Sequence[ActionTypes]:
    told = [SendNotification(block_document_id=block, **rule.notice._asdict())] if block and rule.notice else []
    return [*([rule.action] if rule.action else []), *told]


def _of_flows(*names: str) -> dict[str, str | list[str]]:
    return {"prefect.resource.role": "flow", "prefect.resource.name": list(names)}
