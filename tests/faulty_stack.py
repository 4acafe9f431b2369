"""A running system to be hurt: a key of its own for each case, runs that are watched and killed amid an issue."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from zoneinfo import ZoneInfo

import requests
from running import until
from stacks import MARK, SLOW

from flows.stack.leftovers import POOL
from flows.stack.server import FINAL
from tokencore import sessions
from tokencore.sandbox import APP_SECRET

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from stacks import Up

LATENCY = 30.0  # seconds that KIS takes to answer where a fault is to come between request and answer
BOTH = 2


class Run(NamedTuple):
    """A flow run as the page shows it: state, message, and the process that works on it."""

    kind: str
    name: str
    message: str
    process: int


class Case(NamedTuple):
    """The market `kr` with a key of its own, whose exchange opens in 40 minutes: a warm-up has something to do.

    Attributes:
        up: the running system.
        exchange: what the market trades.
        before: how many requests KIS has had before this case.
        told: how many messages Slack has had before this case.
        seed: what makes its keys its own.
        settings: the lines of the config file that do not change.

    """

    up: Up
    exchange: str
    before: int
    told: int
    seed: str
    settings: list[str]

    @classmethod
    def begun(cls, up: Up, minute: float) -> Case:
        """With so many seconds as KIS's minute."""
        until(lambda: not _checks(up), SLOW)  # the one that makes a sleep good would ask for this case's key
        exchange, hours = _hours(timedelta(minutes=40))
        up.gateway.set_rules(issue_interval=minute, latency=0)
        lines = [f"issue_interval = {minute}", f"exchanges.{exchange}.hours = {{{hours}}}"]
        case = cls(up, exchange, len(up.gateway.stats()["requests"]), len(up.slack.told), uuid.uuid4().hex, lines)
        case.trade("kr")
        return case

    def trade(self, *markets: str) -> None:
        """Let these and no others trade the exchange, each with its own key; a run reads the settings as it starts."""
        others = {"us", "kr", "hk"}.difference(markets)
        lines = [*self.settings, *(f"markets.{name}.exchanges = []" for name in others)]
        for market in markets:
            lines += [f'markets.{market}.app_key = "PS{market}{self.seed}"']
            lines += [
                f'markets.{market}.app_secret = "{APP_SECRET}"',
                f'markets.{market}.exchanges = "{self.exchange}"',
            ]
        file = self.up.place.home / ".tokencore" / "config.toml"
        file.parent.mkdir(exist_ok=True)
        file.write_text("\n".join(lines))

    @staticmethod
    def over(up: Up) -> None:
        """Settings, gateway and the shared token folder as other tests expect them."""
        (up.place.home / ".tokencore" / "config.toml").unlink()
        for name in ("kr_api_token.json", "kr_token_issued_at.dat", "incidents.json"):
            (up.folder.parent / name).unlink(missing_ok=True)
        up.gateway.clear()
        up.gateway.set_rules(issue_interval=60, latency=0)
        up.slack.answers.clear()
        up.slack.retry_after = 1

    def warm_up(self) -> str:
        """A new run of the exchange's warm-up; its id."""
        return created(self.up, f"warm-up/{self.exchange}")

    def requests(self) -> list[str]:
        """How KIS answered this case's requests, in their order."""
        return [str(one["outcome"]) for one in self.up.gateway.stats()["requests"][self.before :]]

    def messages(self) -> str:
        """What Slack was told."""
        return "\n".join(str(message["text"]) for message in self.up.slack.told[self.told :])

    def amid_issue(self, latency: float = LATENCY) -> str:
        """A warm-up that KIS has granted a token, but whose answer is on its way for so long; its id."""
        self.up.gateway.set_rules(latency=latency)
        run = self.warm_up()
        until(lambda: len(self.requests()) > 0 or look(self.up, run).kind in FINAL, SLOW)
        assert self.requests(), look(self.up, run)  # to look is no part of it: a busy server may take as long as KIS
        self.up.gateway.set_rules(latency=0)
        return run


def _checks(up: Up) -> list[object]:
    """The runs of `check_tokens` that are due or at work."""
    due: dict[str, object] = {"state": {"type": {"any_": ["SCHEDULED", "PENDING", "RUNNING"]}}}
    due |= {"expected_start_time": {"before_": datetime.now(UTC).isoformat()}}
    found: list[object] = up.api(
        "POST", "flow_runs/filter", {"flows": {"name": {"any_": ["check-tokens"]}}, "flow_runs": due}
    ).json()
    return found


def _hours(ahead: timedelta) -> tuple[str, str]:
    """An exchange, and the setting by which it opens so long from now for an hour; never both are near midnight."""
    now = datetime.now(UTC)
    for code in ("KRX", "NASD"):
        zone = ZoneInfo(sessions.exchange(code).zone)
        first, last = ((now + one).astimezone(zone) for one in (ahead, ahead + timedelta(hours=1)))
        if first.date() == last.date() == now.astimezone(zone).date():
            break
    return code, f'"{first:%Y-%m-%d}" = "{first:%H:%M:%S}-{last:%H:%M:%S}"'


def ask(up: Up, method: str, path: str, content: object = None) -> dict[str, Any]:
    """What the server answers once it does: hurt, or with SQLite's lock taken, it stands still for a minute or more."""
    give_up, last = time.monotonic() + SLOW, ""
    while time.monotonic() < give_up:
        try:
            answer = up.api(method, path, content)
        except requests.ConnectionError as error:
            last = str(error)
        else:
            if answer.ok:
                found: dict[str, Any] = answer.json()
                return found
            last = answer.text
        time.sleep(1)
    raise AssertionError(last)


def created(up: Up, deployment: str, **content: object) -> str:
    """A new run of the deployment, one however often it has to be asked for; its id."""
    found = ask(up, "GET", f"deployments/name/{deployment}")["id"]
    once = {"idempotency_key": uuid.uuid4().hex}
    number: str = ask(up, "POST", f"deployments/{found}/create_flow_run", content | once)["id"]
    return number


def look(up: Up, run: str) -> Run:
    """How a run is."""
    found = ask(up, "GET", f"flow_runs/{run}")
    state = found["state"] or {"type": "", "name": "", "message": ""}
    return Run(state["type"], state["name"], state["message"] or "", int(found["infrastructure_pid"] or 0))


def end(up: Up, run: str, within: float = SLOW) -> Run:
    """How it ended."""
    until(lambda: look(up, run).kind in FINAL, within)
    return look(up, run)


def get(up: Up, *options: str) -> str:
    """The token of `kr` as any other program of this machine gets it; empty where it gets none."""
    command = [sys.executable, "-m", "tokencore", "get", "kr", *options]
    done = subprocess.run(
        command, cwd=up.place.work, env=up.place.environment, timeout=SLOW, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def cached(up: Up) -> str:
    """The same without a request to KIS."""
    return get(up, "--no-renew")


def processes(up: Up) -> list[int]:
    """All that came from the stack, runs and their supervisor included."""
    mark = up.place.environment[MARK].encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if mark in (process / "environ").read_bytes():
                found.append(int(process.name))
    return found


@contextlib.contextmanager
def second_worker(up: Up) -> Iterator[None]:
    """One more worker of the pool, as on another machine that shares the token folder."""
    first = Path(f"/proc/{up.processes()['worker']}/environ").read_bytes().decode()
    environment = dict(pair.split("=", 1) for pair in first.split("\0") if pair)
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL, "--type", "process"]
    with subprocess.Popen([*command, "--name", "second"], env=environment, cwd=up.folder) as worker:
        until(lambda: len(_online(up)) == BOTH, SLOW)
        yield
        worker.kill()


def _online(up: Up) -> list[str]:
    workers = up.api("POST", f"work_pools/{POOL}/workers/filter", {}).json()
    return [one["name"] for one in workers if one["status"] == "ONLINE"]


@contextlib.contextmanager
def asleep(up: Up) -> Iterator[None]:
    """All of its processes stand still, as in a sleep of the machine."""
    stopped = processes(up)
    kill(stopped, signal.SIGSTOP)
    try:
        yield
    finally:
        kill(stopped, signal.SIGCONT)


def kill(processes: Iterable[int], number: signal.Signals = signal.SIGKILL) -> None:
    """Send all of them a signal."""
    for process in processes:
        os.kill(process, number)
