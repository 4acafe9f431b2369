"""KIS at its worst: each fault is one clear error or the old token, counts as it should, and leads to one next attempt.

What one answer means is proved in test_issuer, what the limits make of it in test_limits and test_keeper; here the real
command meets each of them on a real connection, without a token, with an expired one and with one that still serves.
"""

from __future__ import annotations

import json
import resource
import shutil
import ssl
import subprocess
import tempfile
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import misbehaving
import pytest
from builders import make_answer
from misbehaving import Misbehaving
from running import Ran, one_line
from scenarios import DAY, FULL, HOUR, Desk, untidy
from stepping import Clock, Stepped, command, preload, settings
from wires import Wire

from tokencore import (
    CredentialsError,
    IssuanceLimitError,
    IssuerUnavailableError,
    TokenError,
    USTokenManager,
    cli,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MINUTE = 60.0
BACKOFF, SELDOM = 65.0, 300.0  # seconds between attempts while the old token serves: after a failure, where it may last
MEMORY = 8 * 1024  # kB by which an answer may make the process grow; it is sent 64 MB
STEP = 10 if FULL else 40  # seconds after which a bot asks again
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
    "slow headers": no_answer(play(misbehaving.slow_headers), variables=SHORT),
    "100 Continue for ever": no_answer(play(misbehaving.endless_continue), variables=SHORT),
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


def run(desk: Desk, kis: Misbehaving, work: Callable[[], int], **variables: str) -> Ran:
    """Run `work` in a process of its own to its end."""
    return Stepped(work, desk.folder, desk.clock, **settings(desk.folder, kis, desk.key) | variables).finish()


@pytest.mark.parametrize("name", ["a header of 64 MB", "a body of 64 MB", "64 MB in chunks", "64 MB out of 64 kB"])
def test_an_answer_of_64_mb_takes_no_memory(name: str, kis: Misbehaving, desk: Desk) -> None:
    """The process grows by what one asks for a token takes anyway, whichever way the bytes come."""

    def measured() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        code = cli.main(("get", "us"))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        return code

    FAULTS[name].begin(kis)
    ran = run(desk, kis, measured)
    assert ran.code == 6
    assert int(ran.out) < MEMORY


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_the_target_of_a_redirect_sees_nothing(status: int, kis: Misbehaving, desk: Desk) -> None:
    """Another host is not even connected to, and the request that was redirected counts."""
    with Wire() as elsewhere:
        elsewhere.answer(200, make_answer())
        there = f"{elsewhere.url}/oauth2/tokenP".encode()
        lines = b"HTTP/1.1 %d Moved\r\nLocation: %s\r\nContent-Length: 0\r\n\r\n" % (status, there)
        kis.play = lambda _: iter([lines])
        ran = desk.run("get", "us")
        assert (ran.code, last_line(desk)) == (6, ("refused", f"HTTP {status}"))
        assert elsewhere.connections == 0
    assert len(desk.asked) == 1


CERTIFICATES = {  # host that it names, days that it lasts, whether it is trusted
    "nobody vouches for it": ("IP:127.0.0.2", 2, False),
    "it names another host": ("DNS:openapi.koreainvestment.com", 2, True),
    "it has expired": ("IP:127.0.0.2", -1, True),
    "it is right": ("IP:127.0.0.2", 2, True),
}


@pytest.mark.parametrize("name", CERTIFICATES)
def test_only_the_right_certificate_is_sent_credentials(
    name: str, kis: Misbehaving, desk: Desk, tmp_path: Path
) -> None:
    """A wrong one is one sentence that says so; the server is sent nothing, and nothing counts."""
    host, days, trusted = CERTIFICATES[name]
    path = certificate(tmp_path, host, days)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    variables = {"REQUESTS_CA_BUNDLE": str(path)} if trusted else {}
    try:
        made = Wire(host="127.0.0.2", context=context)  # loopback, but none where bundles do not count
    except OSError:
        pytest.skip("this system has one loopback address only")
    with made as server:
        server.answer(200, make_answer(now=datetime.fromtimestamp(desk.clock.true, UTC)))
        ran = run(desk, kis, command("get", "us"), KIS_BASE_URL=server.url, **variables)
    if name == "it is right":
        assert (ran.code, len(server.requests), desk.key in str(server.requests)) == (0, 1, True)
    else:
        assert (ran.code, server.requests, last_line(desk)[0]) == (6, [], "unreachable")
        assert "look at the certificate" in one_line(ran)
        assert server.connections == 4


def certificate(folder: Path, host: str, days: int) -> Path:
    """A certificate that vouches for itself, with its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl here")
    key, order, names = (str(folder / name) for name in ("key.pem", "order.csr", "names"))
    Path(names).write_text(f"subjectAltName={host}", encoding="ascii")
    asking = "req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=kis"
    subprocess.run([openssl, *asking.split(), "-keyout", key, "-out", order], capture_output=True, check=True)
    signing = [openssl, "x509", "-req", "-in", order, "-signkey", key, "-days", str(days), "-extfile", names]
    made = subprocess.run(signing, capture_output=True, check=True)
    path = folder / "certificate.pem"
    path.write_bytes(Path(key).read_bytes() + made.stdout)
    return path


def test_ten_minutes_of_the_minute_limit_are_ten_requests(kis: Misbehaving, desk: Desk) -> None:
    """A bot that asks again after each error makes one request a minute, and none more; then it has its token."""
    kis.fail("limit")
    began = desk.clock.true
    while desk.clock.true < began + 10 * MINUTE:
        assert desk.run("get", "us").code == 4
    times = [asked.at for asked in desk.asked]
    assert 9 <= len(times) <= 11
    kis.well()
    assert desk.run("get", "us") == Ran(0, f"{desk.granted[-1]}\n", "")
    assert list(untidy(desk)) == []


@pytest.mark.parametrize(("name", "requests"), [("limit", 5), ("bad-key", 2)])
def test_ten_minutes_of_refusals_disturb_no_token_that_serves(
    name: str, requests: int, kis: Misbehaving, desk: Desk
) -> None:
    """Asked for again and again, the old token comes at once, and KIS is asked a few times only."""
    old = with_token(desk, 23.6)
    before, began = len(desk.asked), desk.clock.true
    kis.fail(name)
    while desk.clock.true < began + 10 * MINUTE:
        assert desk.run("get", "us").out == f"{old}\n"
        desk.clock.true += STEP
    assert len(desk.asked) - before == requests
    kis.well()
    desk.clock.true += 10 * MINUTE
    assert desk.run("refresh", "us").code == 0
    assert list(untidy(desk)) == []


def test_a_key_that_is_locked_out_for_ten_minutes_is_asked_once(kis: Misbehaving, desk: Desk) -> None:
    """A bot that asks again and again is told so without another request, until a person refreshes."""
    kis.fail("bad-key")
    for _ in range(int(10 * MINUTE / STEP)):
        assert desk.run("get", "us").code == 5
        desk.clock.true += STEP
    assert len(desk.asked) == 1
    kis.well()
    assert desk.run("refresh", "us").code == 0
    assert desk.run("get", "us").code == 0
    assert list(untidy(desk)) == []


def test_the_same_token_again_is_no_renewal_and_leaves_kis_alone(kis: Misbehaving, desk: Desk) -> None:
    """KIS repeats a token that is about to expire: it is served to its end, and asked for every five minutes."""
    kis.set_rules(same_token=86_400)
    old = with_token(desk, 23.6)
    began = desk.clock.true
    while desk.clock.true < began + 10 * MINUTE:
        assert desk.run("get", "us").out == f"{old}\n"
        desk.clock.true += STEP
    assert [asked.outcome for asked in desk.asked] == ["new", "same", "same"]
    assert last_line(desk) == ("same", None)
    assert gap(desk) >= SELDOM
    assert list(untidy_after(kis, desk)) == []


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


def test_a_dead_token_inside_the_six_hours_is_not_asked_for_again(kis: Misbehaving, desk: Desk) -> None:
    """KIS would hand it out again: no request, exit code 4 that says until when, and the new token after that."""
    dead = with_token(desk, 1)
    assert run(desk, kis, rejected(dead)) == Ran(4, "IssuanceLimitError same_token\n", "")
    assert "six hours after its issue" in one_line(desk.run("get", "us"))
    assert desk.run("check", "us").code == 3
    assert len(desk.asked) == 1
    desk.clock.true += 5 * HOUR
    assert desk.run("get", "us") == Ran(0, f"{desk.granted[-1]}\n", "")
    assert [asked.outcome for asked in desk.asked] == ["new", "new"]
    assert list(untidy(desk)) == []


@pytest.mark.parametrize("again", [False, True], ids=["a new one", "the dead one again"])
def test_a_dead_token_outside_the_six_hours_is_replaced_at_once(kis: Misbehaving, desk: Desk, *, again: bool) -> None:
    """One request; the dead token is served to nobody even where KIS hands it out again, and KIS is left alone."""
    dead = with_token(desk, 7)
    if again:
        kis.set_rules(same_token=86_400)
    ran = run(desk, kis, rejected(dead))
    assert [asked.outcome for asked in desk.asked] == ["new", "same" if again else "new"]
    if again:
        assert (ran.code, desk.run("get", "us").out) == (3, "")
    else:
        assert (ran.code, ran.out) == (0, f"{desk.granted[-1]}\n")
    assert list(untidy_after(kis, desk)) == []


def untidy_after(kis: Misbehaving, desk: Desk) -> Iterator[str]:
    """As `untidy`, once KIS is well again and the token has expired."""
    kis.well()
    desk.clock.true += DAY
    assert desk.run("get", "us").code == 0
    yield from untidy(desk)
