"""A fault at any call: kills, errors, full disks, clocks, rivals, bad files; nothing is lost and no request is wasted.

Each case is the real command, stopped before every call; no list of calls is kept anywhere, a first run counts them.
`make test` takes a part of the calls that differs from case to case, `make torture` all of them.
"""

from __future__ import annotations

import errno
import gzip
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
from builders import make_market
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from stepping import DAY, FULL, HOUR, MARKETS, MINUTE, SPACE, Desk, desks, needs_space, thread_start

from tokencore import TokenError, USTokenManager, cli
from tokencore.stores import open_store
from tokencore.stores.file_store import FileStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from running import Ran
    from stepping import Stepped

    Count = Callable[[str, object], None]
    Make = Callable[[], Desk]

make_desk = pytest.fixture(scope="module", name="make_desk")(desks)
NOBODY = 65_534
CLEAR = (0, 3, 4, 6, 7)  # exit codes that say what is the matter
NO_FILE = ("start", "sleep", "connect", "sendall", "recv_into", "close socket")
ERRORS = (errno.EIO, errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EINTR, errno.EMFILE)
JUMPS, NIGHTS = (HOUR, -HOUR, 25 * HOUR, -25 * HOUR), (8 * HOUR, 30 * HOUR)
LONGEST = 300.0  # seconds: a command waits out three cool-downs at most, by a clock that does not jump
LATE, MOMENT = 40.0, 14.0  # seconds that a connection may take, and that the rest of an attempt without outcome covers
needs_root = pytest.mark.skipif(sys.platform != "linux" or os.getuid() != 0, reason="only root can mount and change uid")


class Scenario(NamedTuple):
    """A state of the files, and the command that meets the fault in it."""

    prepare: Callable[[Desk], object]
    arguments: tuple[str, ...] = ("get", "us")
    issues: int = 1  # tokens that KIS issues for the command when all goes well
    keeps: bool = False  # whether the token that is there goes on serving


def later(hours: float) -> Callable[[Desk], None]:
    """A token that was issued so many hours ago."""

    def prepare(desk: Desk) -> None:
        assert desk.run("get", "us").code == 0
        desk.clock.true += hours * HOUR

    return prepare


def changed(hours: float, change: Callable[[Desk], object]) -> Callable[[Desk], None]:
    """The same, and what someone did to the files then."""

    def prepare(desk: Desk) -> None:
        later(hours)(desk)
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
    "same token again": Scenario(later(1), ("refresh", "us", "--force"), issues=0, keeps=True),
    "damaged file": Scenario(changed(25, lambda desk: desk.key_file.write_bytes(b'{"access_token": "eyJ'))),
    "lost record": Scenario(changed(25, lambda desk: desk.record.unlink())),
    "long record": Scenario(changed(25, lambda desk: desk.record.write_bytes(desk.record.read_bytes() * 2049))),
    "views alone": Scenario(changed(7, lambda desk: desk.key_file.unlink()), issues=0, keeps=True),
    "delete": Scenario(later(7), ("delete", "us"), issues=0, keeps=True),
    "inside the minute": Scenario(refused),
}
WORK = [name for name in SCENARIOS if name != "inside the minute"]  # that one waits, where little is left to break
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
        self.tried, self.found = 0, list[tuple[object, ...]]()

    def begin(self) -> Stepped:
        """The command in the first state, before its first call."""
        self._back()
        self.tried += 1
        return self.desk.start(*self.scenario.arguments)

    def judge(self, where: object, *ends: Ran) -> None:
        """Look at the files, the next processes and KIS after the fault at `where`."""
        self.found += [(where, what) for what in (*self._said(ends), *self._left())]

    def close(self, count: Count) -> None:
        """Fail with all that was found."""
        assert not self.found, "\n".join(map(str, self.found))
        assert self.tried
        count("cases", self.tried)

    def _said(self, ends: Iterable[Ran]) -> Iterator[str]:
        for ran in ends:
            if ran.code not in CLEAR or "Traceback" in ran.err or "Unexpected" in ran.err:
                yield f"unclear: {ran}"
            elif ran.code and not ran.err.splitlines()[-1].startswith("tokencore: "):
                yield f"no sentence: {ran}"

    def _left(self) -> Iterator[str]:
        gone = {None} if "delete" in self.scenario.arguments else set()
        now = self.desk.tokens()
        if not all(now[name] in {text, *self.desk.granted, *gone} for name, text in self.old.items()):
            yield "a file holds neither the old nor the new token"
        serving = {text for text in self.old.values() if text} if self.scenario.keeps else set()
        answers = self.desk.served()
        if not answers <= {self.desk.granted[-1], *serving}:
            yield f"the next processes got {len(answers)} tokens, not only those that serve"
        if len(self.desk.granted) - self.issued > max(1, self.scenario.issues):
            yield "KIS issued a second token"
        yield from self.desk.untidy()


def part(calls: Iterable[int], name: str, every: int) -> list[int]:
    """All calls, or every so many of them from one that differs from case to case."""
    found = list(calls) or [0]
    return found if FULL else found[list(SCENARIOS).index(name) * 7 % min(every, len(found)) :: every]


@pytest.mark.parametrize("name", WORK)
def test_a_kill_before_any_call_loses_nothing(name: str, make_desk: Make, record_property: Count) -> None:
    """Each file is old or new, the next processes get one token, KIS issued no other and was asked once a minute."""
    with make_desk() as desk:
        case = Case(desk, name)
        for number in part(range(len(case.calls)), name, 16):
            process = case.begin()
            process.advance(number)
            process.kill()
            case.judge((number, case.calls[number]))
    case.close(record_property)


@pytest.mark.parametrize("name", WORK if FULL else ["damaged file"])
def test_a_kill_amid_a_write_loses_nothing(name: str, make_desk: Make, record_property: Count) -> None:
    """The same holds where half of what was to be written stands on disk."""
    with make_desk() as desk:
        case = Case(desk, name)
        for number in [n for n, call in enumerate(case.calls) if call.startswith("write")] or [0]:
            process = case.begin()
            process.advance(number)
            process.go(torn=True)
            process.kill()
            case.judge((number, case.calls[number]))
    case.close(record_property)


def judge_bought(case: Case, where: object, ran: Ran) -> None:
    """A token that was bought is in hand or on disk, or the error says that only this process had it."""
    lost = set(case.desk.granted[case.issued :]) - {ran.out.strip(), *case.desk.tokens().values()}
    if lost and (ran.code != 7 or "only this process" not in ran.err):
        case.found.append((where, f"a bought token reached nobody, and nobody was told: {ran}"))
    case.judge(where, ran)


@pytest.mark.parametrize("name", WORK)
def test_a_call_that_fails_costs_no_token(name: str, make_desk: Make, record_property: Count) -> None:
    """Each error at each file call: a documented exit code, no traceback, and a bought token in hand or on disk."""
    with make_desk() as desk:
        case = Case(desk, name)
        files = [n for n, call in enumerate(case.calls) if not call.startswith(NO_FILE)]
        for number in part(files, name, 17):
            for error in ERRORS if FULL else ERRORS[number % len(ERRORS) :][:1]:
                process = case.begin()
                process.advance(number)
                if process.at is not None:
                    process.go(error)
                judge_bought(case, (number, case.calls[number], errno.errorcode[error]), process.finish())
    case.close(record_property)


def test_a_record_that_cannot_be_read_does_not_cost_a_request(make_desk: Make, record_property: Count) -> None:
    """Each look at the record fails once, ten seconds after a request: the rest of the minute is waited out."""
    with make_desk() as desk:
        case = Case(desk, "inside the minute")
        looks = ("open", "read", "fstat")
        for number in [n for n, call in enumerate(case.calls) if call.startswith(looks) and "jsonl" in call][:12]:
            process = case.begin()
            process.advance(number)
            process.go(errno.EIO)
            case.judge((number, case.calls[number]), process.finish())
    case.close(record_property)


def on_a_full_disk(process: Stepped) -> Ran:
    """Let it run to its end without any space left."""
    while process.at is not None:
        process.go(errno.ENOSPC if needs_space(process.at) else 0)
    return process.ran


@pytest.mark.parametrize("name", WORK)
def test_a_disk_that_fills_up_costs_no_token(name: str, make_desk: Make, record_property: Count) -> None:
    """Every write from some call on fails, as on a full disk: the same holds, and with space again all is well."""
    with make_desk() as desk:
        case = Case(desk, name)
        for number in part([n for n, call in enumerate(case.calls) if call.startswith(SPACE)], name, 9):
            process = case.begin()
            process.advance(number)
            judge_bought(case, (number, case.calls[number]), on_a_full_disk(process))
    case.close(record_property)


@pytest.mark.parametrize("jump", JUMPS, ids="{:+.0f} s".format)
@pytest.mark.parametrize("name", RENEWALS)
def test_a_clock_that_jumps_costs_no_token(name: str, jump: float, make_desk: Make, record_property: Count) -> None:
    """Set by an hour or 25, either way, before any call: no endless wait, and a bought token reaches its caller.

    By a clock that is a day ahead it has expired. A clock set ahead ends a minute that KIS still counts; that is
    refused, and waited out.
    """
    with make_desk() as desk:
        case = Case(desk, name)
        for number in part(range(len(case.calls)), name, 40):
            process = case.begin()
            process.advance(number)
            began, desk.clock.wrong = desk.clock.true, jump
            ran = process.finish()
            if desk.clock.true - began > LONGEST:
                case.found.append((number, f"it waited {desk.clock.true - began} s"))
            if jump < 0 and "get" in case.scenario.arguments and (ran.code or not ran.out.startswith("eyJ")):
                case.found.append((number, case.calls[number], f"no token: {ran}"))
            settle(desk)
            before = len(case.found)
            case.judge((number, case.calls[number]), ran)
            if jump > 0:
                case.found[before:] = [one for one in case.found[before:] if "minute" not in str(one)]
    case.close(record_property)


def settle(desk: Desk) -> None:
    """Someone sets the clock right, after a while: that may be one more jump ahead."""
    desk.clock.true += 2 * MINUTE
    desk.clock.wrong = 0.0


@pytest.mark.parametrize("night", NIGHTS, ids="{:.0f} s".format)
@pytest.mark.parametrize("name", RENEWALS)
def test_a_machine_that_sleeps_amid_a_renewal_costs_no_token(
    name: str, night: float, make_desk: Make, record_property: Count
) -> None:
    """A night, or more than a token's life, before any call, of which the monotonic clock knows nothing."""
    with make_desk() as desk:
        case = Case(desk, name)
        for number in part(range(len(case.calls)), name, 40):
            process = case.begin()
            process.advance(number)
            desk.clock.sleep(night)
            ran = process.finish()
            settle(desk)
            case.scenario = case.scenario._replace(issues=2)  # a token may have expired in the night
            case.judge((number, case.calls[number]), ran)
    case.close(record_property)


@pytest.mark.parametrize("name", ["first token", "expired"])
def test_a_request_after_a_sleep_on_a_full_disk_starts_the_minute(
    name: str, make_desk: Make, record_property: Count
) -> None:
    """A machine sleeps before any call and finds its disk full: the next process keeps KIS's minute anyway."""
    with make_desk() as desk:
        case = Case(desk, name)
        for number in part(range(len(case.calls)), name, 6):
            process = case.begin()
            process.advance(number)
            desk.clock.sleep(8 * HOUR)
            on_a_full_disk(process)
            desk.served()
            case.found += [(number, case.calls[number], gap) for gap in desk.hurried()]
    case.close(record_property)


@pytest.mark.parametrize("name", ["first token", "expired"])
def test_a_request_that_leaves_late_starts_the_minute_then(
    name: str, make_desk: Make, record_property: Count
) -> None:
    """A process stands still before any call, asks, and is killed: the next one counts from when the request left.

    Once it has connected, that is by the room which an attempt without an outcome is given.
    """
    with make_desk() as desk:
        case = Case(desk, name)
        connects = case.calls.index("connect socket")
        for number in {*part(range(connects), name, 6), connects, connects + 1, connects + 2}:
            process, before = case.begin(), len(desk.asked)
            process.advance(number)
            desk.clock.true += LATE if number < connects else MOMENT
            while len(desk.asked) == before:
                process.go()
            process.kill()
            desk.served()
            case.found += [(number, case.calls[number], gap) for gap in desk.hurried()]
    case.close(record_property)


def side_by_side(first: Stepped, second: Stepped) -> list[Ran]:
    """Both go on in turns."""
    while first.at is not None or second.at is not None:
        first.advance(1)
        second.advance(1)
    return [first.ran, second.ran]


def one_stops(first: Stepped, second: Stepped) -> list[Ran]:
    """One is not given the processor until the other is done."""
    return [second.finish(), first.finish()]


def one_dies(first: Stepped, second: Stepped) -> list[Ran]:
    """One is killed while the other waits for it, or is as far as it can get without it."""
    for _ in range(40):
        if second.at is not None and not second.at.startswith("sleep"):
            second.go()
    first.kill()
    return [second.finish()]


@pytest.mark.parametrize("happens", [side_by_side, one_stops, one_dies])
@pytest.mark.parametrize("name", [*RENEWALS, "damaged file", "lost record", "views alone"])
def test_two_that_meet_at_any_call_make_one_request(
    name: str, happens: Callable[[Stepped, Stepped], list[Ran]], make_desk: Make, record_property: Count
) -> None:
    """Whichever call one of them stands before: one token, for both, and none asked for within the minute."""
    with make_desk() as desk:
        case = Case(desk, name)
        for number in part(range(len(case.calls)), name, 48):
            first, began = case.begin(), desk.clock.true
            first.advance(number)
            ends = happens(first, desk.start(*case.scenario.arguments))
            if desk.clock.true - began > LONGEST:
                case.found.append((number, f"they waited {desk.clock.true - began:.0f} s"))
            case.judge((number, case.calls[number]), *ends)
    case.close(record_property)


@pytest.mark.parametrize("left", [0, 1, 2, 3, 5] if FULL else [0, 2], ids="{} pages left".format)
@needs_root
def test_a_full_file_system_costs_no_token(small: Desk, left: int) -> None:
    """A real one, with room for so many files: the token is printed, and with space again the same one is served."""
    filler, room = small.folder / "filler", os.statvfs(small.folder)
    filler.write_bytes(b"x" * room.f_bsize * (room.f_bavail - left))
    ran = small.run("get", "us")
    assert (ran.code, [ran.out.strip()]) == (0, small.granted), ran
    filler.unlink()
    assert small.served() == {small.granted[0]}
    assert len(small.granted) == 1
    assert list(small.untidy()) == []


@needs_root
@pytest.mark.parametrize(("hours", "code"), [(0.0, 7), (23.6, 0), (24.5, 7)], ids=["no token", "old one", "expired"])
def test_a_read_only_file_system_is_one_sentence(small: Desk, hours: float, code: int) -> None:
    """Nothing is issued that could not be kept: the token that serves goes on, else the error names the folder."""
    if hours:
        later(hours)(small)
    issued = len(small.granted)
    mount(small.folder, "-o", "remount,ro")
    ran = small.run("get", "us")
    assert ran.code == code, ran
    assert ran.err.startswith("tokencore: The token directory cannot be used") == (code == 7)
    assert len(small.granted) == issued
    mount(small.folder, "-o", "remount,rw")
    assert len(small.served()) == 1
    assert list(small.untidy()) == []


def mount(folder: Path, *options: str) -> None:
    """Mount a file system in memory at `folder`, or change the one there; skips where the machine forbids it."""
    done = subprocess.run(["/bin/mount", *options, str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mount is not allowed here: {done.stderr.strip()}")


@pytest.fixture
def small(make_desk: Make) -> Iterator[Desk]:
    """A desk whose folder is a file system of its own, of 64 kB."""
    with make_desk() as desk:
        desk.folder.mkdir(mode=0o700, parents=True)
        mount(desk.folder, "-t", "tmpfs", "-o", "size=64k,mode=0700", "tmpfs")
        try:
            yield desk
        finally:
            subprocess.run(["/bin/umount", "--lazy", str(desk.folder)], check=True)


@pytest.fixture
def nobodys(make_desk: Make) -> Iterator[Desk]:
    """A desk whose commands run without the rights of root."""
    with make_desk() as desk:
        desk.folder.mkdir(mode=0o700, parents=True)
        for path in (desk.folder.parent, desk.folder.parent.parent):
            path.chmod(0o755)
        os.chown(desk.folder, NOBODY, NOBODY)
        desk.user = NOBODY
        yield desk


@needs_root
@pytest.mark.parametrize("kind", ["folder", "token", "record", "lock"])
def test_what_an_ordinary_user_may_not_open_is_one_sentence(kind: str, nobodys: Desk) -> None:
    """Mode 000 on each of the files and on their folder: a token or a sentence, then all is well."""
    desk = nobodys
    later(24.5)(desk)
    places = {"folder": desk.folder, "token": desk.key_file, "record": desk.record}
    barred = places.get(kind, desk.record.with_suffix(".lock"))
    mode = barred.stat().st_mode
    barred.chmod(0)
    ran = desk.run("get", "us")
    assert ran.code in CLEAR, ran
    assert "Traceback" not in ran.err
    if barred.exists():
        barred.chmod(mode)
    assert desk.served() == {desk.granted[-1]}
    assert list(desk.untidy()) == []
    assert len(desk.granted) <= 3


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


@pytest.mark.parametrize("call", ["fstat", "flock", "fchmod", "open"])
def test_a_lock_that_the_system_refuses_is_exit_7_and_no_attempt(call: str, make_desk: Make) -> None:
    """Nothing is asked and nothing recorded, so the next process asks at once."""
    with make_desk() as desk:
        process = desk.start("get", "us")
        while process.at is not None and not (process.at.startswith(f"{call} ") and process.at.endswith(".lock")):
            process.go()
        process.go(errno.EIO)
        ran = process.finish()
        assert (ran.code, ran.out, desk.asked) == (7, "", []), ran
        assert "cannot be used" in ran.err
        began = desk.clock.true
        assert len(desk.served()) == 1
        assert desk.clock.true - began < 5


@pytest.mark.parametrize("state", ["record of 3 MB", "full disk"])
def test_the_ceiling_holds_or_the_refusal_says_why(state: str, make_desk: Make) -> None:
    """Six `get` with a lost token, seven hours apart in half the time of a day: two tokens, then exit 4 with a reason."""
    with make_desk() as desk:
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
            ends.append(process.finish() if state != "full disk" else on_a_full_disk(process))
            desk.clock.true += 3 * HOUR + 1
            desk.kis._customers[desk.key].token = None  # noqa: SLF001 - KIS's six hours are over
        assert len(desk.granted) - issued <= 2, ends
        assert {ran.code for ran in ends[2:]} == {4}
        assert "24-hour limit" in ends[-1].err
        assert desk.hurried() == []


TEXTS: dict[str, bytes] = {
    "empty": b"",
    "null": b"null",
    "list": b"[]",
    "not a number": b"NaN",
    "endless number": b'{"access_token": "a", "expires_at": 1e400}',
    "other types": b'{"access_token": ["a"], "expires_at": {}, "at": [], "outcome": 1}',
    "duplicate keys": b'{"access_token": "a", "access_token": null, "expires_at": 1, "expires_at": "x"}',
    "byte order mark": b"\xef\xbb\xbf{}",
    "garbage": bytes(range(256)) * 3,
    "nul bytes": b"\0" * 600,
    "nested": b"[" * 50_000,
    "10 MB": b"7" * 10_000_000,
    "far future": b'{"access_token": "a", "expires_at": "9999-12-31T23:59:59+00:00", "at": "9999-12-31T23:59:59Z"}',
    "far past": b'{"access_token": "a", "expires_at": "0001-01-01T00:00:00+00:00", "at": "0001-01-01T00:00:00Z"}',
}
KINDS = (*TEXTS, "folder", "pipe", "link", "dangling link", "foreign owner", "open mode")
PLACES = ("key", "us_api_token.json", "jsonl", "us_token_issued_at.dat")
COMMANDS = (("check", "--json"), ("history", "us"), ("get", "us"), ("tick",), ("get", "kr"))


def damage(path: Path, kind: str) -> None:
    """Put at `path` what the name says."""
    if kind in TEXTS:
        path.write_bytes(TEXTS[kind])
        return
    kept = path.with_name("elsewhere.aside")
    path.replace(kept)
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind.endswith("link"):
        path.symlink_to(kept if kind == "link" else "nowhere")
    else:
        shutil.copy(kept, path)
        path.chmod(0o666)
        if kind == "foreign owner":
            os.chown(path, 12_345, 12_345)


@needs_root
@pytest.mark.parametrize("place", PLACES)
def test_no_file_of_the_folder_stops_a_command(place: str, make_desk: Make, record_property: Count) -> None:
    """Whatever stands in place of token, view, record or mark: a documented code, no traceback, then a token for both.

    What another user could have planted is refused, until it is moved away.
    """
    with make_desk() as desk:
        later(24.5)(desk)
        back, kinds = desk.saved(), KINDS if FULL else KINDS[PLACES.index(place) :: 4]
        path = {"key": desk.key_file, "jsonl": desk.record}.get(place, desk.folder / place)
        for kind in kinds:
            back()
            damage(path, kind)
            for arguments in COMMANDS:
                ran = desk.run(*arguments)
                assert ran.code in CLEAR, (kind, arguments, ran)
                assert "Traceback" not in ran.err, (kind, arguments, ran)
            if kind in ("foreign owner", "open mode"):
                path.unlink()
            assert len(desk.served()) == 1, kind
            assert desk.hurried() == []
    record_property("cases", len(kinds) * len(COMMANDS))


ZONES = ("Asia/Seoul", "America/New_York", "UTC", "Pacific/Kiritimati", "Pacific/Pago_Pago", "Asia/Kolkata")


def test_zones_change_nothing(make_desk: Make) -> None:
    """What a process in one zone saved, processes in all others read alike: same token, same second, no request."""
    with make_desk() as desk:
        later(0)(desk)
        found = set()
        for zone in ZONES:
            assert desk.run("get", "us", TZ=zone).out.strip() == desk.granted[0]
            (status,) = json.loads(desk.run("check", "us", "--json", TZ=zone).out)
            found.add((datetime.fromisoformat(status["expires_at"]).timestamp(), status["remaining_hours"]))
        assert len(found) == len(desk.asked) == 1


@pytest.mark.parametrize("start", ["2038-01-19T03:13:30", "2106-02-07T06:28:00"])
def test_the_years_in_which_counters_end_are_years_like_others(start: str, make_desk: Make) -> None:
    """A renewal just before the second that 32 bits cannot count, and the next one after it."""
    with make_desk() as desk:
        desk.clock.set(datetime.fromisoformat(start).replace(tzinfo=UTC).timestamp())
        assert len(desk.served()) == 1
        desk.clock.true += HOUR
        assert len(desk.served()) == len(desk.asked) == 1
        assert list(desk.untidy()) == []


def as_version_0_1(desk: Desk, **outcome: object) -> None:
    """Leave the files as version 0.1 writes them: views without a key's file, and lines of 512 bytes."""
    desk.key_file.unlink(missing_ok=True)
    lines = [json.loads(line) for line in desk.record.read_text(encoding="utf-8").splitlines()]
    now = datetime.fromtimestamp(desk.clock.true, UTC).isoformat()
    lines = [{"cut": {"issued": 1}}, *lines, *([{"at": now, "pid": 4711, **outcome}] if outcome else [])]
    desk.record.write_text("".join(json.dumps(line).ljust(511) + "\n" for line in lines), encoding="utf-8")


@pytest.mark.parametrize("word", ["limit", "sent", "throttled"])
def test_an_attempt_of_another_version_starts_the_minute(word: str, make_desk: Make) -> None:
    """What it recorded counts here, also where the word for its outcome is not known yet."""
    with make_desk() as desk:
        later(25)(desk)
        as_version_0_1(desk, outcome=word)
        began = desk.clock.true
        assert desk.run("refresh", "us", "--force").code == 4
        assert len(desk.asked) == 1
        assert len(desk.served()) == 1
        assert desk.asked[-1].at - began >= MINUTE


@pytest.mark.parametrize("hours", [1.0, 23.6, 25.0])
def test_a_renewal_of_version_0_1_is_the_keys_token(hours: float, make_desk: Make) -> None:
    """It writes the views alone, beside a key's file with the token of before: that costs no request, at any age."""
    with make_desk() as desk:
        later(0)(desk)
        before = desk.key_file.read_bytes()
        desk.clock.true += hours * HOUR
        desk.kis._customers[desk.key].token = None  # noqa: SLF001 - it issues, whatever the age
        assert desk.run("refresh", "us", "--force").code == 0
        as_version_0_1(desk)
        desk.key_file.write_bytes(before)
        desk.key_file.chmod(0o600)
        asked = len(desk.asked)
        serving = {desk.granted[-1]} if hours > 2 else set(desk.granted)
        assert desk.served() <= serving
        assert desk.run("refresh", "us").code == 4  # its six hours
        assert len(desk.asked) == asked
        assert list(desk.untidy()) == []


def test_version_0_1_reads_what_stands_here(make_desk: Make) -> None:
    """Views as it knows them, a mark of whole seconds and a record of one object a line: what it goes by is there."""
    with make_desk() as desk:
        later(0)(desk)
        for market in MARKETS:
            view = desk.content(f"{market}_api_token.json")
            assert view
            assert {"access_token", "expires_at", "environment", "key_fingerprint", "issued_at"} <= set(view)
            mark = (desk.folder / f"{market}_token_issued_at.dat").read_text(encoding="ascii")
            assert abs(float(mark) - desk.clock.true) < 2
        (line,) = map(json.loads, desk.record.read_text(encoding="utf-8").splitlines())
        assert line["outcome"] == "issued"
        assert datetime.fromisoformat(line["at"]).tzinfo


HUGE, PIECE = 64 * 1024 * 1024, b"x" * 65_536  # bytes
MEMORY = 8 * 1024  # kB by which an answer may make the process grow; it is sent 64 MB
OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json; charset=UTF-8\r\n"
SPREAD = 8.0  # seconds by which whoever has waited may start late
BACKOFF, SELDOM = 65.0, 300.0  # seconds between attempts while the old token serves: after a failure, where it may last
SHORT = {"KIS_TIMEOUT": "0.05"}  # seconds, for what would otherwise be waited for in real time


def drip(text: bytes) -> Iterator[bytes]:
    """A byte at a time, each of them soon enough for a time-out that begins anew with every read."""
    for byte in text:
        yield bytes([byte])
        time.sleep(0.002)


def pieces(*parts: bytes | Iterable[bytes]) -> Iterator[bytes]:
    """The parts one after the other."""
    for part in parts:
        yield from [part] if isinstance(part, bytes) else part


def flood(before: bytes = b"", after: bytes = b"") -> Iterator[bytes]:
    """64 MB, in pieces."""
    return (before + PIECE + after for _ in range(HUGE // len(PIECE)))


def bomb() -> bytes:
    """64 kB that unpack to 64 MB."""
    packed = gzip.compress(b"\0" * HUGE)
    return b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n%s" % (len(packed), packed)


PLAYS: dict[str, Callable[[bytes], Iterator[bytes]]] = {
    "slow body": lambda answer: pieces(OK, b"Content-Length: 60000\r\n\r\n", drip(answer.ljust(60_000))),
    "a body of 64 MB": lambda _: pieces(OK, b"Content-Length: %d\r\n\r\n" % HUGE, flood()),
    "a header of 64 MB": lambda _: pieces(OK, b"X-Padding: ", flood()),
    "64 MB in chunks": lambda _: pieces(
        OK, b"Transfer-Encoding: chunked\r\n\r\n", flood(b"10000\r\n", b"\r\n")
    ),
    "64 MB out of 64 kB": lambda _: pieces(OK, bomb()),
    "another protocol": lambda _: pieces(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "half a header": lambda _: pieces(OK, b"Content-Le"),
    "half a body": lambda answer: pieces(OK, b"Content-Length: %d\r\n\r\n%s" % (len(answer), answer[:-40])),
    "JSON, but no object": lambda _: pieces(OK, b"Content-Length: 4\r\n\r\nnull"),
}


class Fault(NamedTuple):
    """What KIS does, and what has to come of it; one of `PLAYS` where `mode` is none of the sandbox's."""

    mode: str
    code: int  # of the command's exit
    outcome: str  # in the record
    kis: str | None = None  # its code, in the record too
    requests: int = 1  # that reach tokenP
    again: float | None = MINUTE  # seconds to the next request without a token; None where a person has to ask
    ahead: float = BACKOFF  # the same while the old token serves
    variables: dict[str, str] = {}  # noqa: RUF012 - never changed


FAULTS = {
    "port closed": Fault("", 6, "unreachable", requests=0, again=0),
    "HTTP 500": Fault("down", 6, "server_error", "EGW00002"),
    "hang": Fault("hang", 6, "no_answer", variables=SHORT),
    "closed without an answer": Fault("drop", 6, "no_answer"),
    "slow body": Fault("slow body", 6, "no_answer", variables=SHORT),
    "a header of 64 MB": Fault("a header of 64 MB", 6, "no_answer"),
    "a body of 64 MB": Fault("a body of 64 MB", 6, "no_answer"),
    "64 MB in chunks": Fault("64 MB in chunks", 6, "no_answer"),
    "64 MB out of 64 kB": Fault("64 MB out of 64 kB", 6, "no_answer"),
    "another protocol": Fault("another protocol", 6, "no_answer"),
    "half a header": Fault("half a header", 6, "bad_answer"),
    "half a body": Fault("half a body", 6, "no_answer"),
    "not JSON": Fault("garbage", 6, "bad_answer"),
    "JSON, but no object": Fault("JSON, but no object", 6, "bad_answer"),
    "200 without a token": Fault("no-token", 6, "bad_answer"),
    "a token past its expiry": Fault("past", 6, "bad_answer"),
    "a page of a proxy": Fault("html", 6, "refused", "HTTP 403"),
    "a redirect": Fault("redirect", 6, "refused", "HTTP 302"),
    "minute limit": Fault("limit", 4, "limit", "EGW00133", requests=2),
    "key locked out": Fault("bad-key", 5, "bad_key", "EGW00103", again=None, ahead=SELDOM),
    "wrong secret": Fault("bad-secret", 5, "bad_secret", "EGW00105", again=None, ahead=SELDOM),
}


@pytest.fixture
def desk(make_desk: Make) -> Iterator[Desk]:
    """A key of its own; KIS is well again afterwards."""
    with make_desk() as made:
        yield made
        made.kis.well()


def strike(desk: Desk, fault: Fault) -> None:
    """Let KIS do what the fault says from now on."""
    if not fault.mode:
        desk.kis.down()
    elif fault.mode in PLAYS:
        desk.kis.play = PLAYS[fault.mode]
    else:
        desk.kis.fail(fault.mode)


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
    ran = desk.run("get", "us", **fault.variables)
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
    ran = desk.run("get", "us", **fault.variables)
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


@pytest.mark.parametrize("name", [name for name in FAULTS if "64 MB" in name])
def test_an_answer_of_64_mb_takes_no_memory(name: str, desk: Desk) -> None:
    """The process grows by what one asks for a token takes anyway, whichever way the bytes come."""

    def measured() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        code = cli.main(("get", "us"))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        return code

    strike(desk, FAULTS[name])
    ran = desk.run(work=measured)
    assert ran.code == 6
    assert int(ran.out) < MEMORY


STEP = 10 if FULL else 40  # seconds after which a bot asks again


@pytest.mark.parametrize(
    ("mode", "hours", "requests", "code"),
    [("limit", 0.0, range(9, 13), 4), ("limit", 23.6, range(4, 6), 0), ("bad-key", 0.0, range(1, 2), 5), ("bad-key", 23.6, range(2, 3), 0)],
)
def test_ten_minutes_of_refusals_are_few_requests(
    mode: str, hours: float, requests: range, code: int, desk: Desk
) -> None:
    """A bot that asks again and again: one request a minute without a token, a few beside one, then one by a person."""
    if hours:
        later(hours)(desk)
    before, began = len(desk.asked), desk.clock.true
    desk.kis.fail(mode)
    while desk.clock.true < began + 10 * MINUTE:
        ran = desk.run("get", "us")
        assert ran.code == code
        assert ran.out.split() == desk.granted[: code == 0]
        desk.clock.true += STEP if code != 4 else 0
    assert len(desk.asked) - before in requests
    desk.kis.well()
    desk.clock.true += MINUTE
    assert desk.run("refresh", "us").code == 0
    assert list(desk.untidy()) == []


def test_the_same_token_again_is_no_renewal_and_leaves_kis_alone(desk: Desk) -> None:
    """KIS repeats a token that is about to expire: it is served to its end, and asked for every five minutes."""
    desk.kis.set_rules(same_token=86_400)
    later(23.6)(desk)
    began = desk.clock.true
    while desk.clock.true < began + 10 * MINUTE:
        assert desk.run("get", "us").out.split() == desk.granted
        desk.clock.true += STEP
    assert [asked.outcome for asked in desk.asked] == ["new", "same", "same"]
    assert desk.last_line() == ("same", None)
    assert desk.asked[-1].at - desk.asked[-2].at >= SELDOM


def rejected(token: str) -> Callable[[], int]:
    """Report a token that KIS rejected on a business call, as KISAuth does."""

    def work() -> int:
        try:
            print(USTokenManager().report_rejected(token))
        except TokenError as error:
            print(f"{type(error).__name__} {getattr(error, 'cause', '')}")
            return error.exit_code
        return 0

    return work


def test_a_dead_token_inside_the_six_hours_is_not_asked_for_again(desk: Desk) -> None:
    """KIS would hand it out again: no request, exit code 4 that says until when, and the new token after that."""
    later(1)(desk)
    ran = desk.run(work=rejected(desk.granted[0]))
    assert (ran.code, ran.out) == (4, "IssuanceLimitError same_token\n")
    assert "six hours after its issue" in desk.run("get", "us").err
    assert desk.run("check", "us").code == 3
    assert len(desk.asked) == 1
    desk.clock.true += 5 * HOUR
    ran = desk.run("get", "us")
    assert (ran.code, ran.out) == (0, f"{desk.granted[-1]}\n")
    assert [asked.outcome for asked in desk.asked] == ["new", "new"]
    assert list(desk.untidy()) == []


@pytest.mark.parametrize("again", [False, True], ids=["a new one", "the dead one again"])
def test_a_dead_token_outside_the_six_hours_is_replaced_at_once(desk: Desk, *, again: bool) -> None:
    """One request; the dead token is served to nobody even where KIS hands it out again, and KIS is left alone."""
    later(7)(desk)
    desk.kis.set_rules(same_token=86_400 if again else 21_600)
    ran = desk.run(work=rejected(desk.granted[0]))
    assert [asked.outcome for asked in desk.asked] == ["new", "same" if again else "new"]
    if again:
        assert (ran.code, desk.run("get", "us").out) == (3, "")
    else:
        assert (ran.code, ran.out) == (0, f"{desk.granted[-1]}\n")


TOKEN_FILE = json.dumps({"access_token": "opaque", "expires_at": "2027-01-01T00:00:00+00:00"}).encode()
LINE = json.dumps({"at": "2026-11-24T04:00:00+00:00", "outcome": "sent", "pid": 1}).encode()
SEEDS = (TOKEN_FILE, LINE, b"1795421700\n", b"token: a.b.c\nvalid-date: 2026-11-24 08:15:00\n", b"Bearer x", *TEXTS.values())
SIGNS = (b'"', b"{", b"}", b"[", b":", b"=", b".", b"\\", b"\n", b"\0", b"\xff", b"-", b"9" * 20, b"1e400")


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A seed of which a few pieces are replaced by signs, others' pieces or chance."""
    content = draw(st.sampled_from([seed for seed in SEEDS if len(seed) < 1000]))
    for _ in range(draw(st.integers(0, 4))):
        begin = draw(st.integers(0, len(content)))
        end = draw(st.integers(begin, min(len(content), begin + 12)))
        content = content[:begin] + draw(st.sampled_from(SIGNS) | st.binary(max_size=6)) + content[end:]
    return content


@hypothesis_settings(max_examples=3000 if FULL else 200, database=None)
@given(content=damaged() | st.binary(max_size=200))
def test_any_bytes_are_something_or_nothing(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Token file, view, mark and record are read as something or nothing; what is a token can be saved and read again."""
    store = open_store(make_market("us", token_dir=tmp_path_factory.getbasetemp()), lambda: ["us"])
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
