"""Faults of Prefect and of Slack on the running system: what becomes of the run, the token and the operator."""

from __future__ import annotations

import signal
import sqlite3
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from faulty_stack import Case, asleep, cached, created, end, get, kill, look, second_worker
from running import until
from scenarios import FULL, long
from stacks import in_proc

from flows.incidents import CLAIM

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from stacks import Up

MINUTE = 60.0 if FULL else 5.0  # seconds: KIS's
LOCKED = 40.0  # seconds; the server's own patience with SQLite is shorter
PAUSE = 30  # seconds that a busy Slack asks for
# By market: how Slack answers meanwhile, and the pause that it asks for. The last one holds for all runs.
SLACK = {
    "down": ([503] * 2, 1),
    "silent": ([0], 1),
    "revoked": ([403], 1),
    "busy": ([429], PAUSE),
}
NAP = 65.0  # seconds; from 60 on the supervisor takes it for a sleep
pytestmark = in_proc


@pytest.fixture
def case(up: Up) -> Iterator[Case]:
    """A key of its own; what it leaves in the shared folder goes with it."""
    yield Case.begun(up, MINUTE)
    Case.over(up)


@pytest.mark.parametrize("with_worker", [pytest.param(False, marks=long, id="run"), pytest.param(True, id="worker")])
def test_a_kill_between_issue_and_save_costs_one_request_after_the_minute(case: Case, *, with_worker: bool) -> None:
    """The run is Crashed and told; who comes next waits, gets the token that was paid for, and the next run is Warm."""
    run, worker = case.amid_issue(), case.up.processes()["worker"]
    kill([*([worker] if with_worker else []), look(case.up, run).process])
    assert cached(case.up) == ""
    assert get(case.up)
    assert case.requests() == ["new", "same"]
    assert end(case.up, run, 60).kind == "CRASHED"
    until(lambda: "A run crashed: warm-up" in case.messages(), 30)
    assert end(case.up, case.warm_up()).name == "Warm"  # its deployment's slot is free
    assert len(case.requests()) == 2


def test_a_run_cancelled_amid_an_issue_keeps_the_token(case: Case) -> None:
    """Cancelled in the page, it still saves what it has asked for; nobody asks again."""
    run = case.amid_issue(latency=2)
    assert case.up.api("POST", f"flow_runs/{run}/set_state", {"state": {"type": "CANCELLING"}}).ok
    assert end(case.up, run).kind == "CANCELLED"
    assert cached(case.up)
    assert case.requests() == ["new"]


@long
def test_a_locked_database_holds_no_token_up(case: Case) -> None:
    """The token is saved while Prefect cannot write; the run ends well once it can."""
    run = case.amid_issue(latency=2)
    with closing(sqlite3.connect(case.up.folder / "prefect.db", timeout=30, isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        free = time.monotonic() + LOCKED
        until(lambda: bool(cached(case.up)), LOCKED)
        time.sleep(max(0.0, free - time.monotonic()))
        database.execute("ROLLBACK")
    assert end(case.up, run).name == "Renewed"
    assert case.requests() == ["new"]


@long
def test_a_server_killed_amid_an_issue_is_started_again(case: Case) -> None:
    """The token is saved without it, and the run ends on the new one as if nothing had been."""
    run, server = case.amid_issue(latency=2), case.up.processes()["server"]
    kill([server])
    until(lambda: bool(cached(case.up)), 20)
    until(lambda: case.up.processes().get("server", server) != server, 30)
    assert end(case.up, run).name == "Renewed"
    assert case.requests() == ["new"]


@long
def test_a_machine_asleep_over_a_warm_up_makes_it_good(case: Case) -> None:
    """The warm-up that was missed runs on waking, once, beside a check; together they send one request."""
    due = (datetime.now(UTC) + timedelta(seconds=40)).isoformat()
    state = {"type": "SCHEDULED", "state_details": {"scheduled_time": due}}
    run = created(case.up, f"warm-up/{case.exchange}", state=state, tags=["auto-scheduled"])
    time.sleep(5)
    with asleep(case.up):
        time.sleep(NAP)
    assert end(case.up, run).name in ("Renewed", "Warm")
    assert cached(case.up)
    assert case.requests() == ["new"]


@long
def test_a_run_that_the_worker_is_starting_on_waking_is_spared(case: Case) -> None:
    """Without a process yet, it is not taken for one whose process died."""
    run = created(case.up, f"warm-up/{case.exchange}", state={"type": "PENDING"})  # no worker takes it
    supervisor = [case.up.processes()["supervisor"]]
    kill(supervisor, signal.SIGSTOP)
    time.sleep(NAP)
    kill(supervisor, signal.SIGCONT)
    log = case.up.folder / "supervisor.log"
    until(lambda: "nothing ran here" in log.read_text(), 30)
    time.sleep(10)
    assert look(case.up, run).kind == "PENDING"
    case.up.api("DELETE", f"flow_runs/{run}")


@long
def test_a_machine_asleep_amid_an_issue_goes_on(case: Case) -> None:
    """The answer that came meanwhile is read on waking."""
    run = case.amid_issue(latency=3)
    with asleep(case.up):
        time.sleep(NAP)
    assert end(case.up, run).name == "Renewed"
    assert cached(case.up)
    assert case.requests() == ["new"]


@long
def test_two_workers_at_once_share_a_request(case: Case) -> None:
    """A warm-up and a check, which two workers start in the same moment, send one request."""
    with second_worker(case.up):
        case.up.gateway.set_rules(latency=5)
        runs = [case.warm_up(), created(case.up, "check-tokens/check_tokens")]
        assert {end(case.up, run).kind for run in runs} == {"COMPLETED"}
    assert case.requests() == ["new"]


@long
def test_trouble_is_told_once_slack_is_well_again(case: Case, record_property: Callable[[str, object], None]) -> None:
    """Runs that KIS refuses end with its sentence, whatever Slack does; a later run tells of each key, once."""
    slack = case.up.slack
    for market, (answers, pause) in SLACK.items():
        case.trade(market)
        case.up.gateway.fail("bad-key", 1)
        slack.answers[:], slack.retry_after = answers, pause
        failed = end(case.up, case.warm_up())
        assert (failed.kind, failed.message[:29]) == ("FAILED", "KIS does not know the app key")
        assert case.messages() == ""
    slack.answers.clear()
    time.sleep(max(CLAIM.total_seconds(), PAUSE) + 2)
    case.trade(*SLACK)
    for _ in range(2):
        assert end(case.up, case.warm_up()).kind == "FAILED"
    told = case.messages()
    assert [told.count(f"{market}: KIS refuses the app key") for market in SLACK] == [1] * len(SLACK)
    assert len(case.requests()) == len(SLACK)
    record_property("cases", len(SLACK))
