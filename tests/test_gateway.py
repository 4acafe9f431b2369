"""KIS over HTTP: answers and refusals are told apart, redirects are not followed, and no secret is given away."""

import contextlib
import itertools
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from builders import CANARIES, KEY, SECRET, make_answer, make_jwt
from servers import Wire

from tokencore.attempts import Attempt, Outcome
from tokencore.errors import CredentialsError, IssuanceLimitError, IssuerUnavailableError, TokenError
from tokencore.kis.codes import Refusal
from tokencore.kis.gateway import Evidence, Gateway
from tokencore.sandbox import Sandbox
from tokencore.tokens import Token

Reply = str | tuple[int, object]

LIMITED, REFUSED, DOWN = IssuanceLimitError, CredentialsError, IssuerUnavailableError
# A failure of the sandbox or an answer; the error, the record's outcome and code, and words of the message and advice.
ANSWERS: dict[str, tuple[Reply, type[TokenError], str, str | None, str]] = {
    "the minute is not over": ("limit", LIMITED, "limit", "EGW00133", "one request a minute.*24-hour limit"),
    "it is not over, in the other shape": ((200, {"msg_cd": "EGW00133"}), LIMITED, "limit", "EGW00133", "a minute"),
    "an unknown key": ("bad-key", REFUSED, "bad_key", "EGW00103", "does not know the app key.*KIS_ENVIRONMENT"),
    "a wrong secret": ("bad-secret", REFUSED, "bad_secret", "EGW00105", "refused the app secret.*KIS_APP_SECRET"),
    "a denied key": ("EGW00003", REFUSED, "denied", "EGW00003", "denied access.*restricted"),
    "a customer without permission": ("EGW00004", REFUSED, "denied", "EGW00004", "no permission.*apply"),
    "a key without a right": ("EGW00206", REFUSED, "denied", "EGW00206", "no right.*apply"),
    "another IP address": ("EGW00207", REFUSED, "denied", "EGW00207", "IP address.*register"),
    "paper for a corporation": ("EGW00210", REFUSED, "denied", "EGW00210", "paper trading.*KIS_ENVIRONMENT=real"),
    "a fault": ("down", DOWN, "server_error", "EGW00002", "fault of its own.*tries again"),
    "maintenance": ((503, b"<html>maintenance"), DOWN, "server_error", "HTTP 503", "maintenance"),
    "a proxy's page": ("html", DOWN, "refused", "HTTP 403", "HTTP 403: 403 Forbidden.*24-hour limit"),
    "a code of tomorrow, with status 200": ((200, {"error_code": "EGW09999"}), DOWN, "refused", "EGW09999", "EGW09999"),
    "a code in a list": ((403, {"error_code": ["EGW00133"]}), DOWN, "refused", "HTTP 403", "HTTP 403"),
    "the key in place of a code": ((403, {"error_code": KEY}), DOWN, "refused", "HTTP 403", "HTTP 403"),
    "no JSON": ("garbage", DOWN, "bad_answer", None, "no access_token.*cool-down"),
    "an expired token": ("past", DOWN, "bad_answer", None, "already expired.*cool-down"),
    "half an answer": ("half", DOWN, "no_answer", None, "broke off.*cool-down"),
    "a megabyte": ("huge", DOWN, "no_answer", None, "larger than 65536 bytes.*cool-down"),
    "silence": ("hang", DOWN, "no_answer", None, "within 0.3 s.*cool-down"),
    "a byte from time to time": ("drip", DOWN, "no_answer", None, "too slowly.*cool-down"),
}


@pytest.fixture
def closed() -> str:
    """The address of a port on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


def kis(url: str, credentials: tuple[str, str] = (KEY, SECRET), *, timeout: float = 2.0) -> Gateway:
    """A gateway for this address, with credentials that are easy to search for; loopback answers in milliseconds."""
    return Gateway(url, credentials, timeout=timeout)


def refused(answer: Token | Refusal | str) -> Refusal:
    """Return the refusal, after checking that it shows no secret and fits on one short line."""
    assert isinstance(answer, Refusal)
    shown = f"{answer!r} {answer.as_error('', datetime.now(UTC))}"
    assert not any(canary in shown for canary in CANARIES)
    assert answer.what.isprintable()
    assert len(answer.what) < 300
    return answer


@pytest.fixture
def encrypted(tmp_path: Path) -> Iterator[Wire]:
    """A server with a self-signed certificate, at an address to which the proxy and certificate settings apply."""
    openssl, path = shutil.which("openssl") or pytest.skip("no openssl here"), tmp_path / "loopback.pem"
    order = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=loopback -addext subjectAltName=IP:127.0.0.2"
    made = subprocess.run([openssl, *order.split(), "-keyout", path], capture_output=True, check=True)
    with path.open("ab") as file:
        file.write(made.stdout)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    with Wire(host="127.0.0.2", context=context) as running:
        yield running


@pytest.mark.parametrize("status", [200, 201])
def test_request_is_the_one_kis_documents(status: int) -> None:
    """A token request is one JSON POST of three strings and its length, without bearer, tr_id, cookie or `.netrc`."""
    (Path.home() / ".netrc").write_text("machine 127.0.0.2 login me password hidden\n", encoding="utf-8")
    with Wire(host="127.0.0.2") as wire:
        wire.answer(status, make_answer())
        assert isinstance(kis(wire.url).issue(), Token)
    (request,) = wire.requests
    head, _, body = request.partition(b"\r\n\r\n")
    assert head.startswith(b"POST /oauth2/tokenP HTTP/1.1\r\n")
    assert b"content-type: application/json; charset=utf-8" in head.lower()
    assert f"content-length: {len(body)}".encode() in head.lower()
    assert not any(name in head.lower() for name in (b"authorization", b"tr_id", b"appkey", b"cookie"))
    assert json.loads(body) == {"grant_type": "client_credentials", "appkey": KEY, "appsecret": SECRET}


@pytest.mark.parametrize(("answer", "error", "outcome", "code", "said"), ANSWERS.values(), ids=ANSWERS)
def test_answer_has_its_error_outcome_code_and_advice(
    gateway: Sandbox, wire: Wire, answer: Reply, error: type[TokenError], outcome: str, code: str | None, said: str
) -> None:
    """An answer's code decides, in either shape, and without one its status does; the one request counts."""
    if isinstance(answer, str):
        gateway.fail(answer)
    else:
        wire.answer(*answer)
    url, timeout = (gateway if isinstance(answer, str) else wire).url, 0.3 if answer in ("hang", "drip") else 2.0
    found = refused(kis(url, timeout=timeout).issue())
    caught = type(found.as_error("", datetime.now(UTC)))
    assert (caught, found.outcome, found.code) == (error, outcome, code)
    assert re.search(said, f"{found.what}; {found.fix}")
    assert gateway.stats()["token_requests"] + len(wire.requests) == 1
    assert Attempt(datetime.now(UTC), found.outcome).counts


@pytest.mark.parametrize("hours", [0, 7, 25])
def test_clock_that_is_ahead_makes_no_token_older(wire: Wire, hours: int) -> None:
    """A new token is issued now, by this machine's clock; if that has run past the token's end, the error says so."""
    there = datetime.now(UTC) - timedelta(hours=hours)
    wire.answer(200, make_answer(now=there), Date=format_datetime(there, usegmt=True))
    found = kis(wire.url).issue()
    if hours < 24:
        assert isinstance(found, Token)
        assert abs((found.issued_at or there) - datetime.now(UTC)) < timedelta(seconds=5)
    else:
        assert "expired, as this machine's clock is 1500 min ahead of KIS's" in refused(found).what


def test_credentials_of_another_length_are_named_when_kis_refuses_them(gateway: Sandbox) -> None:
    """The lengths reveal a key and a secret that were swapped, or a secret that lacks its last character."""
    for mode, pair, words in (
        ("bad-key", (SECRET[:180], KEY), "yours have 180 and 36 (they look swapped);"),
        ("bad-secret", (KEY, SECRET[:179]), "secrets 180, yours have 36 and 179;"),
    ):
        gateway.fail(mode)
        assert words in refused(kis(gateway.url, pair).issue()).fix


ECHOES = (
    f"<p>your request: appkey={KEY}&appsecret={SECRET}</p>",
    f"secret {SECRET[:60]}\n{SECRET[60:]}",
    f"bearer {make_jwt()} {make_jwt()[:60]}",
    SECRET.replace("/", "&#47;").replace("+", "%2B"),
    "\x1b[31mred\x1b[0m\u202e\x00\x07\u2028",
)


@pytest.mark.parametrize("echo", ECHOES, ids=("request", "two lines", "tokens", "escapes", "controls"))
def test_kis_own_words_are_kept_for_people_but_nothing_secret(wire: Wire, echo: str) -> None:
    """Whatever KIS echoes, the sentence is short, printable and free of credentials."""
    for body in (echo.encode(), {"error_code": "EGW09999", "error_description": f"점검 {echo}"}):
        wire.answer(403, body)
        assert ("점검" in refused(kis(wire.url).issue()).what) == isinstance(body, dict)
    wire.answer(403, b"no such pair: CanaryK, CanaryS")  # what a test environment uses for key and secret
    assert "no such pair: ***, ***" in refused(kis(wire.url, ("CanaryK", "CanaryS")).issue()).what


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirect_is_never_followed_with_credentials(wire: Wire, status: int) -> None:
    """Whatever a redirect's status, the credentials go nowhere else; its body is bounded like any other answer's."""
    with Wire() as elsewhere:
        wire.answer(status, b" " * 70_000, Location=f"{elsewhere.url}/oauth2/tokenP")
        assert "larger than" in refused(kis(wire.url).issue()).what
        wire.requests.clear()
        wire.answer(status, b"", Location=f"{elsewhere.url}/oauth2/tokenP")
        assert refused(kis(wire.url).issue()).code == f"HTTP {status}"
        assert (len(wire.requests), elsewhere.requests) == (1, [])


def test_refused_connection_is_tried_four_times_with_growing_pauses(closed: str) -> None:
    """A request that cannot have reached KIS is tried three times more, if it can be recorded, and does not count."""
    tries: list[float] = []
    found = refused(kis(closed).issue(lambda: not tries.append(time.monotonic())))  # type: ignore[func-returns-value]
    assert isinstance(found.as_error("", datetime.now(UTC)), DOWN)
    assert not Attempt(datetime.now(UTC), found.outcome).counts
    pauses = [later - earlier for earlier, later in itertools.pairwise(tries)]
    assert all(pause >= half for pause, half in zip(pauses, (0.125, 0.25, 0.5), strict=True))
    restarted, tried = Sandbox(port=int(closed.rpartition(":")[2])), itertools.count()
    with contextlib.ExitStack() as stack:
        issued = kis(closed).issue(lambda: next(tried) != 1 or bool(stack.enter_context(restarted)))
        assert isinstance(issued, Token)
        forbidden = refused(kis(closed).issue(lambda: False))
        assert (forbidden.outcome, "Nothing was sent" in forbidden.what) == (Outcome.UNREACHABLE, True)
        assert restarted.stats()["token_requests"] == 1


def test_fault_before_the_request_leaves_is_no_attempt(
    encrypted: Wire, gateway: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong host name or certificate and a refusing proxy are all `unreachable`; the sandbox needs no proxy."""
    monkeypatch.setattr(time, "sleep", lambda _: None)

    def why(url: str) -> str:
        found = refused(kis(url).issue())
        assert found.outcome is Outcome.UNREACHABLE
        return found.what

    os.environ["REQUESTS_CA_BUNDLE"] = "/nowhere/ca.pem"
    assert why(f"https://{'a' * 70}.kr")
    assert "REQUESTS_CA_BUNDLE" in why("https://kis.invalid")
    del os.environ["REQUESTS_CA_BUNDLE"]
    assert "REQUESTS_CA_BUNDLE): self-signed certificate" in why(encrypted.url)
    assert encrypted.requests == []
    with Wire(b"HTTP/1.1 403 no\r\n\r\n") as proxy:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            os.environ |= {name: proxy.url, name.lower(): proxy.url}
        assert isinstance(kis(gateway.url.replace("127.0.0.1", "localhost")).issue(), Token)
        assert proxy.requests == []
        assert "proxy" in why("https://kis.invalid")


@pytest.mark.parametrize(
    ("codes", "path", "tr_id"),
    [
        (["NASD", "KRX"], "domestic-stock/v1/quotations/inquire-price?FID_COND_MRKT_DIV_CODE=J", "FHKST01010100"),
        (["NYSE", "SEHK"], "overseas-price/v1/quotations/price?AUTH=&EXCD=NYS&SYMB=", "HHDFS00000300"),
    ],
)
def test_quote_call_is_of_korea_where_an_exchange_is(wire: Wire, codes: list[str], path: str, tr_id: str) -> None:
    """A quote call is Korea's if an exchange is, else it has the exchange's quote code; the headers are a person's."""
    kis(wire.url).quote(make_jwt(), codes)
    head = wire.requests[0].decode()
    assert head.startswith(f"GET /uapi/{path}")
    assert {f"tr_id: {tr_id}", "custtype: P"} <= set(head.split("\r\n"))


QUOTED: dict[str, tuple[int, object, bool | None]] = {
    "no rows, and no error": (200, {"rt_cd": "0", "output": {}}, True),
    "expired": (200, {"rt_cd": "1", "msg_cd": "EGW00123"}, False),
    "rejected, in the other shape": (401, {"error_code": "EGW00121"}, False),
    "the call rate": (500, {"rt_cd": "1", "msg_cd": "EGW00201"}, None),
    "success in words only": (500, {"rt_cd": "0"}, None),
    "a proxy's page": (403, b"<html>", None),
}


@pytest.mark.parametrize(("status", "body", "accepted"), QUOTED.values(), ids=QUOTED)
def test_quote_proves_a_token_or_its_death_by_code_and_status_never_by_rows(
    wire: Wire, status: int, body: object, *, accepted: bool | None
) -> None:
    """An empty answer with `rt_cd` 0 proves the token; the call rate, a proxy or an outage proves nothing."""
    wire.answer(status, body, **{"Content-Type": "text/html"})
    found = kis(wire.url).quote(make_jwt(), ["KRX"])
    assert (found.accepted, found.status, bool(found.detail)) == (accepted, status, True)


def test_token_that_kis_did_not_revoke_is_said_to_stay_valid(wire: Wire, closed: str) -> None:
    """Only KIS's own answer counts as revoked, a missing connection proves nothing, and nothing is tried again."""
    for status, code in ((403, 200), (200, 500), (200, None)):
        wire.answer(status, {"code": code})
        with pytest.raises(DOWN, match="stays valid") as caught:
            kis(wire.url).revoke(make_jwt())
        assert not any(canary in str(caught.value) for canary in CANARIES)
    wire.answer(403, {"error_code": "EGW00121"})
    kis(wire.url).revoke(make_jwt())  # dead already
    assert len(wire.requests) == 4
    with pytest.raises(DOWN, match="not revoked and stays valid"):
        kis(closed).revoke(make_jwt())
    nobody = "KIS cannot be reached: 127.0.0.1 refuses the connection"
    assert kis(closed).quote(make_jwt(), []) == Evidence(None, nobody)
