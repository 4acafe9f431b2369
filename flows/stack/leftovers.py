"""Runs that nobody will end or that came too late: after a kill, a stop, a down-time or a sleep of the machine.

Prefect's worker leaves the runs that it stops, and those that die with it, in the state `Running` for ever, each with
the slot of its deployment; and it starts every run that was missed, one by one.
"""

from __future__ import annotations

import contextlib
import platform
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from flows.stack.crew import CrewError, birth

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flows.stack.api import Api

POOL = "tokens"  # as prefect.yaml names it
WORKER = platform.node()  # the name of our worker: a restart takes the place of the one before
AT_WORK = ("PENDING", "RUNNING", "CANCELLING")
UNDERWAY = (*AT_WORK, "PAUSED")  # a paused run waits for a person, and its process for the run
OVERDUE = timedelta(minutes=3)  # a run that starts within it is on time
POLL = 0.5  # seconds
SUSPENDED = "Suspended"  # the name of a paused state in which a run needs no process
KILLED = "Its process is gone: it was killed together with its worker, or the machine stopped."
STOPPED = "Stopped with its worker; the check that comes with the next start goes on."
SKIPPED = "Missed while nothing ran here; a later run does it all."


def bury(api: Api) -> None:
    """Mark as Crashed the runs whose process is gone; while no worker lives, as one that it starts has none yet.

    Raises:
        CrewError: the server could not be asked.

    """
    for run in _dead(api):
        _end(api, run, "CRASHED", "Crashed", KILLED)


def drain(api: Api, patience: float) -> None:
    """Wait until no process of this machine works on a run, at most `patience` seconds; without a server not at all."""
    give_up = time.monotonic() + patience
    with contextlib.suppress(CrewError):
        while time.monotonic() < give_up and any(_is_alive(run) for run in _runs(api, AT_WORK)):
            time.sleep(POLL)


def cancel(api: Api) -> None:
    """Mark as Cancelled what a worker that was stopped has left behind; what fails here is left to `bury`."""
    with contextlib.suppress(CrewError):
        for run in _dead(api):
            _end(api, run, "CANCELLED", "Cancelled", STOPPED)


def skip_overdue(api: Api, check: str) -> None:
    """Skip the runs that were missed: all of the deployment `check`, all but the last of each warm-up.

    To let a check run, which does for all of them, is up to the caller. What a person has asked for is left.

    Raises:
        CrewError: the server could not be asked.

    """
    before = {"before_": (datetime.now(UTC) - OVERDUE).isoformat()}
    missed = _runs(api, ["SCHEDULED"], expected_start_time=before)
    checks = api.ask("GET", f"deployments/name/{check}")["id"] if missed else ""
    last = {run["deployment_id"]: run["id"] for run in missed}  # in the order in which they were due
    for run in missed:
        by_cron = "auto-scheduled" in run["tags"]
        if run["deployment_id"] == checks or (by_cron and last[run["deployment_id"]] != run["id"]):
            _end(api, run, "COMPLETED", "SkippedLate", SKIPPED)


def _dead(api: Api) -> list[dict[str, Any]]:
    """The runs underway without a process. Another machine's look the same: while it has a worker, none is named."""
    found = [run for run in _runs(api, UNDERWAY) if run["state_name"] != SUSPENDED and not _is_alive(run)]
    return found if found and not _others(api) else []


def _others(api: Api) -> bool:
    if not api.answers(f"work_pools/{POOL}"):
        return False
    workers = api.ask("POST", f"work_pools/{POOL}/workers/filter", {})
    return any(one["status"] == "ONLINE" and one["name"] != WORKER for one in workers)


def _runs(api: Api, states: Sequence[str], **more: object) -> list[dict[str, Any]]:
    wanted = {"state": {"type": {"any_": [*states]}}, **more}
    asked = {"flow_runs": wanted, "sort": "EXPECTED_START_TIME_ASC"}
    found: list[dict[str, Any]] = api.ask("POST", "flow_runs/filter", asked)
    return found


def _is_alive(run: dict[str, Any]) -> bool:
    """Whether its process, by the number that the worker noted, is there."""
    number = run["infrastructure_pid"] or ""
    return number.isdecimal() and bool(birth(int(number)))


def _end(api: Api, run: dict[str, Any], kind: str, name: str, message: str) -> None:
    state = {"type": kind, "name": name, "message": message}
    api.ask("POST", f"flow_runs/{run['id']}/set_state", {"state": state, "force": True})
