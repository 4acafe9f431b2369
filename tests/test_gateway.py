"""KIS over HTTP: every answer and refusal told apart, nothing followed, nothing repeated, nothing given away."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
import socket
import ssl
import subprocess
import threading
import time
import traceback
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
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


@pytest.fixture
def wire() -> Iterator[Wire]:
    """A server that says what a test wants."""
    with Wire() as running:
        yield running


@pytest.fixture
def closed() -> int:
    """A port on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
    return port


def kis(url: str, *, timeout: float = TIMEOUT, key: str = KEY, secret: str = SECRET) -> Gateway:
    """KIS's gateway at this address, with credentials that are easy to find."""
    return Gateway(url, (key, secret), timeout=timeout)


def issued(url: str) -> Token:
    """A token of the gateway at this address."""
    token = kis(url).issue()
    assert isinstance(token, Token)
    return token


def refused(answer: Token | Refusal | str) -> Refusal:
    """The refusal, which shows nothing secret and stays on one line."""
    assert isinstance(answer, Refusal)
    shown = f"{answer!r} {answer.as_error('', datetime.now(UTC))}"
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
    issued(encrypted.url)
    (request,) = encrypted.requests
    head, _, body = request.partition(b"\r\n\r\n")
    assert head.startswith(b"POST /oauth2/tokenP HTTP/1.1\r\n")
    assert b"content-type: application/json; charset=utf-8" in head.lower()
    assert f"content-length: {len(body)}".encode() in head.lower()
    assert not any(name in head.lower() for name in (b"authorization", b"tr_id", b"appkey", b"cookie"))
    assert json.loads(body) == {"grant_type": "client_credentials", "appkey": KEY, "appsecret": SECRET}


def test_token_has_kis_own_issue_and_expiry(gateway: Sandbox) -> None:
    """What the gateway grants becomes a token of a day, issued this second."""
    token = issued(gateway.url)
    assert token.issued_at
    assert token.expires_at - token.issued_at == DAY
    assert abs(datetime.now(UTC) - token.issued_at) < timedelta(seconds=3)


CLASSES = {Outcome.LIMIT: IssuanceLimitError} | dict.fromkeys(
    (Outcome.BAD_KEY, Outcome.BAD_SECRET, Outcome.DENIED), CredentialsError
)  # every other outcome is IssuerUnavailableError
# The sandbox's faults: outcome, code, and words of `what` and `fix`.
FAILURES = [
    ("limit", Outcome.LIMIT, "EGW00133", "one request a minute", "24-hour limit"),
    ("bad-key", Outcome.BAD_KEY, "EGW00103", "does not know the app key", "KIS_ENVIRONMENT"),
    ("bad-secret", Outcome.BAD_SECRET, "EGW00105", "refused the app secret", "KIS_APP_SECRET"),
    ("down", Outcome.SERVER_ERROR, "EGW00002", "fault of its own", "tries again"),
    ("html", Outcome.REFUSED, "HTTP 403", "HTTP 403: 403 Forbidden", "24-hour limit"),
    ("garbage", Outcome.BAD_ANSWER, None, "no access_token", "cool-down"),
    ("no-token", Outcome.BAD_ANSWER, None, "no access_token", "cool-down"),
    ("past", Outcome.BAD_ANSWER, None, "already expired", "cool-down"),
    ("half", Outcome.NO_ANSWER, None, "broke off", "cool-down"),
    ("drop", Outcome.NO_ANSWER, None, "broke off", "cool-down"),
    ("huge", Outcome.NO_ANSWER, None, "larger than 65536 bytes", "cool-down"),
    ("hang", Outcome.NO_ANSWER, None, "KIS_TIMEOUT", "cool-down"),
    ("drip", Outcome.NO_ANSWER, None, "too slowly", "cool-down"),
]
# Answers of either shape: status, body, outcome and code.
ANSWERS = [
    *(
        (403, {"error_code": f"EGW00{code}"}, Outcome.DENIED, f"EGW00{code}")
        for code in ("003", "004", "206", "207", "210")
    ),
    (403, {"error_code": "EGW00102"}, Outcome.BAD_KEY, "EGW00102"),
    (403, {"error_code": "EGW00104"}, Outcome.BAD_SECRET, "EGW00104"),
    (200, {"error_code": "EGW00133"}, Outcome.LIMIT, "EGW00133"),
    (500, {"msg_cd": "EGW00133", "rt_cd": "1"}, Outcome.LIMIT, "EGW00133"),
    (200, {"msg_cd": "EGW00103", "rt_cd": "1"}, Outcome.BAD_KEY, "EGW00103"),
    (403, {"error_code": "EGW00001"}, Outcome.SERVER_ERROR, "EGW00001"),
    (403, {"error_code": "EGW09999"}, Outcome.REFUSED, "EGW09999"),
    (200, {"error_code": "EGW09999"}, Outcome.REFUSED, "EGW09999"),
    (429, b"[]", Outcome.REFUSED, "HTTP 429"),
    (204, b"", Outcome.REFUSED, "HTTP 204"),
    (503, b"<html>maintenance", Outcome.SERVER_ERROR, "HTTP 503"),
    (500, {"msg_cd": "EGW00201"}, Outcome.SERVER_ERROR, "EGW00201"),
    (403, {"error_code": ["EGW00133"]}, Outcome.REFUSED, "HTTP 403"),
    (403, {"error_code": KEY}, Outcome.REFUSED, "HTTP 403"),
    (200, b"[" * 60_000, Outcome.BAD_ANSWER, None),
    (200, make_answer() | {"access_token": "two words"}, Outcome.BAD_ANSWER, None),
]


def error_class(refusal: Refusal) -> type[TokenError]:
    """What `except` would catch."""
    return type(refusal.as_error("", datetime.now(UTC)))


@pytest.mark.parametrize(("mode", "outcome", "code", "what", "fix"), FAILURES, ids=[row[0] for row in FAILURES])
def test_every_failure_has_its_own_outcome_error_and_advice(
    gateway: Sandbox, mode: str, outcome: Outcome, code: str | None, what: str, fix: str
) -> None:
    """Each way in which the gateway fails is told apart, after one request and within the time-outs."""
    gateway.fail(mode)
    start = time.monotonic()
    found = refused(kis(gateway.url, timeout=0.3 if mode in ("hang", "drip") else TIMEOUT).issue())
    assert time.monotonic() - start < 2
    assert (found.outcome, found.code, error_class(found)) == (
        outcome,
        code,
        CLASSES.get(outcome, IssuerUnavailableError),
    )
    assert what in found.what
    assert fix in found.fix
    assert gateway.stats()["token_requests"] == 1
    assert Attempt(datetime.now(UTC), found.outcome).counts


@pytest.mark.parametrize(("status", "body", "outcome", "code"), ANSWERS)
def test_code_decides_and_then_the_status(
    wire: Wire, status: int, body: object, outcome: Outcome, code: str | None
) -> None:
    """Both shapes of KIS's errors are read at any status; what has no known code is judged by its status."""
    wire.answer(status, body)
    found = refused(kis(wire.url).issue())
    assert (found.outcome, found.code, error_class(found)) == (
        outcome,
        code,
        CLASSES.get(outcome, IssuerUnavailableError),
    )
    assert len(wire.requests) == 1


@pytest.mark.parametrize(
    ("key", "secret", "said"),
    [(SECRET[:180], KEY, "these 180 and 36 (they look swapped)"), (KEY, SECRET[:179], "these 36 and 179;")],
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
        pytest.param(b"Content-Length: 900\r\n\r\n" + b" " * 900, id="known length"),
        pytest.param(b"Connection: close\r\n\r\n" + b" " * 900, id="until the end"),
        pytest.param(b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 200, id="chunks"),
    ],
)
def test_body_that_comes_byte_by_byte_ends_in_twice_the_time_out(encrypted: Wire, drip: bytes) -> None:
    """Each byte comes within the time-out, so that only a bound on the whole answer ends it; over TLS as well."""
    encrypted.drip = b"HTTP/1.1 200 OK\r\n" + drip
    began = time.monotonic()
    found = refused(kis(encrypted.url, timeout=0.6).issue())
    assert (found.outcome, "too slowly" in found.what) == (Outcome.NO_ANSWER, True)
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
    """Whatever its status, nobody is sent the credentials again, nor is its answer read without bounds."""
    with Wire() as elsewhere:
        for status in (301, 302, 303, 307, 308):
            wire.answer(status, b" " * 70_000 if status == 303 else b"", Location=f"{elsewhere.url}/oauth2/tokenP")
            found = refused(kis(wire.url).issue())
            assert found.code == (None if status == 303 else f"HTTP {status}")
        assert elsewhere.requests == []
    assert len(wire.requests) == 5


def test_refused_connection_is_tried_four_times_with_growing_pauses(closed: int) -> None:
    """What cannot have reached KIS is tried three times more, later each time, and starts no cool-down."""
    tries: list[float] = []

    def depart() -> bool:
        tries.append(time.monotonic())
        return True

    found = refused(kis(f"http://127.0.0.1:{closed}").issue(depart))
    assert (found.outcome, error_class(found)) == (Outcome.UNREACHABLE, IssuerUnavailableError)
    assert not Attempt(datetime.now(UTC), found.outcome).counts
    pauses = [later - earlier for earlier, later in pairwise(tries)]
    for pause, usual in zip(pauses, (0.25, 0.5, 1), strict=True):
        assert usual * 0.5 <= pause <= usual * 1.5 + 0.25


def test_request_that_may_not_depart_is_not_sent(gateway: Sandbox) -> None:
    """Where the record does not take the attempt nothing leaves, and the refusal is none that counts."""
    found = refused(kis(gateway.url).issue(lambda: False))
    assert (found.outcome, gateway.stats()["token_requests"]) == (Outcome.UNREACHABLE, 0)
    assert "Nothing was sent" in found.what


def test_gateway_that_comes_up_meanwhile_is_reached(closed: int) -> None:
    """A restart of the gateway costs a moment, not the token: the next try finds it."""
    found: list[Token | Refusal] = []
    gateway = kis(f"http://127.0.0.1:{closed}")
    asking = threading.Thread(target=lambda: found.append(gateway.issue()))
    asking.start()
    time.sleep(0.1)  # the first try fails in a millisecond, and the second comes after an eighth of a second
    with Sandbox(port=closed) as running:
        asking.join()
        assert isinstance(found[0], Token)
        assert running.stats()["token_requests"] == 1


@pytest.mark.parametrize("url", ["nonsense", "http://openapi.koreainvestment.com:9443", "ftp://127.0.0.1", "https://"])
def test_address_where_secrets_may_not_go_is_refused_at_once(url: str) -> None:
    """Neither https nor this machine: an error that names the setting, before anything is sent."""
    with pytest.raises(ConfigurationError, match="KIS_BASE_URL"):
        kis(url)


def test_fault_before_the_request_leaves_is_no_attempt(
    encrypted: Wire, gateway: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host that is none, certificates that are unreadable or not trusted, a proxy that refuses: `unreachable`.

    Proxies do not come between tokencore and the sandbox.
    """
    monkeypatch.setattr(time, "sleep", lambda _: None)
    words = {f"https://{'a' * 70}.kr": "", "https://kis.invalid": "REQUESTS_CA_BUNDLE"}
    for url, why in words.items():
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nowhere/ca.pem")
        found = refused(kis(url).issue())
        assert (found.outcome, why in found.what) == (Outcome.UNREACHABLE, True)
    monkeypatch.delenv("REQUESTS_CA_BUNDLE")
    assert "certificate: self-signed certificate" in refused(kis(encrypted.url).issue()).what
    assert encrypted.requests == []
    with Wire(b"HTTP/1.1 403 no\r\n\r\n") as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        issued(gateway.url.replace("127.0.0.1", "localhost"))
        assert proxy.requests == []
        found = refused(kis("https://kis.invalid").issue())
        assert (found.outcome, "proxy" in found.what) == (Outcome.UNREACHABLE, True)
        assert proxy.requests[0].startswith(b"CONNECT kis.invalid:443")


def test_encrypted_connection_that_breaks_after_the_request_counts(encrypted: Wire) -> None:
    """The request may have reached KIS, so it is not repeated: one request, `no_answer`."""
    encrypted.reply, encrypted.raw = b"no TLS record\r\n" * 9, True
    found = refused(kis(encrypted.url).issue())
    assert (found.outcome, len(encrypted.requests)) == (Outcome.NO_ANSWER, 1)
    assert "encrypted connection failed (" in found.what


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


@pytest.mark.parametrize(
    ("codes", "code"), [([], "J"), (["NASD", "KRX"], "J"), (["NASD", "NYSE"], "NAS"), (["SEHK"], "HKS")]
)
def test_quote_call_proves_a_token_or_its_death(gateway: Sandbox, codes: list[str], code: str) -> None:
    """True for a token that works, False with KIS's words for a dead one; of Korea where one of the exchanges is."""
    asked, quote, text = kis(gateway.url), for_exchanges(codes), issued(gateway.url).access_token
    assert quote.code == code
    assert asked.quote(text, quote)[:2] == (True, "rt_cd 0")
    gateway.kill_tokens()
    accepted, detail = asked.quote(text, quote)[:2]
    assert (accepted, "EGW00121 유효하지 않은 token" in detail) == (False, True)


@pytest.mark.parametrize(
    ("status", "body", "accepted"),
    [
        (200, {"rt_cd": "0", "output": {}}, True),
        (200, {"rt_cd": "1", "msg_cd": "EGW00123"}, False),
        (401, {"error_code": "EGW00121"}, False),
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
    assert (found.accepted, found.status, bool(found.detail)) == (accepted, status, True)
    head = wire.requests[0].decode()
    assert head.startswith("GET /uapi/domestic-stock/v1/quotations/inquire-price?FID_COND_MRKT_DIV_CODE=J")
    assert {"tr_id: FHKST01010100", "custtype: P"} <= set(head.split("\r\n"))


def test_quote_without_an_answer_says_nothing(closed: int) -> None:
    """No connection is neither a proof nor a death, and is not tried again and again."""
    began = time.monotonic()
    found = kis(f"http://127.0.0.1:{closed}").quote(make_jwt(), for_exchanges([]))
    assert (found.accepted, found.status, "no whole answer" in found.detail) == (None, None, True)
    assert time.monotonic() - began < 0.8  # the pauses between four tries take longer


def test_revoked_token_is_dead_for_everyone(gateway: Sandbox, closed: int) -> None:
    """After `revoke` business calls refuse it; one that is dead already is as good as revoked."""
    asked, text = kis(gateway.url), issued(gateway.url).access_token
    asked.revoke(text)
    assert asked.quote(text, for_exchanges([])).accepted is False
    asked.revoke(text)
    assert gateway.stats()["revokes"] == 1
    with pytest.raises(IssuerUnavailableError, match="not revoked and stays valid"):
        kis(f"http://127.0.0.1:{closed}").revoke(text)


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
