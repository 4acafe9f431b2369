"""The stack in the background after a kill, a stop or a sleep: nothing is left, and nothing piles up."""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from faulty_stack import created, look
from running import asked as requested
from running import start, until
from scenarios import long
from stacks import SLOW, in_proc

from flows.stack.crew import birth
from flows.stack.deploy import QUEUE
from flows.stack.leftovers import POOL

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stacks import Up

pytestmark = in_proc
REFRESH = "refresh-token/refresh_token"
NAP = 3.0  # seconds that count as a sleep; a busy machine takes its time too
SLEEPER = f"""
import os
from pathlib import Path
from flows.stack import crew
crew.NAP, crew.RESTART_PAUSE = {NAP}, 0.1
with crew.Crew(Path.cwd()) as one:
    one.start("brief", ["true"], os.environ)
    one.watch(lambda: print("woken", flush=True))
"""


@pytest.fixture
def slow_kis(up: Up) -> Iterator[None]:
    """A gateway that takes a minute to issue, so that a refresh lasts; nobody knows of a request within the minute."""
    for pattern in ("key-*.jsonl", "*_token_issued_at.dat"):
        for file in up.folder.parent.glob(pattern):
            file.unlink()
    up.gateway.set_rules(latency=60)
    yield
    up.gateway.set_rules(latency=0)


def deployment(up: Up, name: str) -> dict[str, Any]:
    """The deployment as the server has it."""
    found: dict[str, Any] = up.api("GET", f"deployments/name/{name}").json()
    return found


def refreshing(up: Up) -> tuple[str, int]:
    """A run that waits for KIS, and its process."""
    asked = {"market": "kr", "operator": "Kim", "force": True, "reason": "test"}
    before = requested(up.gateway)
    number = created(up, REFRESH, parameters=asked)
    until(lambda: requested(up.gateway) > before, SLOW)
    return number, look(up, number).process


def state(up: Up, number: str) -> tuple[str, str, str]:
    """Type, name and message of a run's state, from the database: there may be no server."""
    query = (
        "SELECT s.type, s.name, s.message FROM flow_run r JOIN flow_run_state s ON r.state_id = s.id "
        "WHERE replace(r.id, '-', '') = ?"
    )
    with closing(sqlite3.connect(up.folder / "prefect.db")) as tables:
        kind, name, message = tables.execute(query, (number.replace("-", ""),)).fetchone()
        return kind, name, message


def overdue(up: Up, deployment: str, hours: int, tag: str = "auto-scheduled") -> str:
    """A run that was due so long ago; its id."""
    due = (datetime.now(UTC) - timedelta(hours=hours)).isoformat()
    return created(up, deployment, state={"type": "SCHEDULED", "state_details": {"scheduled_time": due}}, tags=[tag])


@long
@pytest.mark.usefixtures("slow_kis")
def test_down_leaves_no_run_behind(up: Up) -> None:
    """A run that does not end by itself is Cancelled, with a sentence that says why."""
    number, process = refreshing(up)
    assert up.place.run("down") == (0, "Stopped.\n")
    kind, _, message = state(up, number)
    assert (kind, message.startswith("Stopped with its worker")) == ("CANCELLED", True)
    assert birth(process) == ""
    code, output = up.place.run("up")
    assert code == 0, output


@pytest.mark.usefixtures("slow_kis")
def test_after_a_kill_of_everything_up_marks_what_was_left_and_catches_up_once(up: Up) -> None:
    """The dead run is Crashed; of missed runs only the last warm-up runs, beside one check for all of them."""
    number, process = refreshing(up)
    processes = up.processes()
    for name in ("supervisor", "worker"):
        os.kill(processes[name], signal.SIGKILL)
    checks = [overdue(up, "check-tokens/check_tokens", hours) for hours in (5, 4, 3, 2, 1)]
    warm_ups = [overdue(up, "warm-up/KRX", hours) for hours in (72, 48, 24)]
    earlier = {"concurrency_limit": 1, "work_pool_name": POOL, "work_queue_name": "default"}  # as once
    assert up.api("PATCH", f"deployments/{deployment(up, REFRESH)['id']}", earlier).ok
    os.kill(processes["server"], signal.SIGKILL)
    os.kill(process, signal.SIGKILL)
    until(lambda: not up.processes())
    up.gateway.set_rules(latency=0)
    code, output = up.place.run("up")
    assert code == 0, output
    assert "first check" in output
    kind, _, message = state(up, number)
    assert (kind, "process is gone" in message) == ("CRASHED", True)
    assert {state(up, one)[:2] for one in (*checks, *warm_ups[:2])} == {("COMPLETED", "SkippedLate")}
    skipped = [up.api("GET", f"flow_runs/{one}").json() for one in (*checks, *warm_ups[:2])]
    assert {run["infrastructure_pid"] for run in skipped} == {None}  # without a process
    until(lambda: state(up, warm_ups[2])[0] == "COMPLETED", SLOW)
    assert deployment(up, REFRESH)["global_concurrency_limit"] is None  # it would end a pause for a person
    assert deployment(up, REFRESH)["work_queue_name"] == QUEUE


@pytest.mark.usefixtures("slow_kis")
def test_down_stops_what_a_killed_supervisor_left(up: Up) -> None:
    """Server, worker and run outlive a SIGKILL of their supervisor; `down` ends them, the run as Cancelled."""
    number, process = refreshing(up)
    os.kill(up.processes()["supervisor"], signal.SIGKILL)
    until(lambda: "supervisor" not in up.processes())
    assert sorted(up.processes()) == ["server", "worker"]
    assert up.place.run("down") == (0, "Stopped.\n")
    assert (up.place.living(), birth(process)) == ([], "")
    kind, _, message = state(up, number)
    assert (kind, message.startswith("Stopped with its worker")) == ("CANCELLED", True)
    assert up.place.run("down") == (0, "Nothing was running.\n")


def test_a_sleep_is_noticed_once() -> None:
    """A supervisor that did not run for a while, as in a sleep of the machine, says so when it wakes, and not again."""
    sleeper = start(SLEEPER)
    assert sleeper.stdout
    assert sleeper.stderr

    def next_look() -> None:
        """It tells of a member that ended again at the look after its start."""
        assert sleeper.stderr
        while "brief exited" not in sleeper.stderr.readline():
            assert sleeper.poll() is None

    next_look()
    sleeper.send_signal(signal.SIGSTOP)
    time.sleep(NAP + 0.5)
    sleeper.send_signal(signal.SIGCONT)
    assert sleeper.stdout.readline() == "woken\n"
    for _ in range(3):
        next_look()
    sleeper.send_signal(signal.SIGTERM)
    assert sleeper.communicate(timeout=30)[0] == ""
