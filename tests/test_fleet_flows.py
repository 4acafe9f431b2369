"""A fleet simulated on this machine (`make fleet`): two machines with bots, follower and worker, and their own homes.

It takes minutes and ends with a table. Its tests depend on their order.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple
from zoneinfo import ZoneInfo

import pytest
from cryptography.fernet import Fernet
from postgres import PASSWORD, Postgres, needs_postgres
from running import asked, until
from servers import HOOK, SlackEndpoint
from stacks import KEYS, MARK, ROOT, SLOW, Place, Up, always_open, environment_of

from tokencore.sandbox import Sandbox

played = pytest.mark.skipif(not os.environ.get("TOKENCORE_FLEET"), reason="takes minutes: make fleet")
pytestmark = [needs_postgres, played]
NAMES, BOTS = ("first", "second"), 4  # bots on each machine
OLD, LEFT = 7 * 3600, 3000  # seconds: an age at which KIS issues another token, and a rest too short for the session
MINUTE, SIX_HOURS = 5, 21_600  # seconds: KIS's rules, with a shorter minute
IN_FLIGHT = 25  # seconds, 2.5 times KIS_TIMEOUT, for which a request without an outcome stops all others
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


class Machines(NamedTuple):
    """Two machines with bots: the first also has Prefect's server and a worker, the second a worker."""

    up: Up
    second: Place
    worker: subprocess.Popen[bytes]
    gateway: Sandbox
    slack: SlackEndpoint
    bots: dict[Path, subprocess.Popen[bytes]]
    table: list[tuple[object, ...]]

    def delete(self) -> None:
        """Delete the token on all machines."""
        for market in ("us", "kr"):
            run(self.second, "-m", "tokencore", "delete", market)

    def begin(self, machine: str, deployment: str, **parameters: object) -> str:
        """Create a run that this machine's worker starts, by stopping the other one meanwhile; return its id."""
        other = self.worker.pid if machine == "first" else self.up.processes()["worker"]
        os.kill(other, signal.SIGSTOP)
        try:
            made = self.up.create(deployment, parameters=parameters)
            until(lambda: bool(self.up.look(made)["infrastructure_pid"]), SLOW)
        finally:
            os.kill(other, signal.SIGCONT)
        return made

    def end(self, made: str) -> str:
        """Wait for a run's end and return the name of its final state."""
        until(lambda: self.up.state(made)[0] in ("COMPLETED", "FAILED", "CRASHED"), 2 * SLOW)
        return self.up.state(made)[1]

    def seen(self) -> list[list[tuple[float, float, str]]]:
        """Return what each bot got: when its call began, its duration, and the token's digest or the error's name."""
        lines = [[line.split() for line in bot.read_text().splitlines()] for bot in self.bots]
        return [[(float(at), float(took), what) for at, took, what in bot] for bot in lines]

    def note(self, what: str) -> None:
        """Once all bots have the same token, add a row: what happened, and how long after KIS's answer that was."""
        until(lambda: len({bot[-1][2] for bot in self.seen()}) == 1, 10)
        last, requests = max(bot[-1][0] + bot[-1][1] for bot in self.seen()), self.gateway.stats()["requests"]
        self.table.append((what, len(requests), f"{last - requests[-1]['at']:.1f} s", len(self.slack.messages)))


def run(place: Place, *arguments: str) -> str:
    """Run a Python program on that machine and return what it prints."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=place.environment, cwd=place.work, check=True, stdout=-1, text=True).stdout


def settings(postgres: Postgres, folder: Path) -> dict[str, str]:
    """Return the machines' common settings, with a store as in docs/fleet.md: the owner's tables, a role's rights."""
    postgres.sql("CREATE DATABASE tokencore", "CREATE DATABASE prefect")
    owner = Place.made(folder, KIS_STORE=postgres.url("tokencore"))
    rights = run(owner, "-m", "tokencore", "fleet", "init", "--role", "keeper")
    postgres.sql(rights, f"ALTER ROLE keeper PASSWORD '{PASSWORD}'", database="tokencore")
    midnight = datetime.now(ZoneInfo("Asia/Seoul")).date() + timedelta(days=1)
    return {
        **KEYS,
        **always_open("KRX"),
        f"KIS_EXCHANGES__KRX__HOURS__{midnight}": "00:00-01:00",
        "KIS_ISSUE_INTERVAL": str(MINUTE),
        "KIS_MAX_ISSUES_PER_DAY": "9",
        "KIS_PROVE_TOKENS": "false",
        "KIS_STORE": postgres.url("tokencore", "keeper"),
        "KIS_STORE_KEYS": Fernet.generate_key().decode(),
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": postgres.url("prefect", scheme="postgresql+asyncpg"),
    }


@pytest.fixture(scope="module")
def machines(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    """Start bots without a token, then Prefect as in docs/fleet.md."""
    folder, started = tmp_path_factory.mktemp("fleet"), []
    told = settings(postgres, folder / "owner")
    places = {name: Place.made(folder / name, PYTHONUNBUFFERED="1") for name in NAMES}

    def launch(place: Place, name: str, *arguments: str, **more: str) -> subprocess.Popen[bytes]:
        with (folder / name).open("wb") as log:
            command, environment = [sys.executable, *arguments], place.environment | more
            started.append(subprocess.Popen(command, env=environment, cwd=place.work, stdout=log, stderr=log))
        return started[-1]

    with Sandbox(issue_interval=MINUTE) as gateway, SlackEndpoint() as slack:
        for place in places.values():
            own = {"KIS_BASE_URL": gateway.url, "KIS_TOKEN_DIR": str(place.work / "tokens")}
            place.dotenv(**told, **own, SLACK_WEBHOOK_URL=slack.url + HOOK)
        try:
            for name, place in places.items():
                launch(place, f"{name} follow", "-m", "tokencore", "follow")
            names = [f"{name} {number}" for name in NAMES for number in range(BOTS)]
            bots = {folder / name: launch(places[name.split()[0]], name, "-c", BOT) for name in names}
            until(lambda: all(bot.stat().st_size for bot in bots), SLOW)
            up, second = places["first"].up(), places["second"]
            way = {"PREFECT_API_URL": f"{up.url}/api", "PREFECT_API_AUTH_STRING": up.password}
            way |= {"PREFECT_HOME": str(second.home), "TOKENCORE_FOLDER": str(second.work), "DO_NOT_TRACK": "1"}
            pool = ("--pool", "tokens", "--type", "process", "--name", "second")
            worker = launch(second, "second worker", "-m", "flows.stack.prefect_worker", *pool, **way)
            until(lambda: "started!" in (folder / "second worker").read_text(), SLOW)
            yield Machines(up, second, worker, gateway, slack, bots, [])
            assert places["first"].run("down") == (0, "Stopped.\n")
        finally:
            for one in started:
                one.send_signal(signal.SIGCONT)  # a failed test may have left it stopped
                one.terminate()
                one.wait(SLOW)
        assert [place.living() for place in places.values()] == [{}, {}]


def test_what_both_workers_meet_is_one_alert_and_what_both_plan_is_one_run(machines: Machines) -> None:
    """If KIS refuses the app secret, both workers make one request and one alert; a refresh's success is told once."""
    machines.note("eight bots start at once")
    assert asked(machines.gateway) == 1  # for all bots; neither `make up` nor the second worker made another
    machines.gateway.fail("bad-secret")
    machines.delete()
    made = [machines.begin(name, "warm-up/KRX", exchange="KRX") for name in NAMES]
    assert [machines.end(one) for one in made] == ["Failed"] * 2
    assert (asked(machines.gateway), len(machines.slack.messages)) == (2, 1)
    machines.gateway.clear()
    time.sleep(MINUTE)
    by_hand = machines.begin("second", "refresh-token/refresh_token", market="us", operator="Kim")
    assert machines.end(by_hand) == "Renewed"
    made = [machines.begin(name, "check-tokens/check_tokens") for name in NAMES]
    given = environment_of(int(machines.up.look(made[0])["infrastructure_pid"]))  # the store's password is not in it
    assert (any(one.startswith(MARK) for one in given), any(PASSWORD in one for one in given)) == (True, False)
    assert [machines.end(one) for one in made] == ["AlreadyValid"] * 2
    machines.note("KIS refuses the app secret")
    assert (asked(machines.gateway), len(machines.slack.messages)) == (3, 2)
    tags, waiting = {"all_": ["planned renewal"]}, {"type": {"any_": ["SCHEDULED"]}}
    planned = machines.up.api("POST", "flow_runs/filter", {"flow_runs": {"tags": tags, "state": waiting}}).json()
    published = machines.up.api("POST", "artifacts/latest/filter", {}).json()
    assert (len(planned), sorted(one["key"] for one in published)) == (1, ["plan", "tokens"])
    stored = {path: path.read_bytes() for path in machines.up.folder.rglob("*") if path.is_file()}
    assert [path for path, content in stored.items() if PASSWORD.encode() in content] == []
    assert not any(PASSWORD in line for line in machines.up.place.living().values())


def test_a_renewal_whose_worker_is_killed_is_finished_by_the_other(
    machines: Machines, capsys: pytest.CaptureFixture[str]
) -> None:
    """A killed renewal costs one more request, once its own can have no answer; no bot waits or loses its token."""
    files = [place.work / "tokens" / "us_api_token.json" for place in (machines.up.place, machines.second)]
    for bot in machines.bots.values():  # so that they only ever see an old token, which does not last
        bot.send_signal(signal.SIGSTOP)
    had = {bot[-1][2] for bot in machines.seen()}
    machines.delete()
    run(machines.second, "-c", SEED)
    until(lambda: len({file.exists() and json.loads(file.read_text())["access_token"] for file in files}) == 1)
    for bot in machines.bots.values():
        bot.send_signal(signal.SIGCONT)
    until(lambda: had.isdisjoint({bot[-1][2] for bot in machines.seen()}), 10)
    before, began = asked(machines.gateway), time.time()
    machines.gateway.set_rules(latency=15, same_token=0)  # it forgets the token that it gave the bots
    lost = machines.begin("second", "warm-up/KRX", exchange="KRX")
    until(lambda: asked(machines.gateway) == before + 1, SLOW)
    machines.worker.kill()
    os.kill(int(machines.up.look(lost)["infrastructure_pid"]), signal.SIGKILL)
    machines.gateway.set_rules(latency=0, same_token=SIX_HOURS)
    assert machines.end(machines.begin("first", "warm-up/KRX", exchange="KRX")) == "Renewed"
    times = [one["at"] for one in machines.gateway.stats()["requests"]]
    assert (len(times), times[-1] - times[-2] >= IN_FLIGHT) == (before + 2, True)
    until(lambda: all(bot[-1][0] > times[-1] - 1 for bot in machines.seen()), 10)
    calls = [call for bot in machines.seen() for call in bot if call[0] > began]
    assert (len(calls), max(took for _, took, _ in calls) < 1) == (len(machines.bots), True)
    machines.note("the second machine's worker is killed")
    with capsys.disabled():
        head = ("what has happened", "requests so far", "seen everywhere after", "messages so far")
        for row in (head, *machines.table):
            print("\n{:<38} {:>15}  {:>21}  {:>15}".format(*row), end="")
        print()
