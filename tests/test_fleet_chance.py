"""Machines that share a key while chance kills and stops them and their server: 200 rounds in `make torture`."""

# ruff: noqa: S311 - draws of a game

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from builders import ended
from fleets import Fleet, Machine
from postgres import Postgres, needs_postgres
from stepping import FULL

from tokencore.sandbox import Sandbox

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [needs_postgres, pytest.mark.skipif(not FULL, reason="takes minutes: make torture")]
ROUNDS, AT_ONCE = 200, 8  # all that run at once share what befalls the server
MINUTE, TIMEOUT = 1.0, 1.0  # seconds: who sent and is not heard of for 2.5 is given up
BRIEF, LONG = 1.0, 4.0  # seconds for which a process stands still: wherever it is; where it has nothing to send
COUNT, PROCESSES = 4, 2  # machines, and programs on each


def test_whatever_chance_does_there_is_one_token_and_no_refusal(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Kills and stops at any time, a server that crashes or freezes: two requests at most for each that is killed.

    In the end all machines have the same token. A seed in the failure repeats the round's draws.
    """
    with Postgres() as server:
        fleet, requests = Fleet.made(server), Counter[int]()
        for first in range(0, ROUNDS, AT_ONCE):
            seeds = range(first, first + AT_ONCE)
            with ThreadPoolExecutor(AT_ONCE + 1) as pool:
                trouble = pool.submit(befall, server, random.Random(first))
                rounds = [pool.submit(play, fleet, tmp_path / str(seed), random.Random(seed)) for seed in seeds]
                trouble.result()
                stats = [one.result() for one in rounds]
            for seed, one in zip(seeds, stats, strict=True):
                assert (one["granted_new"], one["refused"]) == (1, {}), (seed, one)
                requests[one["token_requests"]] += 1
    record_property("cases", ROUNDS)
    print(f"Rounds by their requests: {dict(requests)}")


def test_more_machines_than_connections_are_served(tmp_path: Path) -> None:
    """A server with room for seven: each of 24 machines that come at once is served, by trying again."""
    with Postgres("max_connections=10") as server, Sandbox(issue_interval=60, latency=0.5) as kis:
        fleet = Fleet.made(server)
        server.sql("create role app login password 'CanaryPassword'", "grant all on all tables in schema public to app")
        fleet = fleet._replace(url=server.url(role="app"))  # superusers have connections of their own
        machines = [Machine(fleet, tmp_path / str(number), kis, issue_interval=60, timeout=10) for number in range(24)]
        assert [ended(child) for child in [machine.start() for machine in machines]] == [0] * 24
        assert {machine.got for machine in machines} == {machines[0].got}
        assert kis.stats()["token_requests"] == 1


def befall(server: Postgres, chance: random.Random) -> None:
    """What befalls the server in a round: nothing, a crash, or standing still."""
    time.sleep(chance.uniform(0, 1.5))
    match chance.choice(("nothing", "crash", "freeze")):
        case "crash":
            server.stop(signal.SIGQUIT)
            time.sleep(chance.uniform(0, 2))
            server.start()
        case "freeze":
            server.send(signal.SIGSTOP)
            time.sleep(chance.uniform(0.2, LONG))
            server.send(signal.SIGCONT)


def play(fleet: Fleet, folder: Path, chance: random.Random) -> dict[str, Any]:
    """A round: some machines want their first token at about the same time; what KIS has seen in the end."""
    with Sandbox(issue_interval=MINUTE, latency=chance.uniform(0, 0.4)) as kis:
        key = f"{folder.name:X<36}"  # a later round may have the port of an earlier one
        numbers: dict[str, Any] = {"key": key, "issue_interval": MINUTE, "timeout": TIMEOUT}
        machines = [Machine(fleet, folder / str(number), kis, **numbers) for number in range(COUNT)]
        with ThreadPoolExecutor(COUNT * PROCESSES) as pool:
            seeds = [chance.random() for _ in range(COUNT * PROCESSES)]
            list(pool.map(lambda n: live(machines[n % COUNT], random.Random(seeds[n])), range(len(seeds))))
        while {ended(machine.start()) for machine in machines} != {0}:  # where the store is away, each is refused
            pass
        tokens = {machine.got for machine in machines}
        assert len(tokens) == 1, tokens
        stats: dict[str, Any] = kis.stats()
        return stats


def live(machine: Machine, chance: random.Random) -> None:
    """A program on it, and what becomes of it."""
    time.sleep(chance.uniform(0, 0.3))
    fate = chance.choice(("none", "none", "none", "kill", "stop", "kill at", "stop at"))
    points = {"stop at": ("begun", "answered"), "kill at": ("begun", "departed", "answered")}.get(fate, ("",))
    child = machine.start(chance.choice(points), signal.SIGSTOP if fate == "stop at" else signal.SIGKILL)
    if fate in ("kill", "stop"):
        time.sleep(chance.uniform(0, 1))
        os.kill(child, signal.SIGKILL if fate == "kill" else signal.SIGSTOP)
    while os.WIFSTOPPED(os.waitpid(child, os.WUNTRACED)[1]):
        time.sleep(chance.uniform(0.1, BRIEF) if fate == "stop" else chance.uniform(0.5, LONG))
        os.kill(child, signal.SIGCONT)
