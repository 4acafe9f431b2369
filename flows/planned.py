"""The next renewal of every key, in the UI before it happens: one scheduled run of `check_tokens` at its instant.

The hourly check alone would renew up to an hour late, and a day later another hour. So every flow leaves a
run for the moment at which the rule has something to do next: the planned renewal or, after a failure, the
next attempt. There is one such run per key; it moves when the plan moves and goes when there is nothing to do.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType, FlowRunFilterTags
from prefect.client.schemas.objects import StateType
from prefect.exceptions import ObjectNotFound
from prefect.states import Scheduled

from flows.runs import clock, harmless
from tokencore import managers, next_attempt

if TYPE_CHECKING:
    from collections.abc import Mapping
    from uuid import UUID

    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

TAG = "planned renewal"
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
        there = _planned(client)
        for run in there:
            if not _is_due(run) and not any(_is_for(run, markets, at) for markets, at in wanted.items()):
                client.delete_flow_run(run.id)
        for markets, at in wanted.items():
            if at and not any(_is_for(run, markets, at) for run in there):
                _schedule(client, deployment.id, markets, at)


def _planned(client: SyncPrefectClient) -> list[FlowRun]:
    return client.read_flow_runs(
        flow_run_filter=FlowRunFilter(
            tags=FlowRunFilterTags(all_=[TAG]),
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
