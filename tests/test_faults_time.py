"""Clocks that jump, machines that sleep, zones that change: no token is lost by it, and nobody waits long."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import signal
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo

import pytest
from builders import make_answer
from conftest import LATENCY
from running import Ran, asked, cached, on_disk, one_line, outcomes, start, until
from scenarios import (
    FULL,
    HOUR,
    MARKETS,
    MINUTE,
    SCENARIOS,
    Desk,
    desks,
    needs_space,
    served,
    still_serving,
    tokens_of,
    untidy,
)

from tokencore.tokens import from_answer, from_cache

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from scenarios import Scenario

    from tokencore.sandbox import Sandbox

make_desk = pytest.fixture(scope="module", name="make_desk")(desks)
JUMPS = (HOUR, -HOUR, 25 * HOUR, -25 * HOUR)
SLEEPS = (8 * HOUR, 30 * HOUR)
TIMED = ("first token", "expired", "about to expire", "refresh by hand")
EVERY = 1 if FULL else 60  # calls; which ones is different for each jump
CLOSELY = 1 if FULL else 4  # calls: so many lie between the line in the record and the request
LATE = 40.0  # seconds that three tries to connect can take
LONGEST = 200.0  # seconds: a command waits out two cool-downs at most, by a clock that does not jump
CLEAR = (0, 3, 4, 6)
STOPS = 24 if FULL else 2  # moments of a command's life at which it is stopped
GET = "import sys; from tokencore.cli import main; sys.exit(main(('get', sys.argv[1])))"
ZONES = ("Asia/Seoul", "America/New_York", "UTC", "Pacific/Kiritimati", "Pacific/Pago_Pago", "Asia/Kolkata")


def wrong(scenario: Scenario, desk: Desk, old: dict[str, str | None], ran: Ran, took: float) -> Iterator[str]:
    """What is not as it must be after time went astray amid a command that took so long; nothing where all is well."""
    now = tokens_of(desk)
    if ran.code not in CLEAR or "Traceback" in ran.err:
        yield f"unclear: {ran}"
    if not all(now[market] in {old[market], *desk.granted} for market in MARKETS):
        yield "a file holds neither the old nor the new token"
    if took > LONGEST:
        yield f"it waited {took} s"
    desk.clock.true += 2 * MINUTE  # before someone mends the clock, which may be one more jump ahead
    desk.clock.wrong = 0.0
    if not served(desk) <= {desk.granted[-1], *(still_serving(old) if scenario.keeps else ())}:
        yield "with the right time again, the next processes got no token that serves"
    yield from untidy(desk)


def amid(desk: Desk, name: str, number: int, happens: Callable[[], None]) -> tuple[Ran, float]:
    """Let something happen to the time before the command's call with this number; its end, and how long it took."""
    process = desk.start(*SCENARIOS[name].arguments)
    for _ in range(number):
        process.go()
    happens()
    began = desk.clock.true
    return process.finish(), desk.clock.true - began


@pytest.mark.parametrize("jump", JUMPS, ids="{:+.0f} s".format)
@pytest.mark.parametrize("name", TIMED)
def test_a_clock_that_jumps_costs_no_token(
    name: str, jump: float, make_desk: Callable[[], Desk], record_property: Callable[[str, object], None]
) -> None:
    """An hour or more than a day, either way, between any two calls: a token or a sentence, and no endless wait."""
    scenario, found, cases = SCENARIOS[name], [], 0
    with make_desk() as desk:
        scenario.prepare(desk)
        old, again, calls = tokens_of(desk), desk.saved(), desk.calls(*scenario.arguments)
        for number in range((JUMPS.index(jump) + TIMED.index(name)) * 7 % min(EVERY, len(calls)), len(calls), EVERY):
            again()
            ran, took = amid(desk, name, number, lambda: setattr(desk.clock, "wrong", jump))
            cases += 1
            bad = wrong(scenario, desk, old, ran, took)
            # A clock that jumps ahead ends a minute that KIS still counts: it refuses, and that is waited out.
            found += [(number, calls[number], what) for what in bad if jump < 0 or "minute" not in what]
    assert not found, "\n".join(map(str, found))
    record_property("cases", cases)


@pytest.mark.parametrize("asleep", SLEEPS, ids="{:.0f} s".format)
@pytest.mark.parametrize("name", TIMED)
def test_a_machine_that_sleeps_amid_a_renewal_costs_no_token(
    name: str, asleep: float, make_desk: Callable[[], Desk], record_property: Callable[[str, object], None]
) -> None:
    """A night or more than a token's life between any two calls, of which the monotonic clock knows nothing."""
    scenario, found, cases = SCENARIOS[name], [], 0
    with make_desk() as desk:
        scenario.prepare(desk)
        again, calls = desk.saved(), desk.calls(*scenario.arguments)
        for number in range((SLEEPS.index(asleep) + TIMED.index(name)) * 7 % min(EVERY, len(calls)), len(calls), EVERY):
            again()
            old = tokens_of(desk)
            ran, took = amid(desk, name, number, lambda: desk.clock.sleep(asleep))
            cases += 1
            found += [(number, calls[number], what) for what in wrong(scenario, desk, old, ran, took)]
    assert not found, "\n".join(map(str, found))
    record_property("cases", cases)


@pytest.mark.parametrize("name", ["first token", "expired"])
def test_a_request_after_a_sleep_on_a_full_disk_starts_the_minute(
    name: str, make_desk: Callable[[], Desk], record_property: Callable[[str, object], None]
) -> None:
    """A machine sleeps between any two calls and finds its disk full: the next process keeps KIS's minute all the same.

    The line in the record, of before the sleep, can then not be completed.
    """
    scenario, found, cases = SCENARIOS[name], [], 0
    with make_desk() as desk:
        scenario.prepare(desk)
        again, calls = desk.saved(), desk.calls(*scenario.arguments)
        for number in range(0, len(calls), CLOSELY):
            again()
            process = desk.start(*scenario.arguments)
            for _ in range(number):
                process.go()
            desk.clock.sleep(SLEEPS[0])
            while process.at is not None:
                process.go(errno.ENOSPC if needs_space(process.at) else 0)
            served(desk)
            cases += 1
            times = [asked.at for asked in desk.asked]
            found += [(number, calls[number]) for a, b in itertools.pairwise(times) if b - a < MINUTE]
    assert not found, "\n".join(map(str, found))
    record_property("cases", cases)


@pytest.mark.parametrize("name", ["first token", "expired"])
def test_a_request_that_leaves_late_starts_the_minute_then(
    name: str, make_desk: Callable[[], Desk], record_property: Callable[[str, object], None]
) -> None:
    """A process stands still before any call until the connection stands, asks, and is killed before the answer.

    The next one counts KIS's minute from the request, not from the line that was written before it.
    """
    scenario, found, cases = SCENARIOS[name], [], 0
    with make_desk() as desk:
        scenario.prepare(desk)
        again, calls = desk.saved(), desk.calls(*scenario.arguments)
        for number in range(calls.index("connect socket"), -1, -CLOSELY):
            again()
            process, before = desk.start(*scenario.arguments), len(desk.asked)
            for _ in range(number):
                process.go()
            desk.clock.true += LATE
            while len(desk.asked) == before:
                process.go()
            process.kill()
            served(desk)
            cases += 1
            times = [asked.at for asked in desk.asked]
            found += [(number, calls[number]) for a, b in itertools.pairwise(times) if b - a < MINUTE]
    assert not found, "\n".join(map(str, found))
    record_property("cases", cases)


@contextlib.contextmanager
def stopped(command: subprocess.Popen[str]) -> Iterator[None]:
    """The process stands still, as one that a debugger, a full machine or a person at a terminal has stopped."""
    command.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        command.send_signal(signal.SIGCONT)


def end(command: subprocess.Popen[str]) -> Ran:
    """How it ended."""
    out, err = command.communicate(timeout=60)
    return Ran(command.returncode, out, err)


@pytest.mark.usefixtures("nowhere")
def test_others_go_on_beside_a_renewal_that_stands_still(
    slow: Sandbox,
    isolated: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    """Stopped at any moment, it delays nobody while the old token serves; in the end one request has been sent."""
    began = time.monotonic()
    assert end(start(GET, "us")).code == 0
    life = time.monotonic() - began
    for number in range(STOPS):
        monkeypatch.setenv("KIS_APP_KEY", f"PSstopped{number:02d}" + "k" * 25)
        monkeypatch.setenv("KIS_TOKEN_DIR", str(isolated / f"tokens-{number}"))
        before, old = asked(slow), cached(1_500).access_token
        first = start(GET, "us")
        time.sleep(life * (number + 0.5) / STOPS)
        with stopped(first):
            others = [end(start(GET, market)) for market in MARKETS]
        ends = [end(first), *others]
        assert [one.code for one in ends] == [0] * 3, ends
        assert {one.out.strip() for one in ends} <= {old, on_disk().access_token}
        assert old != on_disk().access_token == on_disk("kr").access_token
        assert asked(slow) - before == 1
        assert outcomes() == ["issued"]
    record_property("cases", STOPS)


def test_a_renewal_that_stands_still_amid_its_request_keeps_the_only_one(slow: Sandbox) -> None:
    """Who has no token waits for it; the answer that came meanwhile is read and saved, and serves them all."""
    first = start(GET, "us")
    until(lambda: asked(slow) == 1)
    with stopped(first):
        others = [start(GET, market) for market in MARKETS]
        time.sleep(3 * LATENCY)
        assert [one.poll() for one in others] == [None, None]
    ends = [end(one) for one in (first, *others)]
    assert {*ends} == {Ran(0, f"{on_disk().access_token}\n", "")}
    assert asked(slow) == 1


def test_a_renewal_that_stands_still_for_longer_than_anyone_waits_loses_nothing(
    slow: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waited for it is told so and asks nothing of KIS; the answer is as good as it was when it came."""
    monkeypatch.setenv("KIS_TIMEOUT", "0.5")
    first = start(GET, "us")
    until(lambda: asked(slow) == 1)
    with stopped(first):
        waited = end(start(GET, "kr"))
        assert waited.code == 3
        assert "Another process has held the key's lock" in one_line(waited)
    assert end(first) == Ran(0, f"{on_disk().access_token}\n", "")
    assert end(start(GET, "kr")).out.strip() == on_disk("kr").access_token == on_disk().access_token
    assert asked(slow) == 1


def test_zones_change_nothing(make_desk: Callable[[], Desk], record_property: Callable[[str, object], None]) -> None:
    """What a process in one zone saved, processes in all others read alike: same token, same second, no request."""
    with make_desk() as desk:
        assert desk.run("get", "us", TZ=ZONES[0]).code == 0
        told = set()
        for zone in ZONES:
            assert desk.run("get", "us", TZ=zone).out.strip() == desk.granted[0]
            (status,) = json.loads(desk.run("check", "us", "--json", TZ=zone).out)
            told.add((datetime.fromisoformat(status["expires_at"]).timestamp(), status["remaining_hours"]))
        assert len(told) == 1
        assert len(desk.asked) == 1
    record_property("cases", len(ZONES))


@pytest.mark.parametrize("start", ["2038-01-19T03:13:30", "2099-12-31T23:59:50", "2106-02-07T06:28:00"])
def test_the_years_in_which_counters_end_are_years_like_others(
    start: str, make_desk: Callable[[], Desk], record_property: Callable[[str, object], None]
) -> None:
    """A renewal just before the second that 32 bits cannot count, and the next one after it."""
    with make_desk() as desk:
        desk.clock.set(datetime.fromisoformat(start).replace(tzinfo=UTC).timestamp())
        assert len(served(desk)) == 1
        desk.clock.true += HOUR
        assert len(served(desk)) == len(desk.asked) == 1
        assert list(untidy(desk)) == []
    record_property("cases", 1)


@pytest.fixture(params=["America/New_York", "Europe/London", "Australia/Lord_Howe"])
def changing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ZoneInfo]:
    """A zone whose clocks change, as this machine's own."""
    monkeypatch.setenv("TZ", request.param)
    time.tzset()
    yield ZoneInfo(request.param)
    monkeypatch.undo()
    time.tzset()


def test_an_earlier_tools_local_times_never_make_a_token_live_longer(
    changing: ZoneInfo, record_property: Callable[[str, object], None]
) -> None:
    """Naive times around every change of the clocks: what a tool wrote as a day is read as a day at most."""
    hours = range(0, 366 * 24, 1 if FULL else 7)
    for begun in (datetime(2026, 1, 1, 0, 30, tzinfo=UTC) + timedelta(hours=hour) for hour in hours):
        local = begun.astimezone(changing).replace(tzinfo=None)
        content = {
            "access_token": "opaque",
            "expires_at": (local + timedelta(days=1)).isoformat(),
            "cached_at": local.isoformat(),
        }
        token = from_cache(content)
        assert begun + timedelta(hours=22) <= token.expires_at <= begun + timedelta(days=1), begun
    record_property("cases", len(hours))


def test_a_leap_second_is_a_time() -> None:
    """KIS's text with a sixtieth second is no reason to throw a token away."""
    received = datetime(2026, 12, 31, 0, 0, tzinfo=UTC)
    answer = {**make_answer(now=received), "access_token": "opaque", "expires_in": None}
    token = from_answer({**answer, "access_token_token_expired": "2027-01-01 08:59:60"}, received)
    assert token.expires_at == datetime(2026, 12, 31, 23, 59, 59, tzinfo=UTC)
