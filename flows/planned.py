"""What is going to happen, in the UI before it does: the renewals as scheduled runs, and every run by its name.

The hourly check alone would renew up to an hour late, and a day later another hour. So every flow leaves a
run of `check_tokens` for the moment at which the rule has something to do next: the planned renewal or, after a
failure, the next attempt. There is one such run per key; it moves when the plan moves and goes when there is
nothing to do.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType, FlowRunFilterTags
from prefect.client.schemas.objects import StateType
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run
from prefect.states import Scheduled

from flows.runs import check_name, clock, harmless, warm_up_name
from tokencore import managers, next_attempt, sessions

if TYPE_CHECKING:
    from collections.abc import Mapping
    from uuid import UUID

    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

TAG, BY_CRON = "planned renewal", "auto-scheduled"  # the second is Prefect's
DEPLOYMENT = "check-tokens/check_tokens"


def update(now: datetime) -> None:
    """Bring the scheduled renewals up to date with the plan at `now` (aware); what fails here changes no run's end."""
    with harmless("The next renewals could not be scheduled"):
        keep({"+".join(one.sharing()): next_attempt(one, now) for one in managers(one_per_key=True)})


def keep(wanted: Mapping[str, datetime | None]) -> None:
    """Have exactly one scheduled run for each key, at its moment (aware), and none where that is None.

    `wanted` is by the key's markets, such as `us+kr`. Where `check_tokens` is not deployed there is nobody to run
    it later, and nothing is done.
    """
    with get_client(sync_client=True) as client:
        try:
            deployment = client.read_deployment_by_name(DEPLOYMENT)
        except ObjectNotFound:
            return
        there = _scheduled(client, TAG)
        for run in there:
            if not _is_due(run) and not any(_is_for(run, markets, at) for markets, at in wanted.items()):
                client.delete_flow_run(run.id)
        for markets, at in wanted.items():
            if at and not any(_is_for(run, markets, at) for run in there):
                _schedule(client, deployment.id, markets, at)


def name_ahead() -> None:
    """Call the runs that schedules have made what they will be called: until they start, Prefect has random words."""
    with harmless("The coming runs could not be named"), get_client(sync_client=True) as client:
        for run in _scheduled(client, BY_CRON):
            if (name := _name(run)) and run.name != name:
                client.update_flow_run(run.id, name=name)


def kept_name() -> str | None:
    """The name of this run, if it is a planned renewal, which had one before it started."""
    name: str | None = flow_run.name
    return name if TAG in flow_run.tags else None


def _name(run: FlowRun) -> str | None:
    """By the tags of prefect.yaml; a schedule of somebody else's flow keeps Prefect's words."""
    at, exchange = run.expected_start_time, run.parameters.get("exchange")
    if at and "warm-up" in run.tags and exchange in sessions.EXCHANGES:
        return warm_up_name(exchange, at)
    return check_name(at) if at and "check" in run.tags else None


def _scheduled(client: SyncPrefectClient, tag: str) -> list[FlowRun]:
    return client.read_flow_runs(
        flow_run_filter=FlowRunFilter(
            tags=FlowRunFilterTags(all_=[tag]),
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])),
        )
    )


def _is_due(run: FlowRun) -> bool:
    """Whether it is about to start: then it is not taken back, and finds out for itself what there is to do."""
    return run.expected_start_time is not None and run.expected_start_time <= datetime.now(UTC)


def _is_for(run: FlowRun, markets: str, at: datetime | None) -> bool:
    return markets in run.tags and run.expected_start_time == at


def _schedule(client: SyncPrefectClient, deployment: UUID, markets: str, at: datetime) -> None:
    client.create_flow_run_from_deployment(
        deployment,
        state=Scheduled(scheduled_time=at),
        name=f"renew {markets} {clock(at)}",
        tags=[TAG, markets],
        idempotency_key=f"{TAG} {markets} {at.isoformat()}",
    )
