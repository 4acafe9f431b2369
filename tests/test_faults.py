"""A fault at any call: kills, errors, full disks, clocks, rivals, bad files, KIS. No token is lost or wasted.

Each case is the real command, stopped before every call; a first run finds out which calls it makes. `make test` tries
part of the calls, which differs from case to case; `make torture` tries them all.
"""

import errno
import json
import signal
import threading
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple, NoReturn

import pytest
import requests
from running import Ran
from stepping import DAY, FULL, HOUR, MINUTE, Desk, Stepped, desks, needs_space

from tokencore import cli
from tokencore.sandbox import APP_SECRET

make_desk = pytest.fixture(scope="module", name="make_desk")(desks)
CLEAR = (0, 3, 4, 6, 7)  # exit codes with a clear meaning
LONGEST = 300.0  # seconds: with a steady clock, a command waits out three cool-downs at most
LATE, ROOM = 40.0, 14.0  # seconds: a slow connection, and what is left in the time of an attempt without outcome


def later(desk: Desk, hours: float) -> None:
    """Get a token, and set the clock this many hours later."""
    assert desk.run("get", "us").code == 0
    desk.clock.true += hours * HOUR


SPREAD = 8.0  # seconds by which those who waited may start late
BACKOFF, SELDOM = 65.0, 300.0  # seconds to the next attempt while the old token serves, SELDOM if a fault may last


class Fault(NamedTuple):
    """A fault of KIS, as a mode of the sandbox, and its expected result; `test_gateway` covers every answer."""

    mode: str
    code: int  # the command's exit code
    outcome: str  # as recorded
    kis: str | None = None  # KIS's code, as recorded
    requests: int = 1  # how many reach tokenP
    again: float | None = MINUTE  # seconds to the next request without a token; None if a person has to ask for it
    ahead: float = BACKOFF  # the same while the old token serves
    timeout: str = "10"  # KIS_TIMEOUT; shorter where a command would really wait for it

    def met(self, desk: Desk) -> Ran:
        """Run the command with this fault, check its line in the record, and end the fault."""
        if self.mode:
            desk.kis.fail(self.mode)
        else:
            desk.kis.__exit__()
        ran = desk.run("get", "us", KIS_TIMEOUT=self.timeout)
        line = json.loads(desk.record.read_bytes().splitlines()[-1])
        assert (line["outcome"], line["code"]) == (self.outcome, self.kis)
        desk.kis.well()
        return ran


FAULTS = {
    "port closed": Fault("", 6, "unreachable", requests=0, again=0),
    "HTTP 500": Fault("down", 6, "server_error", "EGW00002"),
    "hang": Fault("hang", 6, "no_answer", timeout="0.05"),
    "closed without an answer": Fault("drop", 6, "no_answer"),
    "not JSON": Fault("garbage", 6, "bad_answer"),
    "a token past its expiry": Fault("past", 6, "bad_answer"),
    "a page of a proxy": Fault("html", 6, "refused", "HTTP 403"),
    "minute limit": Fault("limit", 4, "limit", "EGW00133", requests=2),
    "key locked out": Fault("bad-key", 5, "bad_key", "EGW00103", again=None, ahead=SELDOM),
    "wrong secret": Fault("bad-secret", 5, "bad_secret", "EGW00105", again=None, ahead=SELDOM),
}


class Scenario(NamedTuple):
    """The age of the token, a change of the files since then, and a command."""

    hours: float | None  # None if there is no token yet
    change: Callable[[Desk], object] = lambda _: None
    command: str = "get us"
    keeps: bool = False  # whether the present token goes on serving

    def start(self, desk: Desk) -> Stepped:
        """Start the command, stopped before its first call."""
        return desk.start(*self.command.split())


SCENARIOS = {
    "first token": Scenario(None),
    "expired": Scenario(24.5),
    "about to expire": Scenario(23.6, keeps=True),
    "refresh": Scenario(7, command="refresh us", keeps=True),
    "same token again": Scenario(1, command="refresh us --force", keeps=True),
    "damaged file": Scenario(25, lambda desk: desk.key_file.write_bytes(b'{"access_token": "eyJ')),
    "lost record": Scenario(25, lambda desk: desk.record.unlink()),
    "long record": Scenario(25, lambda desk: desk.record.write_bytes(desk.record.read_bytes() * 2049)),
    "views alone": Scenario(7, lambda desk: desk.key_file.unlink(), keeps=True),
    "delete": Scenario(7, command="delete us", keeps=True),
    "inside the minute": Scenario(None, FAULTS["HTTP 500"].met),
}
ALL = tuple(name for name in SCENARIOS if name != "inside the minute")  # it mostly waits, so that little can break
RENEWALS = ("first token", "expired", "about to expire", "refresh")
CONNECTED = ("first token", "expired")


class Kind(NamedTuple):
    """A fault that comes before a call, and its scenarios; `make test` tries one in `every` of their calls."""

    every: int
    scenarios: tuple[str, ...] = ALL
    calls: tuple[str, ...] = ()  # how the calls to try begin; empty for all
    error: int = 0  # this call alone fails
    full: int = 0  # from now on nothing can be written, as on a full or a read-only disk
    torn: bool = False  # only half of the data is written
    late: bool = False  # the process pauses until just before its request leaves
    killed: bool = False  # the process is killed here
    rival: str = ""  # a second process starts: both go on in turns, or one stops or dies meanwhile
    wrong: float = 0.0  # hours by which the clock is set wrong, until a while after the end
    asleep: float = 0.0  # hours that the machine sleeps, which the monotonic clock does not count
    issues: int = 1  # tokens that KIS may issue
    wasted: bool = False  # whether an issued token may be lost with its process


FILES: tuple[str, ...] = (
    *("open", "read", "write", "stat", "lstat", "fstat", "fsync", "replace", "mkdir", "scandir", "flock", "unlink"),
    *("link", "fchmod", "chmod", "utime", "listdir", "lseek", "close .", "close key", "close us", "close kr"),
)
SPACE = ("write", "mkdir", "fsync")
ERRORS = ("EACCES", "EINTR", "EIO", "EMFILE", "ENOSPC", "EROFS")  # `make test` tries two of them per scenario
RIVALS = (*RENEWALS, "damaged file", "lost record", "views alone")
UNREADABLE = ("open key", "read key")
KINDS = {
    "killed": Kind(50, killed=True, wasted=True),
    "torn": Kind(5, calls=("write",), torn=True, killed=True, wasted=True),
    **{
        name: Kind(70, ALL if FULL else ALL[number % 3 :: 3], FILES, error=getattr(errno, name))
        for number, name in enumerate(ERRORS)
    },
    "disk full": Kind(4, calls=SPACE, full=errno.ENOSPC),
    "read-only": Kind(1, calls=("start",), full=errno.EROFS),
    **{f"clock {hours:+} h": Kind(60, RENEWALS, wrong=hours, wasted=hours > 0) for hours in (1, -1, 25, -25)},
    **{f"asleep {hours} h": Kind(80, RENEWALS, asleep=hours, issues=2, wasted=True) for hours in (8, 30)},
    "asleep, then full": Kind(40, CONNECTED, asleep=8, full=errno.ENOSPC, issues=2, wasted=True),
    "late and killed": Kind(25, CONNECTED, late=True, killed=True, wasted=True),
    "side_by_side": Kind(50, RIVALS, rival="goes on"),
    "one_stops": Kind(50, RIVALS, rival="stops"),
    "one_dies": Kind(50, RIVALS, rival="dies", killed=True, wasted=True),
    "record unreadable": Kind(5, ("inside the minute",), UNREADABLE, error=errno.EIO),
}


class Case:
    """A scenario in which faults of one kind are tried, one at a time."""

    def __init__(self, desk: Desk, name: str, how: Kind) -> None:
        """Set the scenario up, and run its command once to list its calls."""
        self.desk, self.scenario, self.how = desk, SCENARIOS[name], how
        if self.scenario.hours:
            later(desk, self.scenario.hours)
        self.scenario.change(desk)
        self.old, self.issued = desk.tokens(), len(desk.granted)
        self._back = desk.saved()
        process, self.calls = self.scenario.start(desk), list[str]()
        while process.at:
            self.calls.append(process.at)
            process.go()
        assert process.ran.code == 0, process.ran

    def tried(self, number: int) -> Iterator[str]:
        """Try the fault before the call of that number, and yield what went wrong."""
        self._back()
        process = self.scenario.start(self.desk)
        process.advance(number)
        began = self.desk.clock.true
        ends = self._happened(process)
        if self.desk.clock.true - began > LONGEST + self.how.asleep * HOUR:
            yield "it waited too long"
        yield from self._wrong(ends)

    def _happened(self, process: Stepped) -> list[Ran]:
        """Let the fault happen, and return how the processes ended that were not killed."""
        desk, how = self.desk, self.how
        desk.clock.wrong = how.wrong * HOUR
        desk.clock.sleep(how.asleep * HOUR)
        if how.error or how.torn:
            process.go(how.error, torn=how.torn)
        if how.late:
            asked = len(desk.asked)
            desk.clock.true += ROOM if str(process.at).endswith(" socket") else LATE
            while process.at and len(desk.asked) == asked:
                process.go()
        both = [process, self.scenario.start(desk)] if how.rival else [process]
        if how.rival:
            both[1].advance({"goes on": 0, "stops": 100_000, "dies": 40}[how.rival])
        if how.killed:
            process.kill()
        while running := [one for one in both if one.at]:
            for one in running:
                one.go(how.full if needs_space(str(one.at)) else 0)
        if (how.wrong or how.asleep) and not how.full:
            desk.clock.true += 2 * MINUTE
        desk.clock.wrong = 0.0
        return [one.ran for one in both if one.ran.code != -signal.SIGKILL]

    def _wrong(self, ends: list[Ran]) -> Iterator[str]:
        """Yield what is wrong with the output, the files, the tokens that others get, and the requests to KIS."""
        desk, how, now, bought = self.desk, self.how, self.desk.tokens(), set(self.desk.granted[self.issued :])
        for ran in ends:
            bought -= {ran.out.strip()} | (bought if ran.code == 7 and "only this process" in ran.err else set())
            if ran.code not in CLEAR or (ran.code and not ran.err.splitlines()[-1].startswith("tokencore: ")):
                yield f"unclear: {ran}"
            if how.wrong < 0 and "get" in self.scenario.command and not ran.out:
                yield f"a clock that is set back cost the token: {ran}"
        if bought - set(now.values()) and not how.wasted:
            yield f"a bought token reached nobody, and nobody was told: {ends}"
        gone = {None} if "delete" in self.scenario.command else set()
        if not all(now[name] in {text, *desk.granted, *gone} for name, text in self.old.items()):
            yield "a file holds neither the old nor the new token"
        serving = {text for text in self.old.values() if text} if self.scenario.keeps else set()
        if not (answers := desk.served()) <= {desk.granted[-1], *serving}:
            yield f"the next processes got {len(answers)} tokens, not only those that serve"
        if len(desk.granted) - self.issued > how.issues:
            yield "KIS issued a second token"
        # A clock that is set ahead ends the cool-down before KIS's minute is over: KIS refuses, and the command waits.
        yield from (what for what in desk.untidy() if how.wrong <= 0 or "minute" not in what)


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for kind, how in KINDS.items() for name in how.scenarios])
def test_whatever_happens_before_any_call(name: str, kind: str, make_desk: Callable[[], Desk]) -> None:
    """Every file is old or new, later processes get one token, KIS is asked once a minute, and errors are sentences."""
    how = KINDS[kind]
    with make_desk() as desk:
        case = Case(desk, name, how)
        calls = [number for number, call in enumerate(case.calls) if not how.calls or call.startswith(how.calls)] or [0]
        if not FULL:
            calls = calls[[*SCENARIOS].index(name) * 7 % min(how.every, len(calls)) :: how.every]
        found = [f"{number} {case.calls[number]}: {what}" for number in calls for what in case.tried(number)]
    assert not found, "\n".join(found)


@pytest.fixture
def desk(make_desk: Callable[[], Desk]) -> Iterator[Desk]:
    """A key of its own; faults of KIS end with the test."""
    with make_desk() as made:
        yield made
        made.kis.well()


def test_without_threads_the_token_is_served(desk: Desk) -> None:
    """If no thread can start (`ulimit -u`), the token still serves, and an unsent request makes nobody wait."""
    later(desk, 23.6)

    def refuse(*_: object) -> NoReturn:
        raise RuntimeError("can't start new thread")

    def work() -> int:
        threading.Thread.start = refuse  # type: ignore[assignment, method-assign]
        return cli.main(("get", "us"))

    assert desk.run(work=work).out.split() == desk.granted
    began = desk.clock.true
    assert len(desk.served()) == 1
    assert desk.clock.true - began < 5
    assert list(desk.untidy()) == []


@pytest.mark.parametrize(
    ("call", "turn"),
    [("listdir .", 1), ("listdir .", 2), *((f"{call} key", 1) for call in ("fstat", "flock", "fchmod", "open"))],
)
def test_a_lock_that_the_system_refuses_is_exit_7_and_no_attempt(call: str, turn: int, desk: Desk) -> None:
    """If a lock or a listing of the folder is refused, nothing is asked or recorded; the next process asks at once."""
    process = desk.start("get", "us")
    while turn:
        process.go()
        turn -= process.at is None or (process.at.startswith(call) and process.at.endswith((".lock", " .")))
    process.go(errno.EIO)
    ran = process.finish()
    assert (ran.code, ran.out, desk.asked, "cannot be used" in ran.err) == (7, "", [], True), ran
    began = desk.clock.true
    assert len(desk.served()) == 1
    assert desk.clock.true - began < 5


@pytest.mark.parametrize(
    ("pause", "new", "printed"),
    [(3 * HOUR, range(6), [1, 2, 0, 0, 0, 0]), (MINUTE + 1, (0, 4), [1, 1, 1, 1, 2, 0])],
    ids=["KIS issues another each time", "KIS repeats the token"],
)
def test_the_ceiling_holds_on_a_full_disk_and_the_refusal_says_why(
    pause: float, new: Collection[int], printed: list[int], desk: Desk
) -> None:
    """Of six `get`s that cannot save, two get a new token, which KIS may repeat; the others are exit 4 and say why."""
    later(desk, 0)
    for path in desk.folder.iterdir():
        path.unlink()
    desk.clock.true += 1.1 * DAY
    ends: list[Ran] = []
    for number in range(6):
        if number in new:
            desk.kis.forget(desk.key)
        ends.append(desk.start("get", "us").finish(errno.ENOSPC))
        desk.clock.true += pause
    tokens = ["", *desk.granted[1:]]
    assert [ran.out.strip() for ran in ends] == [tokens[number] for number in printed]
    assert {ran.code for ran in ends if not ran.out} == {4}
    assert "24-hour limit" in ends[-1].err


def test_a_token_that_another_program_issued_is_no_issue_of_ours(desk: Desk) -> None:
    """A token that KIS issued an hour before our request is recorded as handed back, with its own time of issue."""
    body = {"grant_type": "client_credentials", "appkey": desk.key, "appsecret": APP_SECRET}
    assert requests.post(f"{desk.kis.url}/oauth2/tokenP", json=body, timeout=5).status_code == 200
    issued_at = desk.clock.true
    desk.clock.true += HOUR
    assert desk.run("get", "us").out.split() == desk.granted
    assert b'"same"' in desk.record.read_bytes()
    assert abs(float((desk.folder / "us_token_issued_at.dat").read_text(encoding="ascii")) - issued_at) < 2


@pytest.mark.parametrize("hours", [1.0, 23.6, 25.0])
def test_a_renewal_of_version_0_1_is_the_keys_token(hours: float, desk: Desk) -> None:
    """Version 0.1 writes the views only; whatever the age of the key's own file, adopting them costs no request."""
    later(desk, 0)
    before = desk.key_file.read_bytes()
    desk.clock.true += hours * HOUR
    desk.kis.forget(desk.key)
    assert desk.run("refresh", "us", "--force").code == 0
    desk.key_file.write_bytes(before)
    asked, serving = len(desk.asked), {desk.granted[-1]} if hours > 2 else set(desk.granted)
    assert desk.served() <= serving
    assert desk.run("refresh", "us").code == 4  # within KIS's six hours
    assert len(desk.asked) == asked
    assert list(desk.untidy()) == []


@pytest.mark.parametrize("name", FAULTS)
def test_without_a_token_each_fault_is_one_error_and_one_next_attempt(name: str, desk: Desk) -> None:
    """A fault is one sentence, its exit code, counted requests and a record line; the next command gets the token."""
    fault = FAULTS[name]
    if FULL or [*FAULTS].index(name) % 2:
        later(desk, 24.5)
    before = len(desk.asked)
    ran = fault.met(desk)
    assert (ran.code, len(desk.asked) - before) == (fault.code, fault.requests), ran
    assert ran.err.splitlines()[-1].startswith("tokencore: ")
    began = desk.clock.true
    if fault.again is None:
        assert (desk.run("get", "us").code, len(desk.asked) - before) == (fault.code, fault.requests)
        desk.clock.true += MINUTE
        assert desk.run("refresh", "us").code == 0
    assert desk.run("get", "us").out == f"{desk.granted[-1]}\n"
    if fault.again:
        assert MINUTE <= desk.asked[-1].at - desk.asked[-2].at < MINUTE + SPREAD
    assert fault.again != 0 or desk.clock.true - began < 1
    assert list(desk.untidy()) == []


@pytest.mark.parametrize("name", FAULTS)
def test_with_a_token_that_serves_each_fault_is_a_warning(name: str, desk: Desk) -> None:
    """The old token is served with a warning, the request is recorded, and KIS is left alone for a while."""
    later(desk, 23.6)
    fault, (old,), began = FAULTS[name], desk.granted, desk.clock.true
    ran = fault.met(desk)
    assert (ran.out, ran.err.partition(";")[0]) == (f"{old}\n", "tokencore: The renewal ahead failed")
    desk.clock.true = began + fault.ahead - 1
    assert desk.run("get", "us").out == f"{old}\n"
    assert len(desk.asked) == 1 + min(fault.requests, 1)
    desk.clock.true = began + fault.ahead + 5
    assert desk.run("get", "us").code == 0
    assert {desk.granted[-1]} == set(desk.tokens().values()) != {old}
    assert list(desk.untidy()) == []
