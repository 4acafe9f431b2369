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
import requests
from builders import CANARIES, DAY, KEY, SECRET, make_answer, make_jwt
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from servers import Wire

from tokencore.attempts import Attempt, Outcome
from tokencore.errors import (
    ConfigurationError,
    CredentialsError,
    IssuanceLimitError,
    IssuerUnavailableError,
    TokenError,
)
from tokencore.kis.codes import Refusal
from tokencore.kis.gateway import Gateway
from tokencore.kis.quotes import for_exchanges
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


def kis(url: str, *, timeout: float = TIMEOUT, key: str = KEY, secret: str = SECRET) -> Gateway:
    """KIS's gateway at this address, with credentials that are easy to find."""
    return Gateway(url, (key, secret), timeout=timeout)


def refused(answer: Token | Refusal | str) -> Refusal:
    """The refusal, which shows nothing secret and stays on one line."""
    assert isinstance(answer, Refusal)
    shown = f"{answer!r} {answer.what} {answer.fix}"
    assert not any(canary in shown for canary in CANARIES)
    assert answer.what.isprintable()
    assert len(answer.what) < 300
    return answer


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate of two loopback addresses, with its key."""
    openssl = shutil.which("openssl") or pytest.skip("no openssl here")
    path = tmp_path_factory.mktemp("tls") / "loopback.pem"
    names = "subjectAltName=IP:127.0.0.1,IP:127.0.0.2"
    order = f"req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=loopback -addext {names}"
    made = subprocess.run([openssl, *order.split(), "-keyout", path], capture_output=True, check=True)
    with path.open("ab") as file:
        file.write(made.stdout)
    return path


@pytest.fixture
def encrypted(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    """A server over TLS that requests trusts, at an address where the settings for proxies and certificates count."""
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with Wire(host="127.0.0.2", context=context) as running:
        yield running


def test_request_is_the_one_kis_documents(encrypted: Wire) -> None:
    """One POST of three texts as JSON with its length, and neither bearer, tr_id, cookie nor a password of `.netrc`."""
    (Path.home() / ".netrc").write_text("machine 127.0.0.2 login me password hidden\n", encoding="utf-8")
    encrypted.answer(200, make_answer())
    assert isinstance(kis(encrypted.url).issue(), Token)
    head, _, body = encrypted.requests[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /oauth2/tokenP HTTP/1.1\r\n")
    assert b"content-type: application/json; charset=utf-8" in head.lower()
    assert f"content-length: {len(body)}".encode() in head.lower()
    assert not any(name in head.lower() for name in (b"authorization", b"tr_id", b"appkey", b"cookie"))
    assert json.loads(body) == {"grant_type": "client_credentials", "appkey": KEY, "appsecret": SECRET}
    assert len(encrypted.requests) == 1


def test_token_has_kis_own_issue_and_expiry(gateway: Sandbox) -> None:
    """What the gateway grants becomes a token of a day, issued this second."""
    token = kis(gateway.url).issue()
    assert isinstance(token, Token)
    assert token.issued_at
    assert token.expires_at - token.issued_at == DAY
    assert abs(datetime.now(UTC) - token.issued_at) < timedelta(seconds=3)


CLASSES = {
    Outcome.LIMIT: IssuanceLimitError,
    Outcome.BAD_KEY: CredentialsError,
    Outcome.BAD_SECRET: CredentialsError,
    Outcome.DENIED: CredentialsError,
}  # every other outcome is IssuerUnavailableError

# KIS's answers and its silences: how the sandbox fails, outcome, code, and words of `what` and `fix`.
FAILURES = [
    ("limit", Outcome.LIMIT, "EGW00133", "one request a minute", "24-hour limit"),
    ("bad-key", Outcome.BAD_KEY, "EGW00103", "does not know the app key", "KIS_ENVIRONMENT"),
    ("bad-secret", Outcome.BAD_SECRET, "EGW00105", "refused the app secret", "KIS_APP_SECRET"),
    ("server-error", Outcome.SERVER_ERROR, "EGW00002", "fault of its own", "tries again"),
    ("down", Outcome.SERVER_ERROR, "EGW00002", "fault of its own", "tries again"),
    ("html", Outcome.REFUSED, "HTTP 403", "HTTP 403: 403 Forbidden", "24-hour limit"),
    ("redirect", Outcome.REFUSED, "HTTP 302", "HTTP 302", "proxy"),
    ("garbage", Outcome.BAD_ANSWER, None, "no access_token", "cool-down"),
    ("no-token", Outcome.BAD_ANSWER, None, "no access_token", "cool-down"),
    ("past", Outcome.BAD_ANSWER, None, "already expired", "cool-down"),
    ("half", Outcome.NO_ANSWER, None, "broke off", "cool-down"),
    ("drop", Outcome.NO_ANSWER, None, "broke off", "cool-down"),
    ("huge", Outcome.NO_ANSWER, None, "larger than 65536 bytes", "cool-down"),
    ("hang", Outcome.NO_ANSWER, None, "KIS_TIMEOUT", "cool-down"),
    ("drip", Outcome.NO_ANSWER, None, "too slowly", "cool-down"),
]


@pytest.mark.parametrize(("mode", "outcome", "code", "what", "fix"), FAILURES, ids=[row[0] for row in FAILURES])
def test_every_failure_has_its_own_outcome_error_and_advice(
    gateway: Sandbox, mode: str, outcome: Outcome, code: str | None, what: str, fix: str
) -> None:
    """Each way in which the gateway fails is told apart, after one request and within the time-outs."""
    gateway.fail(mode)
    start = time.monotonic()
    found = refused(kis(gateway.url, timeout=0.3 if mode in ("hang", "drip") else TIMEOUT).issue())
    assert time.monotonic() - start < 2
    assert (found.outcome, found.code, found.error) == (outcome, code, CLASSES.get(outcome, IssuerUnavailableError))
    assert what in found.what
    assert fix in found.fix
    assert gateway.stats()["token_requests"] == 1
    assert Attempt(datetime.now(UTC), found.outcome).counts


@pytest.mark.parametrize(
    ("status", "body", "outcome", "code"),
    [
        (403, {"error_code": "EGW00003"}, Outcome.DENIED, "EGW00003"),
        (403, {"error_code": "EGW00004"}, Outcome.DENIED, "EGW00004"),
        (403, {"error_code": "EGW00102"}, Outcome.BAD_KEY, "EGW00102"),
        (403, {"error_code": "EGW00104"}, Outcome.BAD_SECRET, "EGW00104"),
        (403, {"error_code": "EGW00206"}, Outcome.DENIED, "EGW00206"),
        (403, {"error_code": "EGW00207"}, Outcome.DENIED, "EGW00207"),
        (403, {"error_code": "EGW00210"}, Outcome.DENIED, "EGW00210"),
        (200, {"error_code": "EGW00133"}, Outcome.LIMIT, "EGW00133"),
        (500, {"msg_cd": "EGW00133", "rt_cd": "1"}, Outcome.LIMIT, "EGW00133"),
        (200, {"msg_cd": "EGW00103", "rt_cd": "1"}, Outcome.BAD_KEY, "EGW00103"),
        (403, {"error_code": "EGW00001"}, Outcome.SERVER_ERROR, "EGW00001"),
        (403, {"error_code": "EGW09999"}, Outcome.REFUSED, "EGW09999"),
        (200, {"error_code": "EGW09999"}, Outcome.REFUSED, "EGW09999"),
        (400, b"", Outcome.REFUSED, "HTTP 400"),
        (429, b"[]", Outcome.REFUSED, "HTTP 429"),
        (204, b"", Outcome.REFUSED, "HTTP 204"),
        (503, b"<html>maintenance", Outcome.SERVER_ERROR, "HTTP 503"),
        (500, {"msg_cd": "EGW00201"}, Outcome.SERVER_ERROR, "EGW00201"),
        (403, {"error_code": ["EGW00133"]}, Outcome.REFUSED, "HTTP 403"),
        (403, {"error_code": KEY}, Outcome.REFUSED, "HTTP 403"),
        (200, b"[" * 60_000, Outcome.BAD_ANSWER, None),
        (200, {**make_answer(), "access_token": "two words"}, Outcome.BAD_ANSWER, None),
    ],
)
def test_code_decides_and_then_the_status(
    wire: Wire, status: int, body: object, outcome: Outcome, code: str | None
) -> None:
    """Both shapes of KIS's errors are read at any status; what has no known code is judged by its status."""
    wire.answer(status, body)
    found = refused(kis(wire.url).issue())
    assert (found.outcome, found.code, found.error) == (outcome, code, CLASSES.get(outcome, IssuerUnavailableError))
    assert len(wire.requests) == 1


@pytest.mark.parametrize(
    ("key", "secret", "said"),
    [
        (SECRET[:180], KEY, "these 180 and 36 (they look swapped)"),
        (KEY, SECRET[:179], "these 36 and 179;"),
    ],
    ids=["swapped", "cut off"],
)
@pytest.mark.parametrize("mode", ["bad-key", "bad-secret"])
def test_credentials_of_another_length_are_named_when_kis_refuses_them(
    gateway: Sandbox, key: str, secret: str, said: str, mode: str
) -> None:
    """A key and a secret that were swapped, or a secret without its last sign, are found by their lengths."""
    gateway.fail(mode)
    assert said in refused(kis(gateway.url, key=key, secret=secret).issue()).fix
    gateway.fail("limit")
    assert "these" not in refused(kis(gateway.url, key=key, secret=secret).issue()).fix


@pytest.mark.parametrize(
    "drip",
    [
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n" + b" " * 900, id="known length"),
        pytest.param(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + b" " * 900, id="until the end"),
        pytest.param(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 200, id="chunks"),
    ],
)
def test_body_that_comes_byte_by_byte_ends_in_twice_the_time_out(encrypted: Wire, drip: bytes) -> None:
    """Each byte comes within the time-out, so that only a bound on the whole answer ends it; over TLS as well."""
    encrypted.drip = drip
    began = time.monotonic()
    found = refused(kis(encrypted.url, timeout=0.6).issue())
    assert found.outcome is Outcome.NO_ANSWER
    assert "too slowly" in found.what
    assert 1 < time.monotonic() - began < 3


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
        found = refused(kis(wire.url).issue())
        assert time.monotonic() - start < 3.5  # quadratic patterns take 5 s and more
        assert ("점검" in found.what) == isinstance(body, dict)
    wire.answer(403, b"no such pair: CanaryK, CanaryS")  # what a test environment uses for key and secret
    assert "no such pair: ***, ***" in refused(kis(wire.url, key="CanaryK", secret="CanaryS").issue()).what


JSON: st.SearchStrategy[Any] = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.sampled_from([KEY, SECRET, make_jwt()])
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.text(), inner, max_size=2)),
    max_leaves=4,
)
FIELDS = ["access_token", "expires_in", "access_token_token_expired", "error_code", "msg_cd", "msg1"]


@given(st.integers(200, 599), st.dictionaries(st.sampled_from(FIELDS), JSON))
@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_answer_is_a_token_or_a_refusal_without_secrets(wire: Wire, status: int, body: dict[str, Any]) -> None:
    """No answer whatever raises, and no refusal repeats a credential or a token that stands in the answer."""
    wire.answer(status, body)
    found = kis(wire.url).issue()
    if isinstance(found, Token):
        assert (status, found.expires_at > datetime.now(UTC)) == (200, True)
    else:
        refused(found)


def test_redirect_is_never_followed_with_credentials(wire: Wire) -> None:
    """Neither another host nor the same one is sent the credentials again, whatever the status of the redirect."""
    with Wire() as elsewhere:
        for status in (301, 302, 303, 307, 308):
            wire.answer(status, b"", Location=f"{elsewhere.url}/oauth2/tokenP")
            assert refused(kis(wire.url).issue()).code == f"HTTP {status}"
        assert elsewhere.requests == []
    assert len(wire.requests) == 5


def test_refused_connection_is_tried_four_times_with_growing_pauses(closed: int) -> None:
    """What cannot have reached KIS is tried three times more, later each time, and starts no cool-down."""
    departures: list[float] = []

    def depart() -> bool:
        departures.append(time.monotonic())
        return True

    found = refused(kis(f"http://127.0.0.1:{closed}").issue(depart))
    assert (found.outcome, found.error) == (Outcome.UNREACHABLE, IssuerUnavailableError)
    assert not Attempt(datetime.now(UTC), found.outcome).counts
    pauses = [later - earlier for earlier, later in pairwise(_connects[closed])]
    assert len(pauses) == 3
    for pause, usual in zip(pauses, (0.25, 0.5, 1), strict=True):
        assert usual * 0.5 <= pause <= usual * 1.5 + 0.25
    assert all(left <= tried for left, tried in zip(departures, _connects[closed], strict=True))


def test_request_that_may_not_depart_is_not_sent(gateway: Sandbox) -> None:
    """Where the record does not take the attempt nothing leaves, and the refusal is none that counts."""
    found = refused(kis(gateway.url).issue(lambda: False))
    assert (found.outcome, gateway.stats()["token_requests"]) == (Outcome.UNREACHABLE, 0)
    assert "Nothing was sent" in found.what


def test_gateway_that_comes_up_meanwhile_is_reached(closed: int) -> None:
    """A restart of the gateway costs a moment, not the token: the next try finds it."""
    found: list[Token | Refusal] = []
    asking = threading.Thread(target=lambda: found.append(kis(f"http://127.0.0.1:{closed}").issue()))
    asking.start()
    while not _connects[closed]:
        time.sleep(0.005)
    with Sandbox(port=closed) as gateway:
        asking.join()
        assert isinstance(found[0], Token)
        assert gateway.stats()["token_requests"] == 1


@pytest.mark.parametrize("url", ["nonsense", "http://openapi.koreainvestment.com:9443", "ftp://127.0.0.1", "https://"])
def test_address_where_secrets_may_not_go_is_refused_at_once(url: str) -> None:
    """Neither https nor this machine: an error that names the setting, before anything is sent."""
    with pytest.raises(ConfigurationError, match="KIS_BASE_URL"):
        kis(url)


def test_fault_before_the_request_leaves_is_no_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that is none, unreadable certificates, no room for a thread: `unreachable`, and no exception."""
    monkeypatch.setattr(time, "sleep", lambda _: None)
    assert refused(kis(f"https://{'a' * 70}.kr").issue()).outcome is Outcome.UNREACHABLE
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nowhere/ca.pem")
    found = refused(kis("https://kis.invalid").issue())
    assert (found.outcome, "REQUESTS_CA_BUNDLE" in found.what) == (Outcome.UNREACHABLE, True)

    def full(*_: object, **__: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", full)
    found = refused(kis("https://kis.invalid").issue())
    assert (found.outcome, "thread" in found.what) == (Outcome.UNREACHABLE, True)


def test_certificate_that_is_not_trusted_gets_no_credentials(encrypted: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenSSL's own reason is named, nothing was sent and nothing counts."""
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.delenv("REQUESTS_CA_BUNDLE")
    found = refused(kis(encrypted.url).issue())
    assert (found.outcome, encrypted.requests) == (Outcome.UNREACHABLE, [])
    assert "certificate: self-signed certificate" in found.what


def test_encrypted_connection_that_breaks_after_the_request_counts(encrypted: Wire) -> None:
    """The request may have reached KIS, so it is not repeated: one request, `no_answer`."""
    encrypted.reply, encrypted.raw = b"no TLS record\r\n" * 9, True
    found = refused(kis(encrypted.url).issue())
    assert (found.outcome, len(encrypted.requests)) == (Outcome.NO_ANSWER, 1)
    assert "encrypted connection failed (" in found.what


def test_proxy_is_asked_for_kis_and_not_for_loopback(gateway: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """HTTPS_PROXY and its kin count as usual, but do not come between tokencore and the sandbox."""
    gateway.set_rules(issue_interval=0)
    with Wire(b"HTTP/1.1 403 no\r\n\r\n") as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        for url in (gateway.url, gateway.url.replace("127.0.0.1", "localhost")):
            assert isinstance(kis(url).issue(), Token)
        assert proxy.requests == []
        monkeypatch.setattr(time, "sleep", lambda _: None)
        found = refused(kis("https://kis.invalid").issue())
    assert (found.outcome, "proxy" in found.what) == (Outcome.UNREACHABLE, True)
    assert proxy.requests[0].startswith(b"CONNECT kis.invalid:443")


def test_no_credential_is_logged_shown_or_pickled(gateway: Sandbox, caplog: pytest.LogCaptureFixture) -> None:
    """Not in debug logs of any library, not in repr or pickle, not in a traceback of what is raised."""
    caplog.set_level(logging.DEBUG)
    asked = kis(gateway.url, timeout=0.3)
    with pytest.raises(TypeError) as unpickled:
        pickle.dumps(asked)
    shown = [repr(asked), str(unpickled.value)]
    for mode in (*(row[0] for row in FAILURES), None):
        gateway.clear()
        if mode:
            gateway.fail(mode)
        shown.append(repr(asked.issue()))
        try:
            asked.revoke(make_jwt())
        except TokenError as error:
            shown.append("".join(traceback.format_exception(error)))
        shown.append(str(asked.quote(make_jwt(), for_exchanges(["KRX"]))))
    shown.append(caplog.text)
    assert not any(canary in text for text in shown for canary in CANARIES)
    assert len(caplog.records) > 10


@pytest.mark.parametrize("codes", [[], ["KRX"], ["NASD", "KRX"], ["NASD", "NYSE"], ["SEHK"]], ids=str)
def test_quote_call_proves_a_token_or_its_death(gateway: Sandbox, codes: list[str]) -> None:
    """True for a token that works, False with KIS's words for a dead one; of Korea where one of the exchanges is."""
    asked, quote = kis(gateway.url), for_exchanges(codes)
    assert quote.code == {"[]": "J", "['NASD', 'NYSE']": "NAS", "['SEHK']": "HKS"}.get(str(codes), "J")
    token = asked.issue()
    assert isinstance(token, Token)
    assert asked.quote(token.access_token, quote)[:2] == (True, "rt_cd 0")
    gateway.kill_tokens()
    accepted, detail = asked.quote(token.access_token, quote)[:2]
    assert (accepted, "EGW00121 유효하지 않은 token" in detail) == (False, True)
    assert (gateway.stats()["quotes"], gateway.stats()["quotes_refused"]) == (1, {"EGW00121": 1})


@pytest.mark.parametrize(
    ("status", "body", "accepted"),
    [
        (200, {"rt_cd": "0", "output": {}}, True),
        (200, {"rt_cd": "1", "msg_cd": "EGW00123"}, False),
        (401, {"error_code": "EGW00121"}, False),
        (403, {"error_code": "EGW00123"}, False),
        (500, {"rt_cd": "1", "msg_cd": "EGW00201"}, None),
        (500, {"rt_cd": "1", "msg_cd": ["EGW00121"]}, None),
        (403, b"<html>", None),
        (200, b"", None),
    ],
)
def test_quote_is_judged_on_code_and_status_never_on_rows(
    wire: Wire,
    status: int,
    body: object,
    accepted: bool | None,  # noqa: FBT001 - what the quote says
) -> None:
    """An empty answer with `rt_cd` 0 proves the token; the call rate, a proxy or an outage proves nothing."""
    wire.answer(status, body, **{"Content-Type": "text/html"})
    found = kis(wire.url).quote(make_jwt(), for_exchanges(["KRX"]))
    assert (found.accepted, found.status) == (accepted, status)
    assert found.detail
    head = wire.requests[0].decode()
    assert head.startswith("GET /uapi/domestic-stock/v1/quotations/inquire-price?FID_COND_MRKT_DIV_CODE=J")
    assert {"tr_id: FHKST01010100", "custtype: P"} <= set(head.split("\r\n"))


def test_quote_without_an_answer_says_nothing(closed: int) -> None:
    """No connection is neither a proof nor a death, and is not tried again and again."""
    found = kis(f"http://127.0.0.1:{closed}").quote(make_jwt(), for_exchanges([]))
    assert (found.accepted, found.status, "no whole answer" in found.detail) == (None, None, True)
    assert len(_connects[closed]) == 1


def test_revoked_token_is_dead_for_everyone(gateway: Sandbox, closed: int) -> None:
    """After `revoke` business calls refuse it; one that is dead already is as good as revoked."""
    asked = kis(gateway.url)
    token = asked.issue()
    assert isinstance(token, Token)
    asked.revoke(token.access_token)
    assert asked.quote(token.access_token, for_exchanges([])).accepted is False
    asked.revoke(token.access_token)
    assert gateway.stats()["revokes"] == 1
    with pytest.raises(IssuerUnavailableError, match="not revoked and stays valid"):
        kis(f"http://127.0.0.1:{closed}").revoke(token.access_token)


@pytest.mark.parametrize(
    ("status", "body"),
    [(403, {"error_code": "EGW00103"}), (500, b""), (200, b""), (200, {"code": 500, "message": "x"}), (302, b"")],
)
def test_token_that_kis_did_not_revoke_is_said_to_stay_valid(wire: Wire, status: int, body: object) -> None:
    """Only KIS's own word counts as revoked; anything else is an error that shows no token."""
    wire.answer(status, body)
    with pytest.raises(IssuerUnavailableError, match="stays valid") as caught:
        kis(wire.url).revoke(make_jwt())
    assert not any(canary in str(caught.value) for canary in CANARIES)
