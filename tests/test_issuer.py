"""KIS over HTTP: every answer and refusal told apart, nothing followed, nothing repeated, nothing given away."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
import traceback
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from builders import CANARIES, DAY, KEY, SECRET, make_answer, make_jwt, make_token
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from wires import Wire

from tokencore import errors
from tokencore.issuer import Issuer
from tokencore.record import Attempt, Outcome
from tokencore.refusals import Refusal
from tokencore.sandbox import Sandbox
from tokencore.tokens import Token

if TYPE_CHECKING:
    from collections.abc import Iterator

TIMEOUT = 2.0  # seconds; loopback answers in milliseconds
_connects: dict[int, list[float]] = {}  # by port: when this process tried to connect


def _hear(event: str, args: tuple[Any, ...]) -> None:
    if event == "socket.connect" and isinstance(args[1], tuple) and args[1][1] in _connects:
        _connects[args[1][1]].append(time.monotonic())


sys.addaudithook(_hear)


@pytest.fixture
def wire() -> Iterator[Wire]:
    """A server that says what a test wants."""
    with Wire() as running:
        yield running


@pytest.fixture
def closed() -> int:
    """A port on which nobody listens; connections to it are counted in `_connects`."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
    _connects[port] = []
    return port


def issuer(url: str, *, timeout: float = TIMEOUT) -> Issuer:
    """KIS's gateway at this address, with credentials that are easy to find."""
    return Issuer(url, KEY, SECRET, timeout=timeout)


def refused(answer: Token | Refusal) -> Refusal:
    """The refusal, which shows nothing secret and stays on one line."""
    assert isinstance(answer, Refusal)
    shown = f"{answer!r} {answer.what} {answer.cure}"
    assert not any(canary in shown for canary in CANARIES)
    assert answer.what.isprintable()
    assert len(answer.what) < 300
    return answer


def test_the_request_is_the_one_kis_documents(wire: Wire) -> None:
    """One POST of three texts as JSON in UTF-8, without a bearer, a tr_id or an app key in its headers."""
    wire.answer(200, make_answer())
    assert isinstance(issuer(wire.url).issue(), Token)
    head, _, body = wire.requests[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /oauth2/tokenP HTTP/1.1\r\n")
    assert b"content-type: application/json; charset=utf-8" in head.lower()
    assert not any(name in head.lower() for name in (b"authorization", b"tr_id", b"appkey", b"cookie"))
    assert json.loads(body) == {"grant_type": "client_credentials", "appkey": KEY, "appsecret": SECRET}
    assert len(wire.requests) == 1


def test_a_netrc_adds_no_password_to_a_request() -> None:
    """What stands in `~/.netrc` for KIS's host is not sent, though settings like proxies do count there."""
    try:
        server = Wire(host="127.0.0.2")  # loopback, but none that tokencore treats as such
    except OSError:
        pytest.skip("this system has one loopback address only")
    (Path.home() / ".netrc").write_text("machine 127.0.0.2 login me password hidden\n", encoding="utf-8")
    with server:
        server.answer(200, make_answer())
        assert isinstance(issuer(server.url).issue(), Token)
    assert b"authorization" not in server.requests[0].lower()


def test_a_token_has_kis_own_issue_and_expiry(gateway: Sandbox) -> None:
    """What the gateway grants becomes a token of a day, issued this second."""
    token = issuer(gateway.url).issue()
    assert isinstance(token, Token)
    assert token.issued_at
    assert token.expires_at - token.issued_at == DAY
    assert abs(datetime.now(UTC) - token.issued_at) < timedelta(seconds=3)


FAILURES = [
    ("limit", Outcome.LIMIT, "EGW00133", errors.IssuanceLimitError, "one request a minute", "let it use tokencore too"),
    ("bad-key", Outcome.BAD_KEY, "EGW00103", errors.AppKeyError, "does not know the app key", "KIS_ENVIRONMENT"),
    ("bad-secret", Outcome.BAD_SECRET, "EGW00105", errors.AppSecretError, "refused the app secret", "KIS_APP_SECRET"),
    ("server-error", Outcome.SERVER_ERROR, "EGW00002", errors.IssuerServerError, "fault of its own", "tries again"),
    ("down", Outcome.SERVER_ERROR, "EGW00002", errors.IssuerServerError, "fault of its own", "tries again"),
    ("html", Outcome.REFUSED, "HTTP 403", errors.IssuerRefusedError, "HTTP 403: 403 Forbidden", "proxy"),
    ("redirect", Outcome.REFUSED, "HTTP 302", errors.IssuerRefusedError, "HTTP 302", "proxy"),
    ("garbage", Outcome.BAD_ANSWER, None, errors.IssuerAnswerError, "no access_token", "cool-down"),
    ("no-token", Outcome.BAD_ANSWER, None, errors.IssuerAnswerError, "no access_token", "cool-down"),
    ("past", Outcome.BAD_ANSWER, None, errors.IssuerAnswerError, "already expired", "cool-down"),
    ("half", Outcome.NO_ANSWER, None, errors.IssuerUnavailableError, "broke off", "cool-down"),
    ("drop", Outcome.NO_ANSWER, None, errors.IssuerUnavailableError, "broke off", "cool-down"),
    ("huge", Outcome.NO_ANSWER, None, errors.IssuerUnavailableError, "larger than 65536 bytes", "cool-down"),
    ("hang", Outcome.NO_ANSWER, None, errors.IssuerUnavailableError, "KIS_TIMEOUT", "cool-down"),
    ("drip", Outcome.NO_ANSWER, None, errors.IssuerUnavailableError, "too slowly", "cool-down"),
]


@pytest.mark.parametrize(
    ("mode", "outcome", "code", "error", "what", "cure"), FAILURES, ids=[row[0] for row in FAILURES]
)
def test_every_failure_has_its_own_outcome_error_and_advice(
    gateway: Sandbox,
    mode: str,
    outcome: Outcome,
    code: str | None,
    error: type[errors.TokenError],
    what: str,
    cure: str,
) -> None:
    """Each way in which the gateway fails is told apart, after one request and within the time-outs."""
    gateway.fail(mode)
    start = time.monotonic()
    found = refused(issuer(gateway.url, timeout=0.3 if mode in ("hang", "drip") else TIMEOUT).issue())
    assert time.monotonic() - start < 2
    assert (found.outcome, found.code, found.error) == (outcome, code, error)
    assert what in found.what
    assert cure in found.cure
    assert gateway.stats()["token_requests"] == 1
    assert Attempt(datetime.now(UTC), found.outcome).counts


@pytest.mark.parametrize(
    "drip",
    [
        pytest.param(b"HTTP/1.1 200 OK\r\n" + b"X-Header: x\r\n" * 50, id="header"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n" + b" " * 900, id="body of a known length"),
        pytest.param(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + b" " * 900, id="body until the end"),
        pytest.param(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 200, id="chunks"),
    ],
)
def test_an_answer_that_comes_byte_by_byte_ends_in_twice_the_time_out(wire: Wire, drip: bytes) -> None:
    """Each byte comes within the time-out, so that only a bound on the whole answer ends it, in its header too."""
    wire.drip = drip
    began = time.monotonic()
    found = refused(issuer(wire.url, timeout=0.3).issue())
    assert found.outcome is Outcome.NO_ANSWER
    assert "too slowly" in found.what
    assert 0.5 < time.monotonic() - began < 2


def test_no_thread_watches_an_answer_that_has_come(wire: Wire) -> None:
    """What bounds an answer in time ends with it."""
    before = set(threading.enumerate())
    wire.answer(200, make_answer())
    for _ in range(3):
        assert isinstance(issuer(wire.url, timeout=60).issue(), Token)
    until = time.monotonic() + 5
    while not before.issuperset(threading.enumerate()) and time.monotonic() < until:
        time.sleep(0.01)
    assert before.issuperset(threading.enumerate())


@pytest.mark.parametrize(
    ("status", "body", "outcome", "code", "error"),
    [
        (403, {"error_code": "EGW00206"}, Outcome.DENIED, "EGW00206", errors.AccessDeniedError),
        (403, {"error_code": "EGW00207"}, Outcome.DENIED, "EGW00207", errors.AccessDeniedError),
        (200, {"error_code": "EGW00133"}, Outcome.LIMIT, "EGW00133", errors.IssuanceLimitError),
        (500, {"msg_cd": "EGW00133", "rt_cd": "1"}, Outcome.LIMIT, "EGW00133", errors.IssuanceLimitError),
        (200, {"msg_cd": "EGW00103", "rt_cd": "1"}, Outcome.BAD_KEY, "EGW00103", errors.AppKeyError),
        (403, {"error_code": "EGW09999"}, Outcome.REFUSED, "EGW09999", errors.IssuerRefusedError),
        (200, {"error_code": "EGW09999"}, Outcome.REFUSED, "EGW09999", errors.IssuerRefusedError),
        (400, b"", Outcome.REFUSED, "HTTP 400", errors.IssuerRefusedError),
        (429, b"[]", Outcome.REFUSED, "HTTP 429", errors.IssuerRefusedError),
        (204, b"", Outcome.REFUSED, "HTTP 204", errors.IssuerRefusedError),
        (503, b"<html>maintenance", Outcome.SERVER_ERROR, "HTTP 503", errors.IssuerServerError),
        (500, {"msg_cd": "EGW00201"}, Outcome.SERVER_ERROR, "EGW00201", errors.IssuerServerError),
        (403, {"error_code": ["EGW00133"]}, Outcome.REFUSED, "HTTP 403", errors.IssuerRefusedError),
        (403, {"error_code": KEY}, Outcome.REFUSED, "HTTP 403", errors.IssuerRefusedError),
        (200, b"[" * 60_000, Outcome.BAD_ANSWER, None, errors.IssuerAnswerError),
        (200, {**make_answer(), "access_token": "two words"}, Outcome.BAD_ANSWER, None, errors.IssuerAnswerError),
    ],
)
def test_the_code_decides_and_then_the_status(
    wire: Wire,
    status: int,
    body: object,
    outcome: Outcome,
    code: str | None,
    error: type[errors.TokenError],
) -> None:
    """Both shapes of KIS's errors are read at any status; what has no known code is judged by its status."""
    wire.answer(status, body)
    found = refused(issuer(wire.url).issue())
    assert (found.outcome, found.code, found.error) == (outcome, code, error)
    assert len(wire.requests) == 1


@pytest.mark.parametrize(
    "text",
    [
        f"<p>your request: appkey={KEY}&appsecret={SECRET}</p>",
        f"secret {SECRET[:60]}\n{SECRET[60:]}",
        f"bearer {make_jwt()} {make_jwt()[:60]}",
        SECRET.replace("/", "&#47;").replace("+", "%2B"),
        "<" * 60_000,
        "a" * 60_000,
        "\x1b[31mred\x1b[0m\u202e\x00\x07\u2028",
    ],
    ids=["echo", "broken in two", "tokens", "escaped", "only brackets", "one word", "controls"],
)
def test_kis_own_words_are_kept_for_people_but_nothing_secret(wire: Wire, text: str) -> None:
    """Whatever is echoed, the sentence is short, printable and free of credentials, and made at once."""
    for body in (text.encode(), {"error_code": "EGW09999", "error_description": f"점검 {text}"}):
        wire.answer(403, body)
        start = time.monotonic()
        found = refused(issuer(wire.url).issue())
        assert time.monotonic() - start < 3.5  # quadratic patterns take 5 s and more
        assert ("점검" in found.what) == isinstance(body, dict)


def test_short_credentials_are_found_in_kis_words_too(wire: Wire) -> None:
    """What a test environment uses for key and secret is removed like the real ones."""
    wire.answer(403, b"no such pair: CanaryK, CanaryS")
    assert "no such pair: ***, ***" in refused(Issuer(wire.url, "CanaryK", "CanaryS", timeout=TIMEOUT).issue()).what


JSON: st.SearchStrategy[Any] = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.sampled_from([KEY, SECRET, make_jwt()])
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.text(), inner, max_size=2)),
    max_leaves=4,
)
FIELDS = [
    "access_token",
    "expires_in",
    "access_token_token_expired",
    "error_code",
    "error_description",
    "msg_cd",
    "msg1",
]


@given(st.integers(200, 599), st.dictionaries(st.sampled_from(FIELDS), JSON))
@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_answer_is_a_token_or_a_refusal_without_secrets(wire: Wire, status: int, body: dict[str, Any]) -> None:
    """No answer whatever raises, and no refusal repeats a credential or a token that stands in the answer."""
    wire.answer(status, body)
    found = issuer(wire.url).issue()
    if isinstance(found, Token):
        assert (status, found.expires_at > datetime.now(UTC)) == (200, True)
    else:
        refused(found)


def test_a_redirect_is_never_followed_with_credentials(wire: Wire) -> None:
    """Neither another host nor the same one is sent the credentials again, whatever the status of the redirect."""
    with Wire() as elsewhere:
        for status in (301, 302, 303, 307, 308):
            wire.answer(status, b"", Location=f"{elsewhere.url}/oauth2/tokenP")
            assert refused(issuer(wire.url).issue()).code == f"HTTP {status}"
        assert elsewhere.requests == []
    assert len(wire.requests) == 5


def test_a_refused_connection_is_tried_four_times_with_growing_pauses(closed: int) -> None:
    """What cannot have reached KIS is tried three times more, later each time, and starts no cool-down."""
    found = refused(issuer(f"http://127.0.0.1:{closed}").issue())
    times = _connects[closed]
    pauses = [later - earlier for earlier, later in pairwise(times)]
    assert (found.outcome, found.error) == (Outcome.UNREACHABLE, errors.IssuerUnavailableError)
    assert not Attempt(datetime.now(UTC), found.outcome).counts
    assert len(pauses) == 3
    for pause, usual in zip(pauses, (0.25, 0.5, 1), strict=True):
        assert usual * 0.5 <= pause <= usual * 1.5 + 0.25


def test_a_gateway_that_comes_up_meanwhile_is_reached(closed: int) -> None:
    """A restart of the gateway costs a moment, not the token: the next try finds it."""
    found: list[Token | Refusal] = []
    asking = threading.Thread(target=lambda: found.append(issuer(f"http://127.0.0.1:{closed}").issue()))
    asking.start()
    while not _connects[closed]:
        time.sleep(0.005)
    with Sandbox(port=closed) as gateway:
        asking.join()
        assert isinstance(found[0], Token)
        assert gateway.stats()["token_requests"] == 1


@pytest.mark.parametrize("url", ["https://:0", "https://host\t", "nonsense", "https://" + "a" * 70 + ".kr"])
def test_an_address_that_is_none_never_counts_as_asked(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What requests refuses before it connects is `unreachable`, and no exception."""
    monkeypatch.setattr(time, "sleep", lambda _: None)
    assert refused(issuer(url).issue()).outcome is Outcome.UNREACHABLE


def test_certificates_that_cannot_be_loaded_are_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong REQUESTS_CA_BUNDLE is named, nothing is sent and nothing counts."""
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nowhere/ca.pem")
    found = refused(issuer("https://kis.invalid").issue())
    assert found.outcome is Outcome.UNREACHABLE
    assert "REQUESTS_CA_BUNDLE" in found.what


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A self-signed certificate of 127.0.0.1, with its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl here")
    path = tmp_path / "loopback.pem"
    order = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1"
    made = subprocess.run([openssl, *order.split(), "-keyout", path], capture_output=True, check=True)
    with path.open("ab") as file:
        file.write(made.stdout)
    return path


def test_a_certificate_that_is_not_trusted_gets_no_credentials(certificate: Path) -> None:
    """The server of an unknown certificate is sent nothing, and nothing counts as asked."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with Wire(context=context) as fake:
        found = refused(issuer(fake.url).issue())
        assert (found.outcome, fake.requests) == (Outcome.UNREACHABLE, [])
    assert "certificate" in found.what


def test_an_encrypted_connection_that_breaks_after_the_request_counts(
    certificate: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The request may have reached KIS, so it is not repeated: one request, `no_answer`."""
    monkeypatch.setattr("requests.adapters.DEFAULT_CA_BUNDLE_PATH", str(certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with Wire(b"no TLS record\r\n" * 9, context=context) as broken:
        broken.raw = True
        assert refused(issuer(broken.url).issue()).outcome is Outcome.NO_ANSWER
        assert len(broken.requests) == 1


def test_a_proxy_of_the_developer_is_not_asked_for_loopback(gateway: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """HTTP_PROXY and its kin do not come between tokencore and the sandbox."""
    with Wire() as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        for url in (gateway.url, gateway.url.replace("127.0.0.1", "localhost")):
            gateway.set_rules(issue_interval=0)
            assert isinstance(issuer(url).issue(), Token)
        assert proxy.requests == []


def test_no_credential_is_logged_shown_or_pickled(gateway: Sandbox, caplog: pytest.LogCaptureFixture) -> None:
    """Not in debug logs of any library, not in repr or pickle, not in a traceback of what is raised."""
    caplog.set_level(logging.DEBUG)
    asked = issuer(gateway.url, timeout=0.3)
    with pytest.raises(TypeError) as unpickled:
        pickle.dumps(asked)
    shown = [repr(asked), str(unpickled.value)]
    for mode in (*(row[0] for row in FAILURES), None):
        gateway.clear()
        if mode:
            gateway.fail(mode)
        answer = asked.issue()
        shown.append(repr(answer))
        try:
            asked.revoke(make_jwt())
        except errors.TokenError as error:
            shown.append("".join(traceback.format_exception(error)))
        shown.append(str(asked.probe(make_jwt(), domestic=True)))
    shown.append(caplog.text)
    assert not any(canary in text for text in shown for canary in CANARIES)
    assert len(caplog.records) > 10


@pytest.mark.parametrize("domestic", [True, False])
def test_a_quote_call_proves_a_token_or_its_death(gateway: Sandbox, *, domestic: bool) -> None:
    """True for a token that works, False with KIS's words for a dead one, None where the call tells nothing."""
    asked = issuer(gateway.url)
    token = asked.issue()
    assert isinstance(token, Token)
    assert asked.probe(token.access_token, domestic=domestic) == (True, "rt_cd 0")
    gateway.kill_tokens()
    accepted, told = asked.probe(token.access_token, domestic=domestic)
    assert (accepted, "EGW00121 유효하지 않은 token" in told) == (False, True)
    stats = gateway.stats()
    assert (stats["quotes"], stats["quotes_refused"]) == (1, {"EGW00121": 1})


@pytest.mark.parametrize(
    ("status", "body", "accepted"),
    [
        (200, {"rt_cd": "0", "output": {}}, True),
        (200, {"rt_cd": "1", "msg_cd": "EGW00123"}, False),
        (500, {"rt_cd": "1", "msg_cd": "EGW00201"}, None),
        (500, {"rt_cd": "1", "msg_cd": ["EGW00121"]}, None),
        (403, b"<html>", None),
        (200, b"", None),
    ],
)
def test_a_probe_is_judged_on_code_and_status_never_on_rows(
    wire: Wire,
    status: int,
    body: object,
    accepted: bool | None,  # noqa: FBT001 - what the probe says
) -> None:
    """An empty answer with `rt_cd` 0 proves the token; the call rate, a proxy or an outage proves nothing."""
    wire.answer(status, body)
    found, told = issuer(wire.url).probe(make_token().access_token, domestic=True)
    assert found is accepted
    assert told
    head = wire.requests[0].decode()
    assert head.startswith("GET /uapi/domestic-stock/v1/quotations/inquire-price?FID_COND_MRKT_DIV_CODE=J")
    assert "tr_id: FHKST01010100" in head
    assert "custtype: P" in head


def test_a_probe_of_an_unreachable_gateway_tells_nothing(closed: int) -> None:
    """No connection is neither a proof nor a death, and is not tried again and again."""
    accepted, told = issuer(f"http://127.0.0.1:{closed}").probe(make_jwt(), domestic=True)
    assert (accepted, "refused" in told) == (None, True)
    assert len(_connects[closed]) == 1


def test_a_revoked_token_is_dead_for_everyone(gateway: Sandbox) -> None:
    """After `revoke` business calls refuse it; one that is dead already is as good as revoked."""
    asked = issuer(gateway.url)
    token = asked.issue()
    assert isinstance(token, Token)
    asked.revoke(token.access_token)
    assert asked.probe(token.access_token, domestic=True)[0] is False
    asked.revoke(token.access_token)
    assert gateway.stats()["revokes"] == 1


@pytest.mark.parametrize(
    ("status", "body"),
    [(403, {"error_code": "EGW00103"}), (500, b""), (200, b""), (200, {"code": 500, "message": "x"}), (302, b"")],
)
def test_a_token_that_kis_did_not_revoke_is_said_to_stay_valid(wire: Wire, status: int, body: object) -> None:
    """Only KIS's own word counts as revoked; anything else is an error that shows no token."""
    wire.answer(status, body)
    with pytest.raises(errors.IssuerUnavailableError, match="stays valid") as caught:
        issuer(wire.url).revoke(make_jwt())
    assert not any(canary in str(caught.value) for canary in CANARIES)


def test_a_gateway_that_cannot_be_asked_revokes_nothing(closed: int) -> None:
    """Without a connection the error says so."""
    with pytest.raises(errors.IssuerUnavailableError, match="could not be asked"):
        issuer(f"http://127.0.0.1:{closed}").revoke(make_jwt())


def test_an_encrypted_answer_that_comes_byte_by_byte_ends_too(
    certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound on the whole answer holds for KIS's own kind of connection."""
    monkeypatch.setattr("requests.adapters.DEFAULT_CA_BUNDLE_PATH", str(certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with Wire(context=context) as slow:
        slow.drip = b"HTTP/1.1 200 OK\r\n" + b"X-Header: x\r\n" * 50
        began = time.monotonic()
        found = refused(issuer(slow.url, timeout=0.3).issue())
    assert (found.outcome, time.monotonic() - began < 2) == (Outcome.NO_ANSWER, True)
    assert "too slowly" in found.what
