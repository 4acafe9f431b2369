"""KIS at its worst: each fault is one clear error or the old token, counts as it should, and leads to one next attempt.

What one answer means is proved in test_issuer, what the limits make of it in test_limits and test_keeper; here the real
command meets each of them on a real connection, without a token, with an expired one and with one that still serves.
"""

from __future__ import annotations

import json
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import misbehaving
import pytest
from misbehaving import Misbehaving
from running import Ran, one_line
from scenarios import FULL, HOUR, Desk, untidy
from stepping import Clock, preload

from tokencore import (
    CredentialsError,
    IssuanceLimitError,
    IssuerUnavailableError,
    TokenError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MINUTE = 60.0
BACKOFF, SELDOM = 65.0, 300.0  # seconds between attempts while the old token serves: after a failure, where it may last
SHORT = {"KIS_TIMEOUT": "0.05"}  # seconds, for what would otherwise be waited for in real time


class Fault(NamedTuple):
    """What KIS does, and what has to come of it."""

    begin: Callable[[Misbehaving], object]
    error: type[TokenError]
    outcome: str  # in the record
    code: str | None = None  # the same
    requests: int = 1  # that reach tokenP
    again: float | None = MINUTE  # seconds to the next request without a token; None where a person has to ask
    ahead: float = BACKOFF  # the same while the old token serves
    variables: dict[str, str] = {}  # noqa: RUF012 - never changed


def mode(name: str) -> Callable[[Misbehaving], object]:
    """One of the sandbox's own failures."""
    return lambda kis: kis.fail(name)


def play(wild: Callable[[bytes], Iterator[bytes]]) -> Callable[[Misbehaving], object]:
    """An answer that is not what HTTP or JSON have in mind."""
    return lambda kis: setattr(kis, "play", wild)


no_answer = partial(Fault, error=IssuerUnavailableError, outcome="no_answer")
bad_answer = partial(Fault, error=IssuerUnavailableError, outcome="bad_answer")
locked_out = partial(Fault, error=CredentialsError, again=None, ahead=SELDOM)
FAULTS = {
    "port closed": Fault(Misbehaving.down, IssuerUnavailableError, "unreachable", requests=0, again=0),
    "HTTP 500": Fault(mode("down"), IssuerUnavailableError, "server_error", "EGW00002"),
    "hang": no_answer(mode("hang"), variables=SHORT),
    "closed without an answer": no_answer(mode("drop")),
    "slow body": no_answer(play(misbehaving.slow_body), variables=SHORT),
    "a header of 64 MB": no_answer(play(misbehaving.endless_header)),
    "a body of 64 MB": no_answer(mode("huge")),
    "64 MB in chunks": no_answer(play(misbehaving.endless_chunks)),
    "64 MB out of 64 kB": no_answer(play(misbehaving.bomb)),
    "another protocol": no_answer(play(misbehaving.no_http)),
    "half a header": bad_answer(play(misbehaving.half_a_header)),
    "half a body": no_answer(play(misbehaving.half_a_body)),
    "not JSON": bad_answer(mode("garbage")),
    "JSON, but no object": bad_answer(play(misbehaving.null)),
    "200 without a token": bad_answer(mode("no-token")),
    "a token past its expiry": bad_answer(mode("past")),
    "a page of a proxy": Fault(mode("html"), IssuerUnavailableError, "refused", "HTTP 403"),
    "a redirect": Fault(mode("redirect"), IssuerUnavailableError, "refused", "HTTP 302"),
    "minute limit": Fault(mode("limit"), IssuanceLimitError, "limit", "EGW00133", requests=2, again=MINUTE),
    "key locked out": locked_out(mode("bad-key"), outcome="bad_key", code="EGW00103"),
    "wrong secret": locked_out(mode("bad-secret"), outcome="bad_secret", code="EGW00105"),
}


@pytest.fixture(scope="module")
def kis() -> Iterator[Misbehaving]:
    """KIS, which does as it is told."""
    preload()
    with Misbehaving(Clock()) as running:
        yield running


@pytest.fixture
def desk(kis: Misbehaving) -> Iterator[Desk]:
    """A key of its own, whose token is kept in memory."""
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108 - a disk's own fsync proves nothing here
    with tempfile.TemporaryDirectory(dir=memory) as base, Desk(kis, kis.clock, Path(base)) as made:
        yield made
        kis.well()


def with_token(desk: Desk, hours: float) -> str:
    """Let the desk have a token that was issued so many hours ago."""
    assert desk.run("get", "us").code == 0
    desk.clock.true += hours * HOUR
    return desk.granted[-1]


def last_line(desk: Desk) -> tuple[str, str | None]:
    """The record's last outcome and code."""
    line = json.loads(desk.path(".jsonl").read_text(encoding="utf-8").splitlines()[-1])
    return line["outcome"], line["code"]


def gap(desk: Desk) -> float:
    """The seconds between the last two requests."""
    return desk.asked[-1].at - desk.asked[-2].at


# A part of the run has each fault in one of the two states only.
@pytest.mark.parametrize(
    ("name", "hours"),
    [(name, hours) for n, name in enumerate(FAULTS) for hours in ((0.0, 24.5) if FULL else (24.5 * (n % 2),))],
)
def test_without_a_token_each_fault_is_one_error_and_one_next_attempt(
    name: str, hours: float, kis: Misbehaving, desk: Desk
) -> None:
    """One sentence and its exit code, counted requests, a line in the record; then the next command has the token."""
    fault = FAULTS[name]
    if hours:
        with_token(desk, hours)
    before = len(desk.asked)
    fault.begin(kis)
    ran = desk.run("get", "us", **fault.variables)
    assert ran.code == fault.error.exit_code, ran
    one_line(ran)
    assert len(desk.asked) - before == fault.requests
    assert last_line(desk) == (fault.outcome, fault.code)
    kis.well()
    began = desk.clock.true
    if fault.again is None:
        assert desk.run("get", "us").code == fault.error.exit_code
        assert (len(desk.asked) - before, desk.clock.true - began < 1) == (fault.requests, True)
        desk.clock.true += MINUTE
        assert desk.run("refresh", "us").code == 0
    assert desk.run("get", "us") == Ran(0, f"{desk.granted[-1]}\n", "")
    if fault.requests and fault.again:
        assert MINUTE <= gap(desk) < MINUTE + 2
    assert fault.again != 0 or desk.clock.true - began < 1
    assert list(untidy(desk)) == []


@pytest.mark.parametrize("name", FAULTS)
def test_with_a_token_that_serves_each_fault_is_a_warning(name: str, kis: Misbehaving, desk: Desk) -> None:
    """The old token comes at once, the request is counted and recorded, and KIS is left alone for a while."""
    fault, old = FAULTS[name], with_token(desk, 23.6)
    before, began = len(desk.asked), desk.clock.true
    fault.begin(kis)
    assert desk.run("get", "us", **fault.variables) == Ran(0, f"{old}\n", "")
    assert desk.clock.true - began < 5  # seconds, of which the tries to connect take 4
    assert len(desk.asked) - before == min(fault.requests, 1)
    assert last_line(desk) == (fault.outcome, fault.code)
    kis.well()
    desk.clock.true = began + fault.ahead - 1
    assert desk.run("get", "us").out == f"{old}\n"
    assert len(desk.asked) - before == min(fault.requests, 1)
    desk.clock.true = began + fault.ahead + 5
    assert desk.run("get", "us").code == 0
    assert desk.token("us") == desk.granted[-1] != old
    assert list(untidy(desk)) == []
