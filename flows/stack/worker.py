"""Prefect's worker in a process of our own, which also ends the runs that the worker itself never would.

Prefect's worker leaves the runs that it stops, and those that die with it, in the state `Running` forever, and it
starts every run that was missed, one by one.
"""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from flows.stack.api import CHECK, POOL, Api, StackError

SUPERVISOR = "STACK_SUPERVISOR"  # supervisord's process id, for the processes that it starts
NAME = platform.node()  # our worker's name: a restarted worker takes the place of the previous one
AT_WORK = ("PENDING", "RUNNING", "CANCELLING")
UNDERWAY = (*AT_WORK, "PAUSED")  # a paused run waits for a person, and its process for the run
OVERDUE = timedelta(minutes=3)  # a run that starts within it is on time
NAP = 60.0  # seconds: a longer time between two looks at the clock means that the machine, or all processes, slept
POLL = 0.5  # seconds
TIME_TO_END = 30.0  # seconds, as supervisord gives
GRACE = 10.0  # seconds that runs in flight get to end by themselves
KILLED = "Its process is gone: it was killed together with its worker, or the machine stopped."
STOPPED = "Stopped with its worker; the check that comes with the next start goes on."
SKIPPED = "Missed while nothing ran here; a later run does it all."


def work() -> int:
    """Run Prefect's worker until SIGTERM; before it, end the runs that died with the last one; after it, those left.

    Neither the worker nor its runs get the database's address and the encryption key of the blocks.
    """
    own = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_SERVER_")}
    if own != dict(os.environ):  # a process's first environment stays visible to others
        os.execve(sys.executable, [sys.executable, "-m", "flows.stack", "worker"], own)  # noqa: S606 - no shell
    threading.Thread(target=end_with_parent, daemon=True).start()
    server = Api(own["PREFECT_API_URL"].removesuffix("/api"), own["PREFECT_API_AUTH_STRING"])
    server.wait()
    mark_crashed(server)
    skip_overdue(server)
    os.chdir(own["PREFECT_HOME"])
    threading.Thread(target=watch_sleep, args=(server,), daemon=True).start()
    try:
        from flows.stack import prefect_worker  # imports Prefect, which then reads the settings in its folder

        prefect_worker.main("--pool", POOL, "--type", "process", "--name", NAME)
    finally:
        with contextlib.suppress(StackError):  # what is left Running is marked Crashed at the next start
            # After supervisord's death nobody answers, but this process too holds the port open.
            for run in _orphans(server) if server.answers("health") else []:
                server.set_state(run["id"], "CANCELLED", "Cancelled", STOPPED)
    return 0


def end_with_parent() -> None:
    """End this process, as supervisord would, once supervisord is gone: nobody else would stop or restart it.

    If supervisord is gone before this process first looks, its parent is already another one.
    """
    supervisor = int(os.environ[SUPERVISOR])
    while os.getppid() == supervisor:
        time.sleep(POLL)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(TIME_TO_END)
    os.kill(os.getpid(), signal.SIGKILL)


def is_alive(process: int, program: str = "") -> bool:
    """Whether a process with this id, of that program, is alive; a zombie, which nobody may reap, is not."""
    try:
        os.kill(process, 0)
        place = Path(f"/proc/{process}")
        dead = place.joinpath("stat").read_text().rpartition(")")[2].split()[0] in "ZX"
        return not dead and program in place.joinpath("cmdline").read_text(errors="replace")
    except ProcessLookupError:
        return False
    except OSError:  # another user's process, or a system without /proc
        return True


def watch_sleep(api: Api) -> None:
    """After each sleep of the machine, skip the runs that are late and check the tokens once instead; never returns.

    The wall clock shows a sleep: Linux's monotonic clock stands still meanwhile.
    """
    seen = time.time()
    while True:
        time.sleep(POLL)
        before, seen = seen, time.time()
        if seen - before > NAP:
            print(f"Nothing ran here for {seen - before:.0f} s.", flush=True)
            with contextlib.suppress(StackError):  # otherwise the hourly check comes
                skip_overdue(api)
                api.create_run(CHECK)


def mark_crashed(api: Api) -> None:
    """Mark as Crashed the runs whose process is gone; no worker may run, as a run that it starts has no process yet."""
    for run in _orphans(api):
        api.set_state(run["id"], "CRASHED", "Crashed", KILLED)


def drain(api: Api) -> None:
    """Wait until no process of this machine works on a run, ten seconds at most; without a server, do not wait."""
    give_up = time.monotonic() + GRACE
    with contextlib.suppress(StackError):
        while time.monotonic() < give_up and any(_works(run) for run in _runs(api, *AT_WORK)):
            time.sleep(POLL)


def skip_overdue(api: Api) -> None:
    """Skip the runs that were missed: all checks, and all but the last of each warm-up.

    The caller has to start a check, which makes up for all of them. Other runs that a person asked for are left alone.
    """
    before = {"before_": (datetime.now(UTC) - OVERDUE).isoformat()}
    missed = api.runs(state={"type": {"any_": ["SCHEDULED"]}}, expected_start_time=before)
    checks = api.deployment(CHECK)["id"] if missed else ""
    last = {run["deployment_id"]: run["id"] for run in missed}  # they come in the order in which they were due
    for run in missed:
        by_cron = "auto-scheduled" in run["tags"]
        if run["deployment_id"] == checks or (by_cron and last[run["deployment_id"]] != run["id"]):
            api.set_state(run["id"], "COMPLETED", "SkippedLate", SKIPPED)


def _runs(api: Api, *states: str) -> list[dict[str, Any]]:
    return api.runs(state={"type": {"any_": [*states]}})


def _orphans(api: Api) -> list[dict[str, Any]]:
    """Return the runs underway without a process; none if another machine has a worker, as its runs look the same."""
    found = [run for run in _runs(api, *UNDERWAY) if not _works(run)]
    workers = api.ask("POST", f"work_pools/{POOL}/workers/filter", {}) if found else []
    return [] if any(one["status"] == "ONLINE" and one["name"] != NAME for one in workers) else found


def _works(run: dict[str, Any]) -> bool:
    """Whether the run's process is alive; after a restart another one may have the id that the worker noted."""
    number = run["infrastructure_pid"] or ""
    return number.isdecimal() and is_alive(int(number), "prefect.engine")
