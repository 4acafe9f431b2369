"""Machines that share a key through PostgreSQL: one request a day, whatever befalls them, the store and the network."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import pytest
from builders import ended
from fleets import MINUTE, Machine, Relay
from postgres import needs_postgres
from running import asked, until

from tokencore.sandbox import Sandbox

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fleets import Fleet

pytestmark = needs_postgres


@pytest.fixture
def kis() -> Iterator[Sandbox]:
    """KIS with a minute of half a second, and a tenth of a second to issue."""
    with Sandbox(issue_interval=MINUTE, latency=0.1) as running:
        yield running


def machines(fleet: Fleet, folder: Path, kis: Sandbox, count: int, **numbers: object) -> list[Machine]:
    """So many machines with nothing on them."""
    return [Machine(fleet, folder / f"machine-{number}", kis, **numbers) for number in range(count)]


def clean(kis: Sandbox, requests: int) -> None:
    """KIS was asked so often, refused nothing, and issued one token."""
    stats = kis.stats()
    assert (stats["token_requests"], stats["granted_new"], stats["refused"]) == (requests, 1, {})


@pytest.mark.parametrize("interval", [MINUTE, 0])
def test_eight_cold_machines_make_one_request(fleet: Fleet, tmp_path: Path, kis: Sandbox, interval: float) -> None:
    """Two processes on each; all get its token, each machine has it, also where no minute is kept between requests."""
    fleet_of = machines(fleet, tmp_path, kis, 8, issue_interval=interval)
    kis.set_rules(issue_interval=60)
    children = [machine.start() for machine in fleet_of for _ in range(2)]
    assert [ended(child) for child in children] == [0] * 16, list(tmp_path.glob("*/error"))
    assert {machine.got for machine in fleet_of} == {fleet_of[0].got} != {""}
    assert all(machine.store.saved(token) for machine in fleet_of if (token := fleet_of[0].store.read()[0]))
    clean(kis, 1)


class Fate(NamedTuple):
    """What befalls a machine at a point of its renewal, and how many requests that makes."""

    at: str
    fault: int  # a signal; 0: it loses the store
    requests: int


FATES = [
    Fate("begun", signal.SIGKILL, 1),
    Fate("departed", signal.SIGKILL, 1),
    Fate("answered", signal.SIGKILL, 2),
    Fate("begun", signal.SIGSTOP, 1),
    Fate("answered", signal.SIGSTOP, 2),
    Fate("begun", 0, 1),
    Fate("departed", 0, 2),
    Fate("answered", 0, 2),
]


def test_whatever_befalls_the_machine_that_renews_the_others_get_the_same_token(fleet: Fleet, tmp_path: Path) -> None:
    """Killed, stopped past its time, or cut off, before its request, amid it, or before its token is saved.

    A second request is made where nobody can know of the first one's answer, after KIS's minute; it brings the same
    token. One that was stopped takes the others' token when it goes on; nothing is refused.
    """
    with ThreadPoolExecutor(len(FATES)) as pool:
        list(pool.map(lambda number: outlive(fleet, tmp_path / str(number), FATES[number]), range(len(FATES))))


def outlive(fleet: Fleet, folder: Path, fate: Fate) -> None:
    """Three machines, one of which meets its fate."""
    with Sandbox(issue_interval=MINUTE) as kis, Relay(fleet.server.port) as relay:
        victim = Machine(fleet.behind(relay), folder / "victim", kis)
        victim.store.at, victim.store.fault = fate.at, fate.fault
        child = victim.start()
        if fate.fault:
            status = os.waitpid(child, os.WUNTRACED)[1]
            assert os.WIFSTOPPED(status) or os.WIFSIGNALED(status)
        else:
            until((victim.folder / "reached").exists)
            relay.freeze()
            (victim.folder / "go").touch()
        others = machines(fleet, folder, kis, 2)
        assert [ended(one) for one in [other.start() for other in others]] == [0, 0], fate
        if fate.fault == signal.SIGSTOP:
            os.kill(child, signal.SIGCONT)
        if fate.fault != signal.SIGKILL:
            code = ended(child)
            assert (code, victim.got) == ((0, others[0].got) if fate.fault or fate.at != "begun" else (1, "")), fate
        assert {other.got for other in others} == {others[0].got} != {""}
        clean(kis, fate.requests)
