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
from prefect.states import Scheduled

from flows.runs import clock, harmless, local_date
from tokencore import sessions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

    from flows.runs import View

TAG, BY_CRON = "planned renewal", "auto-scheduled"  # the second is Prefect's
DEPLOYMENT = "check-tokens/check_tokens"


class Wanted(NamedTuple):
    """A key's scheduled run: what people call the key, the tag that names it, and when (aware UTC); None for no run."""

    label: str
    tag: str
    at: datetime | None


def update(views: Sequence[View]) -> None:
    """Bring the scheduled renewals up to date with the keys; what fails here changes no run's end."""
    with harmless("The next renewals could not be scheduled"):
        keep([Wanted(key.label, f"key {key.fingerprint}", state.next_attempt) for key, state, _ in views if state])


def keep(wanted: Sequence[Wanted]) -> None:
    """Have exactly one scheduled run for each key, at its moment, and none where that is None.

    One that is about to start is not taken back: it finds out for itself what there is to do. Where `check_tokens` is
    not deployed there is nobody to run it later, and nothing is done.
    """
    with get_client(sync_client=True) as client:
        try:
            deployment = client.read_deployment_by_name(DEPLOYMENT)
        except ObjectNotFound:
            return
        there, now = _scheduled(client, TAG), datetime.now(UTC)
        for label, tag, at in wanted:
            own = {run.expected_start_time: run for run in there if tag in run.tags}
            for planned, run in own.items():
                if planned and planned != at and planned > now:
                    client.delete_flow_run(run.id)
            if at and at not in own:
                client.create_flow_run_from_deployment(
                    deployment.id,
                    state=Scheduled(scheduled_time=at),
                    name=f"renew {label} {clock(at)}",
                    tags=[TAG, label, tag],
                    idempotency_key=f"{TAG} {tag} {at.isoformat()}",
                )


def name_ahead() -> None:
    """Give the runs that schedules have made the names that they will have: until they start, Prefect's are random."""
    with harmless("The coming runs could not be named"), get_client(sync_client=True) as client:
        for run in _scheduled(client, BY_CRON):
            if (name := _name(run)) and run.name != name:
                client.update_flow_run(run.id, name=name)


def check_name(at: datetime) -> str:
    """The name of the check that is due then (aware)."""
    return f"check-tokens {at.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def warm_up_name(exchange: str, at: datetime) -> str:
    """The name of the warm-up of an exchange that is due then (aware)."""
    return f"warm-up {exchange} {local_date(exchange, at)}"


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
