"""A fault at any call: kills, errors, full disks, clocks, rivals, bad files, KIS; nothing is lost and nothing wasted.

Each case is the real command, stopped before every call; no list of calls is kept anywhere, a first run counts them.
`make test` takes a part of the calls that differs from case to case, `make torture` all of them.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import sys
import threading
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
import requests
from builders import make_market
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from stepping import DAY, FULL, HOUR, MINUTE, Desk, desks, needs_space, thread_start

from tokencore import cli
from tokencore.sandbox import APP_SECRET
from tokencore.stores import open_store
from tokencore.stores.file_store import FileStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from running import Ran
    from stepping import Stepped

make_desk = pytest.fixture(scope="module", name="make_desk")(desks)
NOBODY = 65_534
CLEAR = (0, 3, 4, 6, 7)  # exit codes that say what is the matter
LONGEST = 300.0  # seconds: a command waits out three cool-downs at most, by a clock that does not jump
LATE, ROOM = 40.0, 14.0  # seconds that a connection may take, and that the rest of an attempt without outcome covers
needs_root = pytest.mark.skipif(sys.platform != "linux" or os.getuid() != 0, reason="only root can change the user")


class Scenario(NamedTuple):
    """A state of the files, and the command that meets the fault in it."""

    prepare: Callable[[Desk], object]
    arguments: tuple[str, ...] = ("get", "us")
    keeps: bool = False  # whether the token that is there goes on serving


def later(hours: float, change: Callable[[Desk], object] = lambda _: None) -> Callable[[Desk], None]:
    """A token that was issued so many hours ago, and what someone did to the files then."""

    def prepare(desk: Desk) -> None:
        assert desk.run("get", "us").code == 0
        desk.clock.true += hours * HOUR
        change(desk)

    return prepare


def refused(desk: Desk) -> None:
    """KIS has refused a request ten seconds ago."""
    desk.kis.fail("server-error", 1)
    assert desk.run("get", "us").code == 6
    desk.clock.true += 10


SCENARIOS = {
    "first token": Scenario(lambda _: None),
    "expired": Scenario(later(24.5)),
    "about to expire": Scenario(later(23.6), keeps=True),
    "refresh": Scenario(later(7), ("refresh", "us"), keeps=True),
    "same token again": Scenario(later(1), ("refresh", "us", "--force"), keeps=True),
    "damaged file": Scenario(later(25, lambda desk: desk.key_file.write_bytes(b'{"access_token": "eyJ'))),
    "lost record": Scenario(later(25, lambda desk: desk.record.unlink())),
    "long record": Scenario(later(25, lambda desk: desk.record.write_bytes(desk.record.read_bytes() * 2049))),
    "views alone": Scenario(later(7, lambda desk: desk.key_file.unlink()), keeps=True),
    "delete": Scenario(later(7), ("delete", "us"), keeps=True),
    "inside the minute": Scenario(refused),
}
ALL = tuple(name for name in SCENARIOS if name != "inside the minute")  # that one waits, with little left to break
RENEWALS = ("first token", "expired", "about to expire", "refresh")


class Case:
    """A scenario in which faults are tried one by one, and all that went wrong."""

    def __init__(self, desk: Desk, name: str) -> None:
        """Bring it about, and count the calls of its command."""
        self.desk, self.scenario = desk, SCENARIOS[name]
        self.scenario.prepare(desk)
        self.old, self.issued = desk.tokens(), len(desk.granted)
        self._back = desk.saved()
        self.calls = desk.calls(*self.scenario.arguments)
        self.found: list[object] = []

    def begin(self, number: int) -> Stepped:
        """The command in the first state, before its call of that number, or at its end."""
        self._back()
        process = self.desk.start(*self.scenario.arguments)
        process.advance(number)
        return process

    def finish(self, *processes: Stepped, error: int = 0) -> list[Ran]:
        """Let them go on in turns to their ends, without any space where an `error` says so."""
        began = self.desk.clock.true
        while any(one.at for one in processes):
            for one in processes:
                if one.at:
                    one.go(error if needs_space(one.at) else 0)
        if (took := self.desk.clock.true - began) > LONGEST:
            self.found.append(f"it waited {took:.0f} s")
        return [one.ran for one in processes]

    def judge(self, ends: Iterable[Ran], issues: int, *, wasted: bool) -> None:
        """Look at what was said, the files, the next processes and KIS; tokens may be `wasted` with their process."""
        desk, now, bought = self.desk, self.desk.tokens(), set(self.desk.granted[self.issued :])
        for ran in ends:
            bought -= {ran.out.strip()} | (bought if ran.code == 7 and "only this process" in ran.err else set())
            if ran.code not in CLEAR or (ran.code and not ran.err.splitlines()[-1].startswith("tokencore: ")):
                self.found.append(f"unclear: {ran}")
        if bought - set(now.values()) and not wasted:
            self.found.append(f"a bought token reached nobody, and nobody was told: {ends}")
        gone = {None} if "delete" in self.scenario.arguments else set()
        if not all(now[name] in {text, *desk.granted, *gone} for name, text in self.old.items()):
            self.found.append("a file holds neither the old nor the new token")
        serving = {text for text in self.old.values() if text} if self.scenario.keeps else set()
        if not (answers := desk.served()) <= {desk.granted[-1], *serving}:
            self.found.append(f"the next processes got {len(answers)} tokens, not only those that serve")
        if len(desk.granted) - self.issued > issues:
            self.found.append("KIS issued a second token")
        self.found += desk.untidy()


def killed(_: Case, process: Stepped) -> list[Ran]:
    """Nothing more is done."""
    process.kill()
    return []


def torn(_: Case, process: Stepped) -> list[Ran]:
    """The same, where half of what was to be written stands on disk."""
    process.go(torn=True)
    process.kill()
    return []


def failing(error: int, case: Case, process: Stepped) -> list[Ran]:
    """The call fails, and no other."""
    process.go(error)
    return case.finish(process)


def no_space(error: int, case: Case, process: Stepped) -> list[Ran]:
    """From here on nothing can be written, as on a full or a read-only disk."""
    return case.finish(process, error=error)


def jump(hours: float, case: Case, process: Stepped) -> list[Ran]:
    """Someone sets the clock, and sets it right a while after the end; set back, it costs no caller the token."""
    case.desk.clock.wrong = hours * HOUR
    (ran,) = case.finish(process)
    if hours < 0 and "get" in case.scenario.arguments and not ran.out:
        case.found.append(f"no token: {ran}")
    case.desk.clock.true += 2 * MINUTE
    case.desk.clock.wrong = 0.0
    return [ran]


def night(hours: float, case: Case, process: Stepped) -> list[Ran]:
    """The machine sleeps, of which the monotonic clock knows nothing."""
    case.desk.clock.sleep(hours * HOUR)
    ends = case.finish(process)
    case.desk.clock.true += 2 * MINUTE
    return ends


def full_night(case: Case, process: Stepped) -> list[Ran]:
    """The machine sleeps, and wakes with a full disk."""
    case.desk.clock.sleep(8 * HOUR)
    return case.finish(process, error=errno.ENOSPC)


def late(case: Case, process: Stepped) -> list[Ran]:
    """It stands still, asks, and is killed: the next one counts from when the request left, as far as there is room."""
    asked = len(case.desk.asked)
    case.desk.clock.true += ROOM if str(process.at).endswith(" socket") else LATE
    while process.at and len(case.desk.asked) == asked:
        process.go()
    if process.at:
        process.kill()
    return []


def side_by_side(case: Case, process: Stepped) -> list[Ran]:
    """A second one begins, and both go on in turns."""
    return case.finish(process, case.desk.start(*case.scenario.arguments))


def one_stops(case: Case, process: Stepped) -> list[Ran]:
    """A second one runs to its end before the first is given the processor again."""
    return [*case.finish(case.desk.start(*case.scenario.arguments)), *case.finish(process)]


def one_dies(case: Case, process: Stepped) -> list[Ran]:
    """The first is killed while a second waits for it, or is as far as it can get without it."""
    second = case.desk.start(*case.scenario.arguments)
    for _ in range(40):
        if second.at and not second.at.startswith("sleep"):
            second.go()
    process.kill()
    return case.finish(second)


class Kind(NamedTuple):
    """What happens before a call of which scenarios; every so many of these calls is tried by `make test`."""

    happens: Callable[[Case, Stepped], list[Ran]]
    every: int
    scenarios: tuple[str, ...] = ALL
    calls: tuple[str, ...] = ()  # how those begin that are tried; all without any
    issues: int = 1  # tokens that KIS may issue
    wasted: bool = False  # whether a token may be lost with its process


FILES: tuple[str, ...] = (
    *("open", "read", "write", "stat", "lstat", "fstat", "fsync", "replace", "mkdir", "scandir", "flock", "unlink"),
    *("link", "fchmod", "chmod", "utime", "listdir", "lseek", "close .", "close key", "close us", "close kr"),
)
SPACE = ("write", "mkdir", "fsync")
ERRORS = ("EACCES", "EINTR", "EIO", "EMFILE", "ENOSPC", "EROFS")  # `make test` tries two of them in each scenario
RIVALS = (*RENEWALS, "damaged file", "lost record", "views alone")
CONNECTED = ("first token", "expired")
KINDS = {
    "killed": Kind(killed, 50, wasted=True),
    "torn": Kind(torn, 5, calls=("write",), wasted=True),
    **{
        name: Kind(partial(failing, getattr(errno, name)), 70, ALL if FULL else ALL[number % 3 :: 3], calls=FILES)
        for number, name in enumerate(ERRORS)
    },
    "disk full": Kind(partial(no_space, errno.ENOSPC), 4, calls=SPACE),
    "read-only": Kind(partial(no_space, errno.EROFS), 1, calls=("start",)),
    **{f"clock {hours:+} h": Kind(partial(jump, hours), 60, RENEWALS, wasted=hours > 0) for hours in (1, -1, 25, -25)},
    **{f"asleep {hours} h": Kind(partial(night, hours), 80, RENEWALS, issues=2, wasted=True) for hours in (8, 30)},
    "asleep, then full": Kind(full_night, 40, CONNECTED, issues=2, wasted=True),
    "late and killed": Kind(late, 25, CONNECTED, wasted=True),
    **{one.__name__: Kind(one, 50, RIVALS, wasted=one is one_dies) for one in (side_by_side, one_stops, one_dies)},
    "record unreadable": Kind(partial(failing, errno.EIO), 5, ("inside the minute",), ("open key", "read key")),
}


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for kind, how in KINDS.items() for name in how.scenarios])
def test_whatever_happens_before_any_call(name: str, kind: str, make_desk: Callable[[], Desk]) -> None:
    """Each file is old or new, the next processes get one token, KIS was asked once a minute and nothing in vain.

    What is said is one sentence with its exit code, and a bought token is in hand or on disk. A clock set ahead ends a
    minute that KIS still counts: that is refused, and waited out.
    """
    how, found = KINDS[kind], []
    with make_desk() as desk:
        case = Case(desk, name)
        calls = [number for number, call in enumerate(case.calls) if not how.calls or call.startswith(how.calls)] or [0]
        if not FULL:
            calls = calls[(ALL.index(name) if name in ALL else 0) * 7 % min(how.every, len(calls)) :: how.every]
        for number in calls:
            case.found = []
            case.judge(how.happens(case, case.begin(number)), how.issues, wasted=how.wasted)
            bad = [what for what in case.found if not (kind.startswith("clock +") and "minute" in str(what))]
            found += [f"{number} {case.calls[number]}: {what}" for what in bad]
    assert not found, "\n".join(found)


@pytest.fixture
def desk(make_desk: Callable[[], Desk]) -> Iterator[Desk]:
    """A key of its own; KIS is well again afterwards."""
    with make_desk() as made:
        yield made
        made.kis.well()


@pytest.fixture
def nobodys(desk: Desk) -> Desk:
    """A desk whose commands run without the rights of root."""
    desk.folder.mkdir(mode=0o700, parents=True)
    for path in (desk.folder.parent, desk.folder.parent.parent):
        path.chmod(0o755)
    os.chown(desk.folder, NOBODY, NOBODY)
    desk.user = NOBODY
    return desk


@needs_root
@pytest.mark.parametrize("hours", [0.0, 23.6])
def test_without_threads_a_token_is_served_or_the_error_says_why(hours: float, nobodys: Desk) -> None:
    """`ulimit -u 0`: what serves goes on, and what never left is no attempt that the next process waits for."""
    desk = nobodys
    if hours:
        later(hours)(desk)

    def work() -> int:
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
        threading.Thread.start = thread_start  # type: ignore[method-assign]
        return cli.main(("get", "us"))

    ran = desk.run(work=work)
    assert ran.code in (0, 6), ran
    assert ran.out.startswith("eyJ") or not hours
    began = desk.clock.true
    assert len(desk.served()) == 1
    assert desk.clock.true - began < 5
    assert list(desk.untidy()) == []


LOCKING = [("listdir .", 1), ("listdir .", 2), *((f"{call} key", 1) for call in ("fstat", "flock", "fchmod", "open"))]


@pytest.mark.parametrize(("call", "turn"), LOCKING)
def test_a_lock_that_the_system_refuses_is_exit_7_and_no_attempt(call: str, turn: int, desk: Desk) -> None:
    """Nothing is asked and nothing recorded, so the next process asks at once; a folder that cannot be listed too."""
    process = desk.start("get", "us")
    while turn:
        process.go()
        turn -= process.at is None or (process.at.startswith(call) and process.at.endswith((".lock", " .")))
    process.go(errno.EIO)
    ran = process.finish()
    assert (ran.code, ran.out, desk.asked) == (7, "", []), ran
    assert "cannot be used" in ran.err
    began = desk.clock.true
    assert len(desk.served()) == 1
    assert desk.clock.true - began < 5


@pytest.mark.parametrize("state", ["record of 3 MB", "full disk"])
def test_the_ceiling_holds_or_the_refusal_says_why(state: str, desk: Desk) -> None:
    """Six `get` with a lost token, three hours apart, where KIS would issue: two tokens, then exit 4 that says why."""
    later(0)(desk)
    if state == "record of 3 MB":
        line = desk.record.read_bytes()
        desk.record.write_bytes(line * (3_000_000 // len(line)))
    else:
        desk.record.unlink()
        desk.record.with_suffix(".lock").unlink()
        desk.clock.true += 1.1 * DAY
    issued, ends = len(desk.granted), []
    for _ in range(6):
        for path in (*desk.folder.glob("*.json"), *desk.folder.glob("*.dat")):
            path.unlink()
        process = desk.start("get", "us")
        while process.at is not None:
            process.go(errno.ENOSPC if state == "full disk" and needs_space(process.at) else 0)
        ends.append(process.ran)
        desk.clock.true += 3 * HOUR
        desk.kis.forget(desk.key)
    assert len(desk.granted) - issued <= 2, ends
    assert {ran.code for ran in ends[2:]} == {4}
    assert "24-hour limit" in ends[-1].err
    assert desk.hurried() == []


def test_a_token_that_kis_repeats_on_a_full_disk_counts_once(desk: Desk) -> None:
    """Each process has it for itself, and KIS returns it to the next: one issue of the day's two, however many ask."""
    for _ in range(4):
        process = desk.start("get", "us")
        while process.at is not None:
            process.go(errno.ENOSPC if needs_space(process.at) else 0)
        assert process.ran.out.split() == desk.granted
    assert len(desk.served()) == 1
    assert desk.hurried() == []


def test_a_token_that_another_program_issued_is_no_issue_of_ours(desk: Desk) -> None:
    """What KIS issued an hour before our request is recorded as handed back, with its own time as the mark."""
    body = {"grant_type": "client_credentials", "appkey": desk.key, "appsecret": APP_SECRET}
    assert requests.post(f"{desk.kis.url}/oauth2/tokenP", json=body, timeout=5).status_code == 200
    issued_at = desk.clock.true
    desk.clock.true += HOUR
    assert desk.run("get", "us").out.split() == desk.granted
    assert desk.last_line() == ("same", None)
    assert abs(float((desk.folder / "us_token_issued_at.dat").read_text(encoding="ascii")) - issued_at) < 2


TEXTS: dict[str, bytes] = {
    "empty": b"",
    "null": b"null",
    "list": b"[]",
    "endless number": b'{"access_token": "a", "expires_at": 1e400}',
    "other types": b'{"access_token": ["a"], "expires_at": {}, "at": [], "outcome": 1}',
    "byte order mark": b"\xef\xbb\xbf{}",
    "garbage": bytes(range(256)) * 3,
    "nul bytes": b"\0" * 600,
    "nested": b"[" * 50_000,
    "10 MB": b"7" * 10_000_000,
    "far future": b'{"access_token": "a", "expires_at": "9999-12-31T23:59:59+00:00", "at": "9999-12-31T23:59:59Z"}',
    "far past": b'{"access_token": "a", "expires_at": "0001-01-01T00:00:00+00:00", "at": "0001-01-01T00:00:00Z"}',
}
PLACES = ("key", "us_api_token.json", "jsonl", "us_token_issued_at.dat")
COMMANDS = (("check", "--json"), ("history", "us"), ("get", "us"), ("tick",), ("get", "kr"))


@pytest.mark.parametrize("place", PLACES)
def test_no_file_of_the_folder_stops_a_command(place: str, desk: Desk) -> None:
    """Whatever stands in token, view, record or mark: a documented code, no traceback, then a token for both."""
    later(24.5)(desk)
    back, kinds = desk.saved(), [*TEXTS] if FULL else [*TEXTS][PLACES.index(place) :: 4]
    path = {"key": desk.key_file, "jsonl": desk.record}.get(place, desk.folder / place)
    for kind in kinds:
        back()
        path.write_bytes(TEXTS[kind])
        for arguments in COMMANDS:
            ran = desk.run(*arguments)
            assert ran.code in CLEAR, (kind, arguments, ran)
            assert "Traceback" not in ran.err, (kind, arguments, ran)
        assert len(desk.served()) == 1, kind
        assert desk.hurried() == []


def as_version_0_1(desk: Desk, **outcome: object) -> None:
    """Leave the files as version 0.1 writes them: views without a key's file, and lines of 512 bytes."""
    desk.key_file.unlink(missing_ok=True)
    lines = [json.loads(line) for line in desk.record.read_text(encoding="utf-8").splitlines()]
    now = datetime.fromtimestamp(desk.clock.true, UTC).isoformat()
    lines = [{"cut": {"issued": 1}}, *lines, *([{"at": now, "pid": 4711, **outcome}] if outcome else [])]
    desk.record.write_text("".join(json.dumps(line).ljust(511) + "\n" for line in lines), encoding="utf-8")


@pytest.mark.parametrize("word", ["limit", "sent", "throttled"])
def test_an_attempt_of_another_version_starts_the_minute(word: str, desk: Desk) -> None:
    """What it recorded counts here, also where the word for its outcome is not known yet."""
    later(25)(desk)
    as_version_0_1(desk, outcome=word)
    began = desk.clock.true
    assert desk.run("refresh", "us", "--force").code == 4
    assert len(desk.asked) == 1
    assert len(desk.served()) == 1
    assert desk.asked[-1].at - began >= MINUTE


@pytest.mark.parametrize("hours", [1.0, 23.6, 25.0])
def test_a_renewal_of_version_0_1_is_the_keys_token(hours: float, desk: Desk) -> None:
    """It writes the views alone, beside a key's file with the token of before: that costs no request, at any age."""
    later(0)(desk)
    before = desk.key_file.read_bytes()
    desk.clock.true += hours * HOUR
    desk.kis.forget(desk.key)
    assert desk.run("refresh", "us", "--force").code == 0
    as_version_0_1(desk)
    desk.key_file.write_bytes(before)
    desk.key_file.chmod(0o600)
    asked, serving = len(desk.asked), {desk.granted[-1]} if hours > 2 else set(desk.granted)
    assert desk.served() <= serving
    assert desk.run("refresh", "us").code == 4  # its six hours
    assert len(desk.asked) == asked
    assert list(desk.untidy()) == []


SPREAD = 8.0  # seconds by which whoever has waited may start late
BACKOFF, SELDOM = 65.0, 300.0  # seconds between attempts while the old token serves: after a failure, where it may last


class Fault(NamedTuple):
    """What KIS does, in one of the sandbox's modes, and what has to come of it; `test_gateway` has every answer."""

    mode: str
    code: int  # of the command's exit
    outcome: str  # in the record
    kis: str | None = None  # its code, in the record too
    requests: int = 1  # that reach tokenP
    again: float | None = MINUTE  # seconds to the next request without a token; None where a person has to ask
    ahead: float = BACKOFF  # the same while the old token serves
    timeout: str = "10"  # KIS_TIMEOUT, shorter for what would otherwise be waited for in real time


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


def strike(desk: Desk, fault: Fault) -> None:
    """Let KIS do what the fault says from now on."""
    if fault.mode:
        desk.kis.fail(fault.mode)
    else:
        desk.kis.down()


# A part of the run has each fault in one of the two states only.
@pytest.mark.parametrize(
    ("name", "hours"),
    [(name, hours) for n, name in enumerate(FAULTS) for hours in ((0.0, 24.5) if FULL else (24.5 * (n % 2),))],
)
def test_without_a_token_each_fault_is_one_error_and_one_next_attempt(name: str, hours: float, desk: Desk) -> None:
    """One sentence and its exit code, counted requests, a line in the record; then the next command has the token."""
    fault = FAULTS[name]
    if hours:
        later(hours)(desk)
    before = len(desk.asked)
    strike(desk, fault)
    ran = desk.run("get", "us", KIS_TIMEOUT=fault.timeout)
    assert ran.code == fault.code, ran
    assert ran.err.splitlines()[-1].startswith("tokencore: ")
    assert len(desk.asked) - before == fault.requests
    assert desk.last_line() == (fault.outcome, fault.kis)
    desk.kis.well()
    began = desk.clock.true
    if fault.again is None:
        assert desk.run("get", "us").code == fault.code
        assert (len(desk.asked) - before, desk.clock.true - began < 1) == (fault.requests, True)
        desk.clock.true += MINUTE
        assert desk.run("refresh", "us").code == 0
    ran = desk.run("get", "us")
    assert (ran.code, ran.out) == (0, f"{desk.granted[-1]}\n")
    if fault.requests and fault.again:
        assert MINUTE <= desk.asked[-1].at - desk.asked[-2].at < MINUTE + SPREAD
    assert fault.again != 0 or desk.clock.true - began < 1
    assert list(desk.untidy()) == []


@pytest.mark.parametrize("name", FAULTS)
def test_with_a_token_that_serves_each_fault_is_a_warning(name: str, desk: Desk) -> None:
    """The old token comes, the request is counted, recorded and said, and KIS is left alone for a while."""
    fault = FAULTS[name]
    later(23.6)(desk)
    (old,), before, began = desk.granted, len(desk.asked), desk.clock.true
    strike(desk, fault)
    ran = desk.run("get", "us", KIS_TIMEOUT=fault.timeout)
    assert (ran.code, ran.out) == (0, f"{old}\n")
    assert ran.err.startswith("The renewal ahead failed; the present token still serves.")
    assert len(desk.asked) - before == min(fault.requests, 1)
    assert desk.last_line() == (fault.outcome, fault.kis)
    desk.kis.well()
    desk.clock.true = began + fault.ahead - 1
    assert desk.run("get", "us").out == f"{old}\n"
    assert len(desk.asked) - before == min(fault.requests, 1)
    desk.clock.true = began + fault.ahead + 5
    assert desk.run("get", "us").code == 0
    assert {desk.granted[-1]} == set(desk.tokens().values()) != {old}
    assert list(desk.untidy()) == []


SEEDS = (
    b'{"access_token": "opaque", "expires_at": "2027-01-01T00:00:00+00:00"}',
    b'{"at": "2026-11-24T04:00:00+00:00", "outcome": "sent", "pid": 1}',
    b"token: a.b.c\nvalid-date: 2026-11-24 08:15:00\n",
    *(text for text in TEXTS.values() if len(text) < 1000),
)
signs = st.sampled_from([b'"', b"{", b"]", b":", b"=", b"\\", b"\n", b"\0", b"\xff", b"9" * 20]) | st.binary(max_size=6)


@hypothesis_settings(max_examples=3000 if FULL else 100, database=None)
@given(seed=st.sampled_from(SEEDS), at=st.tuples(st.integers(0, 99), st.integers(0, 12)), sign=signs)
def test_any_bytes_are_something_or_nothing(
    seed: bytes, at: tuple[int, int], sign: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Token file, view, mark and record are read as something or nothing; what is a token can be saved and read."""
    content = seed[: at[0]] + sign + seed[sum(at) :]
    market = make_market("us", token_dir=tmp_path_factory.getbasetemp())
    store = open_store(market, lambda: ["us"])
    assert isinstance(store, FileStore)
    folder, key = Path(store.folder), f"key-{store.fingerprint}"
    for name in (f"{key}.json", "us_api_token.json", f"{key}.jsonl", "us_token_issued_at.dat"):
        (folder / name).write_bytes(content)
        (folder / name).chmod(0o600)
    token, problem = store.read()
    assert (token is None) == bool(problem)
    assert "\n" not in problem
    store.attempts()
    if token:
        store.save(token)
        again = store.newest()
        assert again is not None
        assert (again.access_token, again.rejected_at) == (token.access_token, token.rejected_at)
