"""Planned renewals, which the UI shows as scheduled runs before they happen.

The hourly check alone would renew up to an hour late, and the next day up to another hour later. So every flow
schedules a run of `check_tokens` for the time at which the rule has something to do next: the planned renewal or,
after a failure, the next attempt. There is one such run per key; it moves with the plan and is removed when there is
nothing to do. Its tags name the key, so that installations with other keys on the same server leave it alone.
"""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType, FlowRunFilterTags
from prefect.client.schemas.objects import StateType
from prefect.exceptions import ObjectNotFound
from prefect.states import Scheduled

from flows.runs import clock, harmless, identity

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from prefect.client.orchestration import SyncPrefectClient

    from flows.runs import View

    Plan = tuple[str, str, datetime | None]  # a key's label and tag, and when its next renewal is due (aware UTC)

TAG = "planned renewal"
DEPLOYMENT = "check-tokens/check_tokens"


def update(views: Sequence[View]) -> None:
    """Bring the scheduled renewals up to date with the keys; a failure here does not change how a run ends."""
    with harmless("The next renewals could not be scheduled"):
        keep(*((key.label, identity(key), state.next_attempt) for key, state, _ in views if state))


def keep(*plans: Plan) -> None:
    """Keep exactly one scheduled run for each of these keys, or none if it has no time.

    A run whose time has come is left alone: it finds out for itself what there is to do. If `check_tokens` is not
    deployed, nothing could run it later, and nothing is scheduled.
    """
    with get_client(sync_client=True) as client, contextlib.suppress(ObjectNotFound):
        deployment = client.read_deployment_by_name(DEPLOYMENT)
        for plan in plans:
            _keep(client, deployment.id, *plan)


def _keep(client: SyncPrefectClient, deployment: UUID, label: str, tag: str, at: datetime | None) -> None:
    waiting = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED]))
    own = FlowRunFilter(tags=FlowRunFilterTags(all_=[TAG, tag]), state=waiting)
    there = {run.expected_start_time: run for run in client.read_flow_runs(flow_run_filter=own)}
    for planned, run in there.items():
        if planned and planned != at and planned > datetime.now(UTC):
            with contextlib.suppress(ObjectNotFound):  # another run has just moved the plan as well
                client.delete_flow_run(run.id)
    if at and at not in there:
        client.create_flow_run_from_deployment(
            deployment,
            state=Scheduled(scheduled_time=at),
            name=f"renew {label} {clock(at)}",
            tags=[TAG, label, tag],
            idempotency_key=f"{TAG} {tag} {at.isoformat()}",
        )
