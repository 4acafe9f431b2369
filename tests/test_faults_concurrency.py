"""Two and more at once, whatever befalls them: one request, one token for all, and no second one within the minute.

That a fork inherits neither lock nor gate, and that a killed holder's lock is free within milliseconds, is proved in
test_lock and test_concurrency on the system's own clock; here every order of two commands' calls has its turn.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import tarfile
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest
from builders import in_child, killed, make_token
from conftest import ROOT
from running import Ran, asked, folder, on_disk, outcomes, start, tokencore
from scenarios import FULL, SCENARIOS, Desk, Scenario, desks, served, still_serving, tokens_of, untidy

from tokencore import USTokenManager

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from stepping import Stepped

    from tokencore.sandbox import Sandbox

make_desk = pytest.fixture(scope="module", name="make_desk")(desks)
PROCESSES, THREADS = (200, 4) if FULL else (24, 4)
READS = 200_000 if FULL else 20_000
RIVALS = ("first token", "expired", "about to expire", "refresh by hand", "damaged file", "lost record")
EVERY = 1 if FULL else 48  # calls; the part that a run takes begins elsewhere in each case
CLEAR = (0, 3, 4, 7)  # exit codes of two that compete: a token, or a sentence about the rival, KIS's limit or the lock
LONGEST = 200.0  # seconds: what a command may wait, with a rival that dies or stops
EARLIER = "d01a11135083"  # the version before the product could import, hold approval keys and shorten its records
WANT_A_TOKEN = "import sys, tokencore; sys.stdin.read(); print(tokencore.TokenManager('us').get_valid_token())"
NURSERY = """
import json, os, sys, threading, time
from tokencore import TokenManager

processes, threads = int(sys.argv[1]), int(sys.argv[2])
TokenManager("us")  # what it imports is imported once
shut, door = os.pipe()
for number in range(processes):
    if os.fork():
        continue
    os.close(door)
    shared, got = TokenManager(("us", "kr")[number % 2]), []

    def want(own):
        os.read(shut, 1)  # until the last process has been started
        got.append(own.get_valid_token())

    wanting = [threading.Thread(target=want, args=(TokenManager("us") if n % 2 else shared,)) for n in range(threads)]
    [one.start() for one in wanting]
    [one.join() for one in wanting]
    os.write(1, (json.dumps([len(got), sorted(set(got)), time.monotonic()]) + "\\n").encode())
    os._exit(0)
began = time.monotonic()
os.close(door)
while True:
    try:
        os.wait()
    except ChildProcessError:
        break
print(json.dumps(began))
"""


def test_hundreds_of_threads_in_many_processes_make_one_request(
    slow: Sandbox, record_property: Callable[[str, object], None]
) -> None:
    """All want a token in the same instant, with the minute limit on: one request, and everyone has its token."""
    program = start(NURSERY, str(PROCESSES), str(THREADS))
    out, err = program.communicate(timeout=120)
    assert (program.returncode, err) == (0, "")
    *told, began = map(json.loads, out.splitlines())
    assert len(told) == PROCESSES
    assert [count for count, _, _ in told] == [THREADS] * PROCESSES
    assert {text for _, texts, _ in told for text in texts} == {on_disk().access_token}
    assert asked(slow) == 1
    assert outcomes() == ["issued"]
    print(f"{PROCESSES} x {THREADS}: the last was served after {max(at for _, _, at in told) - began:.2f} s")
    record_property("cases", PROCESSES * THREADS)


def wrong(scenario: Scenario, desk: Desk, old: dict[str, str | None], ends: list[Ran]) -> Iterator[str]:
    """What is not as it must be after two commands met; nothing where all is well."""
    if any(ran.code not in CLEAR or "Traceback" in ran.err for ran in ends):
        yield f"unclear: {ends}"
    texts = {ran.out.strip() for ran in ends if not ran.code and ran.out.startswith("eyJ")}
    if not texts <= {desk.granted[-1], *(still_serving(old) if scenario.keeps else ())}:
        yield f"someone got another token: {len(texts)} of {len(desk.granted)}"
    if not all(text in {old[market], *desk.granted} for market, text in tokens_of(desk).items()):
        yield "a file holds neither the old nor the new token"
    answers = served(desk)
    if not answers <= {desk.granted[-1], *(still_serving(old) if scenario.keeps else ())}:
        yield f"the next processes got {len(answers)} tokens, not only those that serve"
    yield from untidy(desk)


def to_the_end(*processes: Stepped) -> list[Ran]:
    """Let all of them take turns, call by call, until the last has ended."""
    while any(one.at is not None for one in processes):
        for one in processes:
            if one.at is not None:
                one.go()
    return [one.ran for one in processes]


def met(
    desk: Desk, name: str, happens: Callable[[Desk, Stepped, Stepped], list[Ran]]
) -> tuple[int, list[tuple[int, str, str]]]:
    """Let two of the scenario's command meet with one of them at each call: how many times, and all that went wrong."""
    scenario, cases, found = SCENARIOS[name], 0, []
    scenario.prepare(desk)
    old, issued, again = tokens_of(desk), len(desk.granted), desk.saved()
    calls = desk.calls(*scenario.arguments)
    turn = RIVALS.index(name) + len(RIVALS) * [*MEETINGS].index(happens)
    for number in range(turn * 11 % EVERY, len(calls), EVERY):
        again()
        first = desk.start(*scenario.arguments)
        for _ in range(number):
            first.go()
        began, second = desk.clock.true, desk.start(*scenario.arguments)
        ends = happens(desk, first, second)
        cases += 1
        if desk.clock.true - began > LONGEST:
            found.append((number, calls[number], f"they waited {desk.clock.true - began:.0f} s"))
        if len(desk.granted) - issued > 1:
            found.append((number, calls[number], "KIS issued two tokens"))
        found += [(number, calls[number], what) for what in wrong(scenario, desk, old, ends)]
    return cases, found


def side_by_side(_: Desk, first: Stepped, second: Stepped) -> list[Ran]:
    """Both go on in turns."""
    return to_the_end(first, second)


def one_stops(_: Desk, first: Stepped, second: Stepped) -> list[Ran]:
    """One is not given the processor until the other is done."""
    return [second.finish(), first.finish()]


def one_dies(_: Desk, first: Stepped, second: Stepped) -> list[Ran]:
    """One is killed while the other waits for it, or is as far as it can get without it."""
    calls = 0
    while second.at is not None and not second.at.startswith("sleep") and calls < 40:
        second.go()
        calls += 1
    first.kill()
    return [second.finish()]


def lock_deleted(desk: Desk, first: Stepped, second: Stepped) -> list[Ran]:
    """Someone tidies up the lock's file."""
    for path in desk.folder.glob("*.lock"):
        path.unlink()
    return to_the_end(first, second)


def lock_replaced(desk: Desk, first: Stepped, second: Stepped) -> list[Ran]:
    """Someone restores the lock's file from a backup."""
    for path in desk.folder.glob("*.lock"):
        copy = path.with_suffix(".aside")
        copy.write_bytes(b"")
        copy.chmod(0o600)
        copy.replace(path)
    return to_the_end(first, second)


MEETINGS: list[Callable[[Desk, Stepped, Stepped], list[Ran]]] = [
    side_by_side,
    one_stops,
    one_dies,
    lock_deleted,
    lock_replaced,
]


@pytest.mark.parametrize("happens", MEETINGS)
@pytest.mark.parametrize("name", RIVALS)
def test_two_that_meet_at_any_call_make_one_request(
    name: str,
    happens: Callable[[Desk, Stepped, Stepped], list[Ran]],
    make_desk: Callable[[], Desk],
    record_property: Callable[[str, object], None],
) -> None:
    """Whichever call one of them stands before: one token, for both, and none asked for within the minute."""
    with make_desk() as desk:
        cases, found = met(desk, name, happens)
    assert not found, "\n".join(map(str, found))
    assert cases
    record_property("cases", cases)


@pytest.mark.usefixtures("gateway")
def test_a_busy_writer_tears_nothing_for_readers(record_property: Callable[[str, object], None]) -> None:
    """Beside a process that saves tokens and records all the time, each read is a whole token and a whole record."""
    tokens = [make_token(life) for life in (80_000, 86_400)]
    texts = {token.access_token for token in tokens}
    manager, path = USTokenManager(), folder() / "us_api_token.json"
    manager.save_token(tokens[0])
    manager.take(tokens[1])

    def write_on() -> None:
        for token in itertools.cycle(tokens):
            manager.save_token(token)

    writer, seen, torn, inodes = in_child(write_on), set(), 0, set()
    reader = USTokenManager()
    try:
        for number in range(READS // 2):
            token = reader.load_token()
            torn += token is None or token.access_token not in texts
            seen.add(json.loads(path.read_bytes())["access_token"])
            if number % 100 == 0:
                inodes.add(path.stat().st_ino)
                torn += [attempt.outcome.value for attempt in reader.history()] != ["imported"]
    finally:
        killed(writer)
    assert (torn, seen) == (0, texts)
    assert len(inodes) > 1
    record_property("cases", READS)


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder with an earlier version of the package, from the history; skips where that is not there."""
    git = shutil.which("git") or "/nowhere/git"
    archive = [git, "-C", str(ROOT), "archive", EARLIER, "tokencore"]
    try:
        packed = subprocess.run(archive, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("the history does not reach back to an earlier version")
    home = tmp_path_factory.mktemp("earlier")
    with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as unpacked:
        unpacked.extractall(home, filter="data")
    return str(home)


def ran(version: str, *arguments: str) -> Ran:
    """Run a command of the version in this folder."""
    done = subprocess.run(
        [sys.executable, "-m", "tokencore", *arguments],
        env={**os.environ, "PYTHONPATH": version},
        capture_output=True,
        text=True,
        check=False,
    )
    return Ran(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("newer_first", [False, True], ids=["earlier first", "newer first"])
def test_two_versions_share_one_token_and_one_minute(
    earlier: str, slow: Sandbox, *, newer_first: bool, record_property: Callable[[str, object], None]
) -> None:
    """The token and the attempts of the one are the other's: no second request, also not after a refusal."""
    first, second = (str(ROOT), earlier) if newer_first else (earlier, str(ROOT))
    got = ran(first, "get", "us")
    assert (got.code, asked(slow)) == (0, 1)
    assert ran(second, "get", "kr") == got
    assert ran(second, "check").code == 0
    assert [line["outcome"] for line in json.loads(ran(second, "history", "us", "--json").out)] == ["issued"]
    assert ran(second, "refresh", "us", "--force").code == 4  # the minute of the other's request
    assert ran(second, "delete", "us").code == ran(second, "delete", "kr").code == 0
    assert asked(slow) == 1
    record_property("cases", 6)


def test_processes_of_two_versions_make_one_request(
    earlier: str, slow: Sandbox, record_property: Callable[[str, object], None]
) -> None:
    """Both queue for the same lock and find the same token."""
    want = (
        "import sys; from tokencore import TokenManager; sys.stdin.read(); print(TokenManager('us').get_valid_token())"
    )
    started = [start(want, PYTHONPATH=version) for version in (earlier, str(ROOT)) * (8 if FULL else 3)]
    ends = [one.communicate(timeout=60) for one in started]
    assert {(one.returncode, *end) for one, end in zip(started, ends, strict=True)} == {
        (0, f"{on_disk().access_token}\n", "")
    }
    assert asked(slow) == 1
    record_property("cases", len(started))


FROM_EARLIER = (  # a line as EARLIER wrote it
    '{"at": "%s", "outcome": "%s", "code": null, "expires_at": null, '
    '"reason": "get us", "credentials": "0123abcd", "pid": 4711}'
)
FROM_LATER = '{"at": "%s", "outcome": "%s", "host": {"name": "bot"}, "code": "EGW09999", "pid": 4711, "lane": 2}'


@pytest.mark.parametrize(
    ("line", "word"),
    [(FROM_EARLIER, "limit"), (FROM_EARLIER, "sent"), (FROM_LATER, "limit"), (FROM_LATER, "throttled")],
    ids=["earlier", "earlier, died", "later", "later, with a word of its own"],
)
def test_an_attempt_of_another_version_starts_the_minute(
    line: str, word: str, slow: Sandbox, record_property: Callable[[str, object], None]
) -> None:
    """What it recorded counts here, also where the word for its outcome is not known yet."""
    USTokenManager().save_token(make_token(life=400, age=86_000))  # makes the folder; it does not serve
    path = next(folder().glob("key-*.lock")).with_suffix(".jsonl")
    path.write_bytes((line % (datetime.now(UTC).isoformat(), word)).encode().ljust(511) + b"\n")
    path.chmod(0o600)
    assert tokencore("refresh", "us", "--force").code == 4
    assert asked(slow) == 0
    record_property("cases", 1)
