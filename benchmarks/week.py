"""A week of ten bots in two minutes: how many requests to tokenP the bots of a real and a paper key cost.

Run `make bench`, or `python benchmarks/week.py`; it needs Linux (a full disk is simulated by a limit on the bots'
processes). A day is 16 s; a token's life, the six hours and the buffers shrink with it. Every bot is a process that
asks for quotes, and is killed and restarted at random; mojito2 and python-kis start every day alongside, with the
files exported to them. Then the same week is played with bots that use mojito2 instead, each in its own folder.
"""

from __future__ import annotations

import os
import random
import resource
import subprocess
import sys
import time
from collections import Counter
from datetime import timedelta
from functools import partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import requests
from clients import CLIENTS, issued, mojito2
from measuring import show

import tokencore
from tokencore import Key, KISAuth, Settings, TokenError
from tokencore.sandbox import APP_KEY, APP_SECRET, Sandbox

if TYPE_CHECKING:
    from collections.abc import Callable

    Days = list[Counter[str]]

DAY, AHEAD, MINUTE = 16, 2, 0.5  # seconds; AHEAD is the proactive window
LIFE, DAYS, RESTARTS = DAY + AHEAD, 7, 6  # a token's life in seconds; days in all; restarts of bots per day
KEYS = {"real": APP_KEY, "paper": APP_KEY[::-1]}
BOTS = [(key, market) for key in KEYS for market in ((f"{key}us",) * 3 + (f"{key}kr",) * 2)]
BESIDE = [("real", "mojito2"), ("real", "python-kis"), ("paper", "mojito2")]
HAPPENS = [  # what happens on each day, and how many new tokens each key then takes
    ("ten bots start at once, without a token", 1),
    ("the markets' files are removed", 1),
    ("`tokencore delete` of one of the key's two markets", 1),
    ("KIS withdraws the tokens", 2),
    ("a foreign program issues", 2),
    ("the disk is full over the renewal", 1),
    ("all files are removed, the record and the lock with them", 1),
]


class Week:
    """A week whose bots use `client`: their processes, their gateways, and the folder that is their home."""

    def __init__(self, home: str, client: str, gateways: dict[str, Sandbox]) -> None:
        """Start the bots, all at once."""
        self.home, self.client, self.gateways, self.room = Path(home), client, gateways, -1
        self.chance = random.Random(12)  # noqa: S311 - seeded, for the same restarts in every run
        self.told, self.tell = os.pipe()
        self.beside: list[subprocess.Popen[bytes]] = []
        self.bots = [self.start(number) for number in range(len(BOTS))]

    def play(self) -> tuple[dict[str, Days], Counter[str]]:
        """Play the week; return tokenP's outcomes by key and day, and how many of the bots' calls worked or failed."""
        while not all(gateway.stats()["requests"] for gateway in self.gateways.values()):
            time.sleep(0.01)
        began = time.time()
        for at, act in sorted(self.events(), key=lambda event: event[0]):
            time.sleep(max(0.0, began + at * DAY - time.time()))
            act()
        for bot in self.bots:
            bot.kill()
            bot.wait()
        assert not any(one.wait() for one in self.beside)
        days = {key: [Counter[str]() for _ in range(DAYS)] for key in KEYS}
        for key, gateway in self.gateways.items():
            for one in gateway.stats()["requests"]:
                days[key][int((one["at"] - began) / DAY + 0.1)][one["outcome"]] += 1  # a renewal may be a bit early
        return days, Counter(os.read(self.told, 1 << 20).decode())

    def events(self) -> list[tuple[float, Callable[[], object]]]:
        """Return what happens when, in days; renewals come as a day begins, and from the fourth on at 0.35 of it."""
        found: list[tuple[float, Callable[[], object]]] = [(DAYS - 0.15, lambda: None)]
        found += [(day + self.chance.random(), self.restart) for day in range(DAYS - 1) for _ in range(RESTARTS)]
        found += [(1.5, partial(self.remove, "*_api_token.json")), (6.48, partial(self.remove, "*"))]
        found += [(5.25, partial(self.fill, 0)), (5.55, partial(self.fill, -1))]
        for key, gateway in self.gateways.items():
            found += [(3.35, gateway.kill_tokens), (4.75, partial(self.run, key, __file__, "foreign"))]
            if self.client == "tokencore":
                found.append((2.5, partial(self.run, key, "-m", "tokencore", "delete", f"{key}us")))
                found += [(hour / 4 + 0.1, partial(self.run, key, __file__, "check")) for hour in range(DAYS * 4 - 1)]
                names = [name for name in CLIENTS if (key, name) in BESIDE]
                found += [(day + 0.7, partial(self.run, key, __file__, name)) for day in range(DAYS) for name in names]
        return found

    def start(self, number: int) -> subprocess.Popen[bytes]:
        """Start a bot; one with mojito2 gets a folder of its own."""
        key, market = BOTS[number]
        folder = self.home / key / ("" if self.client == "tokencore" else str(number))
        folder.mkdir(parents=True, exist_ok=True)
        bot = subprocess.Popen(
            [sys.executable, __file__, self.client, market], env=self.environment(key), cwd=folder, stdout=self.tell
        )
        resource.prlimit(bot.pid, resource.RLIMIT_FSIZE, (self.room, -1))
        return bot

    def restart(self) -> None:
        """Kill one of the bots and start it again."""
        number = self.chance.randrange(len(BOTS))
        self.bots[number].kill()
        self.bots[number].wait()
        self.bots[number] = self.start(number)

    def run(self, key: str, *words: str) -> None:
        """Start a program alongside the bots."""
        env, place = self.environment(key), self.home / key
        self.beside.append(subprocess.Popen([sys.executable, *words], env=env, cwd=place, stdout=subprocess.DEVNULL))

    def fill(self, room: int) -> None:
        """From now on, let no bot write files of more than `room` bytes; -1 lifts the limit."""
        self.room = room
        for bot in self.bots:
            resource.prlimit(bot.pid, resource.RLIMIT_FSIZE, (room, -1))

    def remove(self, names: str) -> None:
        """Delete these files in the token directory, and the bots' files of mojito2."""
        for path in [*(self.home / ".tokencore").glob(names), *self.home.glob("*/[0-9]/token.dat")]:
            path.unlink(missing_ok=True)

    def environment(self, key: str) -> dict[str, str]:
        """Return the environment of the processes of a key."""
        given = {name: value for name, value in os.environ.items() if not name.startswith(("KIS_", "SLACK_"))}
        given |= {"HOME": str(self.home), "PYTHONPATH": str(Path(tokencore.__file__).parents[1]), "KIS_TIMEOUT": "2"}
        given |= {"KIS_BUFFER": "0.5", "KIS_PROACTIVE_WINDOW": str(AHEAD), "KIS_ISSUE_INTERVAL": str(MINUTE)}
        given |= {"KIS_MAX_ISSUES_PER_DAY": "24", "KIS_HTS_ID": "benchmark", "KIS_ENVIRONMENT": key}
        given |= {"KIS_BASE_URL": self.gateways[key].url, "KIS_APP_KEY": KEYS[key], "KIS_APP_SECRET": APP_SECRET}
        names = [f"KIS_MARKETS__{key.upper()}{name}" for name in ("US", "KR")]
        given |= {f"{name}__EXCHANGES": "[]" for name in names}
        exports = ",".join(f"{name}:{self.home / key}" for owner, name in BESIDE if owner == key)
        return given | {f"{names[0]}__EXPORTS": exports}


class Mojito2(requests.auth.AuthBase):
    """Signs a bot's calls with mojito2; when a call fails, it deletes mojito2's file and starts again."""

    def __init__(self) -> None:
        """Create the client, which has no token yet."""
        self.get = mojito2()

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:  # noqa: D102 - as inherited
        signed = {"authorization": f"Bearer {self.get()}", "appkey": os.environ["KIS_APP_KEY"], "appsecret": APP_SECRET}
        request.headers.update(signed)
        request.hooks["response"].append(self._answered)
        return request

    def _answered(self, answer: requests.Response, **_: object) -> None:
        if not answer.ok:
            Path("token.dat").unlink(missing_ok=True)
            self.get = mojito2()


def bot(auth: requests.auth.AuthBase) -> None:
    """Ask for quotes in an endless loop; write a dot for each that succeeds and an x for each that fails."""
    url = os.environ["KIS_BASE_URL"] + "/uapi/domestic-stock/v1/quotations/inquire-price"
    with requests.Session() as session:
        while True:
            try:
                came = session.get(url, auth=auth, headers={"tr_id": "FHKST01010100"}, timeout=5).ok
            except (TokenError, KeyError, OSError):  # mojito2 raises KeyError when it is refused
                came = False
            os.write(1, b"." if came else b"x")
            time.sleep(random.uniform(0.1, 0.5))  # noqa: S311 - bots do not run in step


def beside(program: str) -> None:
    """Do what runs alongside the bots: the flows' hourly check, a foreign program, or a client with our file."""
    if program == "check":
        for key in Key.load(Settings.load()):
            key.sync_exports()
        return
    if program == "python-kis":  # scales its ten minutes to the short day
        held: Any = import_module("pykis.api.auth.token").KisAccessToken
        left = held.remaining.fget
        held.remaining = property(lambda token: left(token) * (timedelta(days=1) / timedelta(seconds=DAY)))
    assert issued() if program == "foreign" else CLIENTS[program]()()


def week(client: str) -> tuple[dict[str, Days], Counter[str]]:
    """Play a week with `client`; the results are those of `Week.play`."""
    sandbox = partial(Sandbox, token_life=LIFE, same_token=LIFE / 4, issue_interval=MINUTE)
    with TemporaryDirectory() as home, sandbox() as real, sandbox() as paper:
        return Week(home, client, {"real": real, "paper": paper}).play()


def main() -> None:
    """Play both weeks, one after the other, print the table, and check the number of new tokens."""
    (ours, calls), (theirs, their_calls) = week("tokencore"), week("mojito2")
    found = [(*(ours[key][day] for key in KEYS), theirs["real"][day] + theirs["paper"][day]) for day in range(DAYS)]
    rows = [[str(day), what, *map(shown, found[day - 1])] for day, (what, _) in enumerate(HAPPENS, 1)]
    rows.append(["", "the week", *(shown(sum(column, Counter())) for column in zip(*found, strict=True))])
    notes = [f"{name}: {one['x']} of {one.total()}" for name, one in [("tokencore", calls), ("mojito2", their_calls)]]
    show(
        "A week of ten bots: requests to tokenP = new + the same token again + refused",
        ["day", "what happens", "the real key", "the paper key", "mojito2, both keys"],
        rows,
        f"Calls that brought no quote, {', '.join(notes)}.",
    )
    for key in KEYS:
        assert [one["new"] for one in ours[key]] == [tokens for _, tokens in HAPPENS], key


def shown(found: Counter[str]) -> str:
    """Format the number of requests and their outcomes."""
    return f"{found.total()} = {found['new']} + {found['same']} + {found['EGW00133']}"


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["tokencore", market]:
            bot(KISAuth(market))
        case ["mojito2", _]:
            bot(Mojito2())
        case [program]:
            beside(program)
        case _:
            main()
