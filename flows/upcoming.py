"""What is going to happen, in the UI before it does: the renewals as scheduled runs, and every run by its name.

The hourly check alone would renew up to an hour late, and a day later another hour. So every flow leaves a run of
`check_tokens` for the moment at which the rule has something to do next: the planned renewal or, after a failure, the
next attempt. There is one such run per key; it moves when the plan moves and goes when there is nothing to do. Its
tags name the key, so that installations with other keys on the same server leave it alone.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType, FlowRunFilterTags
from prefect.client.schemas.objects import StateType
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run
from prefect.states import Scheduled

from flows.runs import check_name, clock, harmless, warm_up_name
from tokencore import sessions

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

    from flows.runs import View
    from tokencore import Key

TAG, BY_CRON = "planned renewal", "auto-scheduled"  # the second is Prefect's
KEY_TAG = "key "  # and the key's fingerprint; runs of version 0.1 have none
DEPLOYMENT = "check-tokens/check_tokens"


class Wanted(NamedTuple):
    """A key's scheduled run: what people call the key, its tag, and when (aware UTC); None for no run."""

    label: str
    tag: str
    at: datetime | None

    def is_met(self, run: FlowRun) -> bool:
        """Whether this run is it."""
        return self.tag in run.tags and run.expected_start_time == self.at

    def owns(self, run: FlowRun) -> bool:
        """Whether this run was made for this key."""
        known = any(tag.startswith(KEY_TAG) for tag in run.tags)
        return self.tag in run.tags or (not known and self.label in run.tags)


def update(views: Sequence[View]) -> None:
    """Bring the scheduled renewals up to date with the keys; what fails here changes no run's end."""
    with harmless("The next renewals could not be scheduled"):
        keep([Wanted(*_names(key), state.next_attempt) for key, state in views if not isinstance(state, str)])


def keep(wanted: Sequence[Wanted]) -> None:
    """Have exactly one scheduled run for each key, at its moment, and none where that is None.

    Where `check_tokens` is not deployed there is nobody to run it later, and nothing is done.
    """
    with get_client(sync_client=True) as client:
        try:
            deployment = client.read_deployment_by_name(DEPLOYMENT)
        except ObjectNotFound:
            return
        there = _scheduled(client, TAG)
        for one in wanted:
            own = [run for run in there if one.owns(run)]
            for run in own:
                if not one.is_met(run) and not _is_due(run):
                    client.delete_flow_run(run.id)
            if one.at and not any(one.is_met(run) for run in own):
                _schedule(client, deployment.id, one, one.at)


def name_ahead() -> None:
    """Give the runs that schedules have made the names that they will have: until they start, Prefect's are random."""
    with harmless("The coming runs could not be named"), get_client(sync_client=True) as client:
        for run in _scheduled(client, BY_CRON):
            if (name := _name(run)) and run.name != name:
                client.update_flow_run(run.id, name=name)


def kept_name() -> str | None:
    """The name of this run, if it is a planned renewal, which had one before it started."""
    name: str | None = flow_run.name
    return name if TAG in flow_run.tags else None


def _names(key: Key) -> tuple[str, str]:
    return key.label, f"{KEY_TAG}{key.fingerprint}"


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


def _schedule(client: SyncPrefectClient, deployment: UUID, wanted: Wanted, at: datetime) -> None:
    client.create_flow_run_from_deployment(
        deployment,
        state=Scheduled(scheduled_time=at),
        name=f"renew {wanted.label} {clock(at)}",
        tags=[TAG, wanted.label, wanted.tag],
        idempotency_key=f"{TAG} {wanted.tag} {at.isoformat()}",
    )
