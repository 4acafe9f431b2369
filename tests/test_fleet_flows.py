"""The flows of machines that share a store: they alert once; and all of it played on this machine, `make fleet`.

Each machine has its own home, token directory and follower; the play takes minutes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, NamedTuple
from zoneinfo import ZoneInfo

import pytest
from cryptography.fernet import Fernet
from postgres import PASSWORD, needs_postgres
from running import asked, start, until
from servers import HOOK, SlackEndpoint
from stacks import KEYS, MARK, ROOT, SLOW, Place, Up, always_open, environment_of

from tokencore.sandbox import Sandbox

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from postgres import Postgres

pytestmark = needs_postgres
played = pytest.mark.skipif(not os.environ.get("TOKENCORE_FLEET"), reason="minutes: make fleet")
NAMES, BOTS = ("first", "second"), 4  # so many bots on each machine
OLD, LEFT = 7 * 3600, 3000  # seconds: a token so old that KIS issues another one, and too short for the session
MINUTE, SIX_HOURS = 5, 21_600  # seconds: KIS's, the first one shortened
IN_FLIGHT = 25  # seconds: 2.5 times KIS_TIMEOUT, in which a request without an outcome keeps all machines away
FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
REPORT = """
import json, os, sys
os.environ |= json.loads(sys.argv[1])
from datetime import UTC, datetime
from flows import alerts
from tokencore import CredentialsError, Settings
settings = Settings.load()
print("ready", flush=True)
for line in sys.stdin:
    if line == "broken\\n":
        error = CredentialsError("KIS does not know the app key (EGW00103).")
        alerts.report(settings, "KRX", error, datetime.now(UTC))
    else:
        alerts.resolved(settings, "KRX", datetime.now(UTC))
    print("done", flush=True)
"""
BOT = """
import hashlib, time
from tokencore import TokenError, USTokenManager
manager, seen = USTokenManager(), ""
while True:
    began = time.time()
    try:
        found = hashlib.sha256(manager.get_valid_token().encode()).hexdigest()
    except TokenError as error:
        found = type(error).__name__
    if found != seen:
        print(began, time.time() - began, found, flush=True)
    seen = found
    time.sleep(0.05)
"""
SEED = f"""
import sys
sys.path.append("{ROOT / "tests"}")
from builders import make_token
from tokencore import USTokenManager
USTokenManager().save_token(make_token({OLD + LEFT}, age={OLD}))
"""


@pytest.fixture(scope="module")
def slack() -> Iterator[SlackEndpoint]:
    """The Slack that all machines alert."""
    with SlackEndpoint() as running:
        yield running


@pytest.fixture(scope="module")
def store(postgres: Postgres, slack: SlackEndpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What all machines are told, with a store as docs/fleet.md has it made: the owner's tables, the role's rights."""
    owner = Place.made(tmp_path_factory.mktemp("owner"), KIS_STORE=postgres.url("tokencore"))
    postgres.sql("CREATE DATABASE tokencore", "CREATE DATABASE prefect")
    rights = run(owner, "-m", "tokencore", "fleet", "init", "--role", "keeper")
    postgres.sql(rights, f"ALTER ROLE keeper PASSWORD '{PASSWORD}'", database="tokencore")
    key = Fernet.generate_key().decode()
    webhook = {"SLACK_WEBHOOK_URL": slack.url + HOOK}
    return {**KEYS, "KIS_STORE": postgres.url("tokencore", "keeper"), "KIS_STORE_KEYS": key, **webhook}


def test_machines_that_meet_the_same_trouble_alert_once(
    store: dict[str, str], slack: SlackEndpoint, tmp_path: Path
) -> None:
    """Three machines report it at the same moment, then that it is over: one alert, and one message of recovery."""
    own = [json.dumps({**store, "KIS_TOKEN_DIR": str(tmp_path / str(number))}) for number in range(3)]
    started = [start(REPORT, settings) for settings in own]
    for what, answer, expected in (("", "ready", 0), *[("broken", "done", 1)] * 2, *[("well", "done", 2)] * 2):
        for one in started:
            print(what, file=one.stdin, flush=True, end="\n" if what else "")
        assert [one.stdout and one.stdout.readline() for one in started] == [f"{answer}\n"] * 3
        assert len(slack.messages) == expected
    assert sum("KIS refuses the app key" in one.communicate()[1] for one in started) == 1
    assert "KRX" in slack.headlines[0]
    slack.messages.clear()


class Machines(NamedTuple):
    """Two machines: the first with Prefect's server and a worker, the second with a worker; bots on both."""

    up: Up
    second: Place
    worker: subprocess.Popen[bytes]
    gateway: Sandbox
    bots: dict[Path, subprocess.Popen[bytes]]
    table: list[tuple[object, ...]]

    def delete(self) -> None:
        """Take the token away from all machines."""
        for market in ("us", "kr"):
            run(self.second, "-m", "tokencore", "delete", market)

    def begin(self, machine: str, deployment: str, **parameters: object) -> str:
        """A run that this machine's worker has started, as the other's stands still; its id."""
        other = self.worker.pid if machine == "first" else self.up.processes()["worker"]
        os.kill(other, signal.SIGSTOP)
        try:
            made = self.up.create(deployment, parameters=parameters)
            until(lambda: bool(self.up.look(made)["infrastructure_pid"]), SLOW)
        finally:
            os.kill(other, signal.SIGCONT)
        return made

    def end(self, made: str) -> tuple[str, str]:
        """Type and name of the state that a run ends in."""
        until(lambda: self.up.state(made)[0] in FINAL, 2 * SLOW)
        return self.up.state(made)

    def seen(self) -> list[list[tuple[float, float, str]]]:
        """What each bot had: since when, after how long a call, and the token's digest or the error's name."""
        lines = [[line.split() for line in bot.read_text().splitlines()] for bot in self.bots]
        return [[(float(at), float(took), what) for at, took, what in bot] for bot in lines]

    def agreed(self) -> bool:
        """Whether all bots have the same."""
        return len({bot[-1][2] for bot in self.seen()}) == 1

    def row(self, what: str, requests: int, who: str, told: int) -> None:
        """Add to the table what happened, and how long after KIS's answer the last bot had the token."""
        last = max(bot[-1][0] + bot[-1][1] for bot in self.seen())
        since = self.gateway.stats()["requests"][-1]["at"]
        self.table.append((what, requests, who, f"{last - since:.1f} s", told))


def run(place: Place, *arguments: str) -> str:
    """What a Python program prints on that machine."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=place.environment, cwd=place.work, check=True, stdout=-1, text=True).stdout


@pytest.fixture(scope="module")
def machines(postgres: Postgres, store: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    """Bots without a token first, then Prefect as docs/fleet.md has it."""
    folder, started = tmp_path_factory.mktemp("fleet"), []
    places = {name: Place.made(folder / name, PYTHONUNBUFFERED="1") for name in NAMES}
    midnight = datetime.now(ZoneInfo("Asia/Seoul")).date() + timedelta(days=1)

    def launch(place: Place, name: str, *arguments: str, **settings: str) -> subprocess.Popen[bytes]:
        with (folder / name).open("wb") as log:
            command, environment = [sys.executable, *arguments], place.environment | settings
            started.append(subprocess.Popen(command, env=environment, cwd=place.work, stdout=log, stderr=log))
        return started[-1]

    with Sandbox(issue_interval=MINUTE) as gateway:
        for place in places.values():
            settings = {"KIS_BASE_URL": gateway.url, "KIS_TOKEN_DIR": str(place.work / "tokens"), **always_open("KRX")}
            settings |= {"KIS_ISSUE_INTERVAL": str(MINUTE), "KIS_MAX_ISSUES_PER_DAY": "9", "KIS_PROVE_TOKENS": "false"}
            settings |= {f"KIS_EXCHANGES__KRX__HOURS__{midnight}": "00:00-01:00"}
            database = postgres.url("prefect", scheme="postgresql+asyncpg")
            place.dotenv(**store, **settings, PREFECT_SERVER_DATABASE_CONNECTION_URL=database)
        try:
            for name, place in places.items():
                launch(place, f"{name} follow", "-m", "tokencore", "follow")
            names = [f"{name} {number}" for name in NAMES for number in range(BOTS)]
            bots = {folder / name: launch(places[name.split()[0]], name, "-c", BOT) for name in names}
            until(lambda: all(bot.stat().st_size for bot in bots), SLOW)
            up, second = places["first"].up(), places["second"]
            way = {"PREFECT_API_URL": f"{up.url}/api", "PREFECT_API_AUTH_STRING": up.password}
            way |= {"PREFECT_HOME": str(second.home), "TOKENCORE_FOLDER": str(second.work), "DO_NOT_TRACK": "1"}
            words = ["start", "--pool", "tokens", "--type", "process", "--name", "second"]
            worker = launch(second, "second worker", "-m", "prefect", "worker", *words, **way)
            until(lambda: "started!" in (folder / "second worker").read_text(), SLOW)
            yield Machines(up, second, worker, gateway, bots, [])
            assert places["first"].run("down") == (0, "Stopped.\n")
        finally:
            for one in started:
                one.terminate()
                one.wait(SLOW)
        assert [place.living() for place in places.values()] == [{}, {}]


@played
def test_what_both_workers_meet_is_one_alert_and_what_both_plan_is_one_run(
    machines: Machines, slack: SlackEndpoint
) -> None:
    """KIS refuses the app secret, whoever asks first: one request, one alert; a refresh ends it, which is told once.

    Before that all bots have the token of one request: neither `make up` nor the second worker asked for another. The
    database's password is in no file of the stack, on no command line, and not in the environment of a run.
    """
    assert (machines.agreed(), asked(machines.gateway)) == (True, 1)
    machines.row("eight bots start at once", 1, "a bot", 0)
    machines.gateway.fail("bad-secret")
    machines.delete()
    made = [machines.begin(name, "warm-up/KRX", exchange="KRX") for name in NAMES]
    assert [machines.end(one)[0] for one in made] == ["FAILED"] * 2
    assert (asked(machines.gateway), len(slack.messages)) == (2, 1)
    machines.gateway.clear()
    time.sleep(MINUTE)
    renewed = machines.begin("second", "refresh-token/refresh_token", market="us", operator="Kim")
    assert machines.end(renewed) == ("COMPLETED", "Renewed")
    made = [machines.begin(name, "check-tokens/check_tokens") for name in NAMES]
    given = environment_of(int(machines.up.look(made[0])["infrastructure_pid"]))
    assert (any(one.startswith(MARK) for one in given), any(PASSWORD in one for one in given)) == (True, False)
    assert [machines.end(one) for one in made] == [("COMPLETED", "AlreadyValid")] * 2
    until(machines.agreed, 10)
    machines.row("KIS refuses the app secret", 2, "second machine", len(slack.messages))
    assert (asked(machines.gateway), len(slack.messages)) == (3, 2)
    tags, waiting = {"all_": ["planned renewal"]}, {"type": {"any_": ["SCHEDULED"]}}
    planned = machines.up.api("POST", "flow_runs/filter", {"flow_runs": {"tags": tags, "state": waiting}}).json()
    published = machines.up.api("POST", "artifacts/latest/filter", {}).json()
    assert (len(planned), sorted(one["key"] for one in published)) == (1, ["plan", "tokens"])
    stored = {path: path.read_bytes() for path in machines.up.folder.rglob("*") if path.is_file()}
    assert [path for path, content in stored.items() if PASSWORD.encode() in content] == []
    assert not any(PASSWORD in line for line in machines.up.place.living().values())


@played
def test_a_renewal_whose_worker_is_killed_is_finished_by_the_other(
    machines: Machines, capsys: pytest.CaptureFixture[str]
) -> None:
    """One request more, once the lost one cannot be answered any more; meanwhile no bot waits or loses its token."""
    files = [place.work / "tokens" / "us_api_token.json" for place in (machines.up.place, machines.second)]
    for bot in machines.bots.values():  # they are to know no other token than an old one, which does not last
        bot.send_signal(signal.SIGSTOP)
    machines.delete()
    run(machines.second, "-c", SEED)
    until(lambda: len({file.exists() and json.loads(file.read_text())["access_token"] for file in files}) == 1)
    for bot in machines.bots.values():
        bot.send_signal(signal.SIGCONT)
    until(machines.agreed, 10)
    before, began = asked(machines.gateway), time.time()
    machines.gateway.set_rules(latency=15, same_token=0)  # it forgets the token that it gave the bots
    lost = machines.begin("second", "warm-up/KRX", exchange="KRX")
    until(lambda: asked(machines.gateway) == before + 1, SLOW)
    machines.worker.kill()
    os.kill(int(machines.up.look(lost)["infrastructure_pid"]), signal.SIGKILL)
    machines.gateway.set_rules(latency=0, same_token=SIX_HOURS)
    assert machines.end(machines.begin("first", "warm-up/KRX", exchange="KRX")) == ("COMPLETED", "Renewed")
    times = [one["at"] for one in machines.gateway.stats()["requests"]]
    assert len(times) == before + 2
    assert times[-1] - times[-2] >= IN_FLIGHT
    until(lambda: all(bot[-1][0] > times[-1] - 1 for bot in machines.seen()), 10)
    calls = [call for bot in machines.seen() for call in bot if call[0] > began]
    assert (len(calls), max(took for _, took, _ in calls) < 1) == (len(machines.bots), True)
    machines.row("the second machine's worker is killed", 2, "first machine", 0)
    with capsys.disabled():
        for row in (("what happens", "requests", "issued by", "seen everywhere after", "messages"), *machines.table):
            print("\n{:<38} {:>8}  {:<15} {:>21} {:>9}".format(*row), end="")
        print()
