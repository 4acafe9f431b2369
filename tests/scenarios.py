"""What a fault can hit: a key with its folder and its requests, and the renewals that begin from each state."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import stat
import tempfile
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
from builders import forms
from stepping import START, Asked, Clock, Kis, Stepped, as_user, command, preload, settings

from tokencore.sandbox import APP_SECRET
from tokencore.sandbox_http import Handler

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Self

    from running import Ran

FULL = "TORTURE" in os.environ  # every case; otherwise a part of them that changes with each fault class
long = pytest.mark.skipif(not FULL, reason="takes minutes: make torture")
HOUR, DAY = 3600.0, 86_400.0
MINUTE = 60.0  # of KIS, which the test's clock makes short
MARKETS = ("us", "kr")
SPACE = ("write", "mkdir", "fsync")
TOKENS = ("_api_token.json", ".aside")  # of names of files that may hold a token
ENDS = ("_api_token.json", "_token_issued_at.dat", ".lock", ".jsonl", ".aside")  # of names that may stay
_keys = itertools.count(1)


class Desk:
    """One key of its own in a folder of its own, for two markets, and what KIS saw of it."""

    def __init__(self, kis: Kis, clock: Clock, base: Path) -> None:
        """Take a new key and name the folder; the product makes it."""
        self.key = f"PSfault{next(_keys):029d}"
        self.folder = base / f"desk-{self.key[-5:]}" / "tokens"
        clock.set(START)
        self.clock = clock
        self._kis = kis
        self.user = 0  # who runs the commands, where it is not the one who runs the tests
        self._started: list[Stepped] = []
        self._secrets = forms(self.key) | forms(APP_SECRET) | {b"eyJ"}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for process in self._started:
            if process.at is not None:
                process.kill()
        assert kind or not self._leaks(), "\n".join(self._leaks())

    def _leaks(self) -> list[str]:
        """What its commands wrote and should not have; a token is for standard output, alone."""
        said = [process.ran.err for process in self._started]
        said += [process.ran.out for process in self._started if not process.ran.out.startswith("eyJ")]
        return [text for text in said if self.finds_secret(text.encode())]

    def finds_secret(self, content: bytes) -> bool:
        """Whether the app key, its secret or a token is in there, in whichever dress."""
        return any(form in content for form in self._secrets)

    def start(self, *arguments: str, first: Callable[[], None] | None = None, **variables: str) -> Stepped:
        """A command in a process of its own, before its first call, with environment variables beside its settings.

        `first` is done in that process before anything else, such as planting a bug.
        """
        work = command(*arguments, first=first)
        if self.user:
            work = as_user(self.user, work)
        process = Stepped(work, self.folder, self.clock, **settings(self.folder, self._kis, self.key), **variables)
        self._started.append(process)
        return process

    def run(self, *arguments: str, **variables: str) -> Ran:
        """A command, run to its end in a process of its own."""
        return self.start(*arguments, first=None, **variables).finish()

    def refuse_once(self) -> None:
        """Let KIS answer the next request with a fault of its own."""
        self._kis.fail("server-error", 1)

    def token(self, market: str) -> str | None:
        """The token in the market's file; None without a file, and never half of one."""
        content = self._content(market)
        return content["access_token"] if content else None

    def told_expiry(self, market: str) -> float:
        """When the token in the market's file expires as the file tells it, in epoch seconds; 0 without a file."""
        content = self._content(market)
        return datetime.fromisoformat(content["expires_at"]).timestamp() if content else 0.0

    def _content(self, market: str) -> dict[str, str] | None:
        path = self.folder / f"{market}_api_token.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def saved(self) -> Callable[[], None]:
        """How folder, key and clock are now; the call brings that back."""
        kept, true, restore = self.folder.with_name("kept"), self.clock.true, self._kis.saved(self.key)
        if self.folder.exists():
            shutil.copytree(self.folder, kept)

        def back() -> None:
            shutil.rmtree(self.folder, ignore_errors=True)
            if kept.exists():
                shutil.copytree(kept, self.folder)
            self.clock.set(true)
            restore()

        return back

    def calls(self, *arguments: str) -> list[str]:
        """The calls that a command makes, in their order."""
        process, made = self.start(*arguments), []
        while process.at is not None:
            made.append(process.at)
            process.go()
        assert process.ran.code == 0, process.ran
        return made

    @property
    def asked(self) -> list[Asked]:
        """Every request of the key that reached tokenP."""
        return self._kis.asked.get(self.key, [])

    @property
    def granted(self) -> list[str]:
        """The tokens that KIS issued, oldest first."""
        return [asked.token for asked in self.asked if asked.outcome == "new" and asked.token]

    def expiry(self, token: str) -> float:
        """When KIS lets a token of the key expire, in epoch seconds."""
        return self._kis.expiry(token)

    def path(self, ending: str) -> Path:
        """The one file of the folder whose name ends so."""
        (found,) = (path for path in self.folder.iterdir() if path.name.endswith(ending))
        return found


class Scenario(NamedTuple):
    """A state of the files, and the command that meets the fault in it."""

    prepare: Callable[[Desk], None]
    arguments: tuple[str, ...] = ("get", "us")
    issues: int = 1  # tokens that KIS issues for the command when all goes well
    keeps: bool = False  # whether the token that is there goes on serving


def _later(hours: float) -> Callable[[Desk], None]:
    def prepare(desk: Desk) -> None:
        assert desk.run("get", "us").code == 0
        desk.clock.true += hours * HOUR

    return prepare


def _damaged(desk: Desk) -> None:
    _later(25)(desk)
    (desk.folder / "us_api_token.json").write_bytes(b'{"access_token": "eyJ')


def _without_record(desk: Desk) -> None:
    _later(25)(desk)
    desk.path(".jsonl").unlink()


def _with_long_record(desk: Desk) -> None:
    _later(25)(desk)
    record = desk.path(".jsonl")
    record.write_bytes(record.read_bytes() * 2049)


def _of_one_market(desk: Desk) -> None:
    _later(25)(desk)
    (desk.folder / "us_api_token.json").unlink()
    assert desk.run("get", "kr").code == 0
    (desk.folder / "us_api_token.json").unlink()


def _refused(desk: Desk) -> None:
    desk.refuse_once()
    assert desk.run("get", "us").code == 6
    desk.clock.true += 10


SCENARIOS = {
    "first token": Scenario(lambda _: None),
    "expired": Scenario(_later(24.5)),
    "about to expire": Scenario(_later(23.6), keeps=True),
    "refresh by hand": Scenario(_later(7), ("refresh", "us"), keeps=True),
    "same token again": Scenario(_later(1), ("refresh", "us", "--force"), issues=0, keeps=True),
    "damaged file": Scenario(_damaged),
    "lost record": Scenario(_without_record),
    "long record": Scenario(_with_long_record),
    "only the other market has it": Scenario(_of_one_market, issues=0, keeps=True),
    "inside the minute": Scenario(_refused),
    "delete": Scenario(_later(7), ("delete", "us"), issues=0, keeps=True),
}


def desks() -> Iterator[Callable[[], Desk]]:
    """A gateway and a place for folders, from which a test makes as many desks as it likes."""
    preload()
    clock = Clock()
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None  # noqa: S108 - a disk's own fsync proves nothing here
    with pytest.MonkeyPatch.context() as only_here, tempfile.TemporaryDirectory(dir=memory) as base, Kis(clock) as kis:
        # Answers in one piece: how often a process reads must not depend on chance.
        only_here.setattr(Handler, "wbufsize", -1)
        yield lambda: Desk(kis, clock, Path(base))


def tokens_of(desk: Desk) -> dict[str, str | None]:
    """What stands in the markets' files now; a file that was damaged on purpose counts as none."""
    try:
        return {market: desk.token(market) for market in MARKETS}
    except ValueError:
        return {market: desk.token(market) if market != "us" else None for market in MARKETS}


def needs_space(call: str) -> bool:
    """Whether a full disk refuses the call: what exists can be opened, read, renamed and deleted."""
    return call.startswith(SPACE) or (call.endswith(".tmp") and not call.startswith(("unlink", "close")))


def still_serving(tokens: dict[str, str | None]) -> set[str]:
    """The tokens of the files that were read."""
    return {text for text in tokens.values() if text}


def served(desk: Desk) -> set[str]:
    """The tokens that fresh processes get for the markets, all of them from KIS."""
    answers = [desk.run("get", market) for market in MARKETS]
    assert [answer.code for answer in answers] == [0, 0], answers
    return {answer.out.strip() for answer in answers}


def untidy(desk: Desk) -> Iterator[str]:
    """What is wrong after the next day's renewal, when only private files of the contract stand in the folder."""
    desk.clock.true += 1.1 * DAY
    if served(desk) != {desk.granted[-1]}:
        yield "the next day's processes did not get one new token"
    for path in desk.folder.iterdir():
        if not path.name.endswith(ENDS) or stat.S_IMODE(path.stat().st_mode) != 0o600:
            yield f"left over: {path.name} of mode {stat.S_IMODE(path.stat().st_mode):o}"
        if not path.name.endswith(TOKENS) and desk.finds_secret(path.read_bytes()):
            yield f"a secret stands in {path.name}"
    times = [asked.at for asked in desk.asked]
    if any(later - earlier < MINUTE for earlier, later in itertools.pairwise(times)):
        yield "KIS was asked twice within its minute"
