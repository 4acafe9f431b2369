"""The same on PostgreSQL, with two workers: `make fleet`, as it takes minutes and Debian's package postgresql."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from postgres import PASSWORD, Postgres, needs_postgres
from running import asked, until
from stacks import KEYS, MARK, SLOW, Place, Up, always_open, environment_of, in_proc

from tokencore.sandbox import Sandbox

if TYPE_CHECKING:
    from collections.abc import Iterator

TEN = ("KRX", "NXT", "NYSE", "AMEX", "SEHK", "SHAA", "SZAA", "TKSE", "VNSE", "HASE")
pytestmark = [
    in_proc,
    needs_postgres,
    pytest.mark.skipif(not os.environ.get("TOKENCORE_FLEET"), reason="takes minutes: make fleet"),
]


class Two(NamedTuple):
    """A stack on PostgreSQL, and a second worker beside its own."""

    up: Up
    gateway: Sandbox
    second: subprocess.Popen[bytes]

    def warm_up(self, exchange: str) -> str:
        """Create a warm-up that is due now; its id."""
        return self.up.create(f"warm-up/{exchange}", parameters={"exchange": exchange})

    def ended(self, *numbers: str) -> list[dict[str, Any]]:
        """The runs, once none has anything left to do."""
        final = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
        until(lambda: all(self.up.state(number)[0] in final for number in numbers), SLOW)
        return [self.up.look(number) for number in numbers]

    def tokencore(self, *arguments: str) -> str:
        """What the command prints."""
        command, place = [sys.executable, "-m", "tokencore", *arguments], self.up.place
        return subprocess.check_output(command, env=place.environment, cwd=place.work, text=True)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    """Server, two workers, one key with KIS's own minute."""
    place = Place.made(tmp_path_factory.mktemp("postgres") / "stack")
    with Postgres() as server, Sandbox(issue_interval=60) as gateway:
        database = server.url(scheme="postgresql+asyncpg")
        settings = {"KIS_BASE_URL": gateway.url, "KIS_TOKEN_DIR": str(place.work / "tokens")}
        settings |= {"PREFECT_SERVER_DATABASE_CONNECTION_URL": database, **always_open("NASD", *TEN)}
        gateway.fail("limit", 1)  # so that the check of `up` gets no token
        place.dotenv(**KEYS, **settings, KIS_MARKETS__ALL__EXCHANGES=",".join(("NASD", *TEN)))
        yield from _with_second(place.up(), gateway)
        assert place.run("down") == (0, "Stopped.\n")
        assert place.living() == {}


def _with_second(up: Up, gateway: Sandbox) -> Iterator[Two]:
    environment = dict(one.split("=", 1) for one in environment_of(up.processes()["worker"]) if one)
    assert MARK in environment
    command = [sys.executable, "-m", "prefect", "worker", "start", "-p", "tokens", "-t", "process", "-n", "second"]
    with (up.folder / "second.log").open("wb") as log:
        second = subprocess.Popen(command, env=environment, cwd=up.folder, stdout=log, stderr=log)
    try:
        until(lambda: b"started!" in (up.folder / "second.log").read_bytes(), SLOW)
        yield Two(up, gateway, second)
    finally:
        second.terminate()
        second.wait(60)


def test_the_work_of_a_killed_worker_is_finished_by_the_other(two: Two) -> None:
    """SIGKILL of worker and run during a renewal: the other worker's run has a token by one more request."""
    before = asked(two.gateway)
    two.gateway.set_rules(latency=15)
    first = two.warm_up("NASD")
    until(lambda: asked(two.gateway) == before + 1, SLOW)
    was_second = f"submitting flow run '{first}'" in (two.up.folder / "second.log").read_text()
    os.kill(two.second.pid if was_second else two.up.processes()["worker"], signal.SIGKILL)
    os.kill(int(two.up.look(first)["infrastructure_pid"]), signal.SIGKILL)
    two.gateway.set_rules(latency=0)
    (other,) = two.ended(two.warm_up("NYSE"))
    assert (other["state"]["type"], other["state"]["name"]) == ("COMPLETED", "Renewed")
    assert asked(two.gateway) <= before + 2
    times = [datetime.fromisoformat(one["at"]) for one in json.loads(two.tokencore("history", "us", "--json"))]
    assert times[-1] - times[-2] >= timedelta(seconds=60)


def test_ten_warm_ups_in_one_minute_make_one_request(two: Two) -> None:
    """Ten deployments due at once, one key, the limit on: one request, ten `Completed` runs, each run once."""
    for market in ("us", "kr", "all"):
        two.tokencore("delete", market)
    before = asked(two.gateway)
    runs = two.ended(*[two.warm_up(code) for code in TEN])
    assert [(run["state"]["type"], run["run_count"]) for run in runs] == [("COMPLETED", 1)] * 10
    assert asked(two.gateway) == before + 1


def test_the_databases_password_is_told_nowhere(two: Two) -> None:
    """Not in the stack's files, not on a command line; the runs' environment has no use for it."""
    stored = {path: path.read_bytes() for path in two.up.folder.rglob("*") if path.is_file()}
    assert [path for path, content in stored.items() if PASSWORD.encode() in content] == []
    assert not any(PASSWORD in line for line in two.up.place.living().values())
    assert not any(PASSWORD in one for one in environment_of(two.up.processes()["worker"]))
