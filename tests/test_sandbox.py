"""The sandbox gateway, asked over real HTTP as a client would ask KIS."""

from __future__ import annotations

import base64
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import pytest
import requests
from running import until

from tokencore.errors import ConfigurationError
from tokencore.sandbox import APP_KEY, APP_SECRET, Sandbox
from tokencore.sandbox.rules import APPROVAL, FAILURES, QUOTES, REVOKE, TEXTS, TOKEN, Gateway, Request
from tokencore.tokens import KST

if TYPE_CHECKING:
    from collections.abc import Iterator

KEY, SECRET = "canary-key-" + "k" * 25, "canary-secret-" + "s" * 166
DOMESTIC, _, PRICE, _, DAILY = QUOTES
OTHER = "요청하신 오류입니다."  # KIS's words for codes that have none here


@pytest.fixture
def kis() -> Iterator[Sandbox]:
    """A gateway with KIS's own lengths."""
    with Sandbox() as running:
        yield running


@pytest.fixture
def lenient(kis: Sandbox) -> Sandbox:
    """A gateway without the minute limit."""
    kis.set_rules(issue_interval=0)
    return kis


def post(kis: Sandbox, path: str, body: object, timeout: float = 5) -> requests.Response:
    """The answer to a JSON body, redirects not followed."""
    return requests.post(kis.url + path, json=body, timeout=timeout, allow_redirects=False)


def credentials(**changes: object) -> dict[str, object]:
    """The body of a right token request, with changes; None leaves a field out."""
    body = {"grant_type": "client_credentials", "appkey": KEY, "appsecret": SECRET, **changes}
    return {name: value for name, value in body.items() if value is not None}


def issue(kis: Sandbox, timeout: float = 5, **changes: object) -> requests.Response:
    """The answer of tokenP."""
    return post(kis, TOKEN, credentials(**changes), timeout)


def token_of(kis: Sandbox) -> str:
    """The token that tokenP grants."""
    token: str = issue(kis).json()["access_token"]
    return token


def quote(kis: Sandbox, token: str, path: str = DOMESTIC, *, excd: str = "NAS", **changes: str) -> requests.Response:
    """The answer of a business call, its headers changed."""
    known = {"authorization": f"Bearer {token}", "appkey": KEY, "appsecret": SECRET, "tr_id": QUOTES[path]}
    params = {"EXCD": excd, "SYMB": "AAPL"} if path != DOMESTIC else {"FID_INPUT_ISCD": "005930"}
    return requests.get(kis.url + path, headers={**known, **changes}, params=params, timeout=5)


def test_a_token_is_a_jwt_whose_expiry_is_the_text_in_kst(kis: Sandbox) -> None:
    """A new token says the same expiry twice, as `exp` and as KST text, and its `jti` is the app key."""
    before = int(time.time())
    body = issue(kis).json()
    _, part, _ = body["access_token"].split(".")
    claims = json.loads(base64.urlsafe_b64decode(part + "=="))
    assert (body["token_type"], body["expires_in"]) == ("Bearer", 86400)
    assert body["access_token_token_expired"] == f"{datetime.fromtimestamp(claims['exp'], KST):%Y-%m-%d %H:%M:%S}"
    assert (claims["iss"], claims["jti"], claims["exp"] - claims["iat"]) == ("unogw", KEY, 86400)
    assert before <= claims["iat"] <= time.time()


def test_the_minute_rolls_from_the_last_grant_and_the_six_hours_from_the_issue() -> None:
    """Refused requests do not prolong the wait, and a token handed out again starts a new minute."""
    gateway = Gateway()
    asked = Request("POST", TOKEN, credentials())
    outcomes = {now: gateway.respond(asked, now).outcome for now in (0, 59, 60, 119, 120, 21_599, 21_600, 21_660)}
    assert list(outcomes.values()) == ["new", "EGW00133", "same", "EGW00133", "same", "same", "EGW00133", "new"]


def test_a_token_handed_out_again_is_the_same_to_the_letter(lenient: Sandbox) -> None:
    """Inside the six hours the whole answer comes back, its `expires_in` overstated; then another token."""
    first = issue(lenient).json()
    assert issue(lenient).json() == first
    lenient.set_rules(same_token=0)
    assert token_of(lenient) != first["access_token"]
    stats = lenient.stats()
    assert (stats["token_requests"], stats["granted_new"], stats["granted_same"]) == (3, 2, 1)


def test_tokenp_takes_its_latency_and_nothing_else_does(kis: Sandbox) -> None:
    """`latency` delays tokenP alone; a kept connection takes no 40 ms a call, as if bodies awaited an ACK."""
    kis.set_rules(latency=0.3)
    assert issue(kis).elapsed.total_seconds() >= 0.3
    with requests.Session() as session:
        start = time.monotonic()
        for _ in range(100):
            session.get(f"{kis.url}/sandbox/stats", timeout=5)
    assert time.monotonic() - start < 3


def test_64_requests_at_once_are_granted_one_token(kis: Sandbox) -> None:
    """However many ask in one instant, one is granted and the others are refused; another key has its own minute."""
    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(lambda _: issue(kis, timeout=15), range(64)))
    assert sorted(answer.status_code for answer in answers) == [200] + [403] * 63
    stats = kis.stats()
    assert (stats["granted_new"], stats["granted_same"], stats["refused"]) == (1, 0, {"EGW00133": 63})
    assert issue(kis, appkey="x" * 36).status_code == 200


MALFORMED: dict[str, tuple[bytes | dict[str, object], str]] = {
    "no JSON": (b"{not json", "EGW00101"),
    "no text": (b"\xff\xfe", "EGW00101"),
    "nested too deep": (b"[" * 50_000, "EGW00101"),
    "no object": (b"[1]", "EGW00101"),
    "another grant": ({"grant_type": "password"}, "EGW00116"),
    "no key": ({"appkey": None}, "EGW00102"),
    "no secret": ({"appsecret": None}, "EGW00104"),
    "not the first secret of this key": ({"appsecret": "another"}, "EGW00105"),
}


@pytest.mark.parametrize(("body", "code"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_requests_are_refused_with_a_code(
    lenient: Sandbox, body: bytes | dict[str, object], code: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whatever is wrong with a request, it is refused in KIS's shape and words, and nothing is printed."""
    issue(lenient)
    data = body if isinstance(body, bytes) else json.dumps(credentials(**body)).encode()
    answer = requests.post(lenient.url + TOKEN, data=data, timeout=5)
    refusal = {"error_code": code, "error_description": TEXTS.get(code, OTHER)}
    assert (answer.status_code, answer.json(), capfd.readouterr()) == (403, refusal, ("", ""))


def test_an_expired_token_is_refused_and_replaced(lenient: Sandbox) -> None:
    """A token past its expiry is refused as expired, and tokenP does not hand it out again."""
    lenient.set_rules(token_life=1)
    token = token_of(lenient)
    time.sleep(1.05)
    assert quote(lenient, token).json()["msg_cd"] == "EGW00123"
    assert token_of(lenient) != token


def test_a_dead_token_is_refused_and_handed_out_again(lenient: Sandbox) -> None:
    """Revoked, by its own key only, or killed by maintenance, it is refused, yet tokenP returns it for six hours."""
    token = token_of(lenient)
    for change, code in (({"appkey": "x" * 36}, "EGW00121"), ({"appsecret": "y"}, "EGW00105")):
        assert post(lenient, REVOKE, credentials(token=token, **change)).json()["error_code"] == code
    assert quote(lenient, token).status_code == 200
    answers = [post(lenient, REVOKE, credentials(token=token)).json() for _ in range(2)]
    assert answers[0] == {"code": 200, "message": "접근토큰 폐기에 성공하였습니다"}
    assert (answers[1]["error_code"], lenient.stats()["revokes"]) == ("EGW00121", 1)
    assert quote(lenient, token).json()["msg_cd"] == "EGW00121"
    assert token_of(lenient) == token
    lenient.set_rules(same_token=0)
    token = token_of(lenient)
    lenient.kill_tokens()
    assert quote(lenient, token).json()["msg_cd"] == "EGW00121"


def test_approval_takes_the_secret_as_secretkey(kis: Sandbox) -> None:
    """A key of a socket is a UUID; credentials in tokenP's own words are refused."""
    assert post(kis, APPROVAL, credentials()).json()["error_code"] == "EGW00104"
    key = post(kis, APPROVAL, credentials(appsecret=None, secretkey=SECRET)).json()["approval_key"]
    assert (len(key), kis.stats()["approvals"]) == (36, 1)


def test_quotes_answer_rows_of_text(kis: Sandbox) -> None:
    """Every business call answers `rt_cd` 0 and strings; daily prices have no row for an order code, and no error."""
    token = token_of(kis)
    answers = {path: quote(kis, token, path).json() for path in QUOTES}
    assert {answer["rt_cd"] for answer in answers.values()} == {"0"}
    assert (answers[DOMESTIC]["output"]["stck_prpr"], answers[PRICE]["output"]["last"]) == ("71500", "231.1000")
    rows = [row for answer in answers.values() for row in [*answer.get("output2", ()), answer.get("output", {})]]
    assert all(isinstance(value, str) for row in rows for value in row.values())
    assert len(answers[DAILY]["output2"]) == 5
    assert {"xymd", "open", "high", "low", "clos", "tvol"} <= answers[DAILY]["output2"][0].keys()
    ordered = quote(kis, token, DAILY, excd="NASD").json()
    assert (ordered["rt_cd"], ordered["output2"]) == ("0", [])
    assert kis.stats()["quotes"] == len(QUOTES) + 1


WRONG_HEADERS = {
    "no bearer": ({"authorization": ""}, "EGW00122"),
    "an empty bearer": ({"authorization": "Bearer"}, "EGW00122"),
    "a foreign token": ({"authorization": "Bearer a.b.c"}, "EGW00121"),
    "another key than the token's": ({"appkey": "x"}, "EGW00103"),
    "no secret": ({"appsecret": ""}, "EGW00105"),
    "another call's tr_id": ({"tr_id": "HHDFS00000300"}, "EGW00203"),
}


@pytest.mark.parametrize(("headers", "code"), WRONG_HEADERS.values(), ids=WRONG_HEADERS)
def test_business_calls_check_their_headers(kis: Sandbox, headers: dict[str, str], code: str) -> None:
    """A business call with a wrong header is refused with status 500 in the business shape."""
    answer = quote(kis, token_of(kis), **headers)
    assert (answer.status_code, answer.json()) == (500, {"rt_cd": "1", "msg_cd": code, "msg1": TEXTS.get(code, OTHER)})
    assert kis.stats()["quotes_refused"] == {code: 1}


FAULTS = "limit 403 EGW00133, bad-key 403 EGW00103, bad-secret 403 EGW00105, server-error 403 EGW00002"
FAULTS += ", down 500 EGW00002, EGW00210 403 EGW00210, html 403 html, garbage 200 garbage, redirect 302 redirect"
FAULTS += ", no-token 200 no-token, past 200 past, huge 200 huge"
FAULTS += ", drop ConnectionError drop, hang ReadTimeout hang, half ChunkedEncodingError half"


@pytest.mark.parametrize(("mode", "outcome", "counted"), [row.split() for row in FAULTS.split(", ")])
def test_failures_on_request_last_as_long_as_asked(kis: Sandbox, mode: str, outcome: str, counted: str) -> None:
    """A failure happens twice if asked for twice, is counted by its name or code, and leaves the minute alone.

    An answer that is dropped, late or cut is a client's network error.
    """
    kis.fail(mode, count=2)
    for _ in range(2):
        if outcome.isdigit():
            answer = issue(kis)
            assert (str(answer.status_code), '"access_token"' in answer.text) == (outcome, mode == "past")
            assert ("Location" in answer.headers) == (mode == "redirect")
            assert not counted.startswith("EGW") or answer.json()["error_code"] == counted
        else:
            with pytest.raises(getattr(requests.exceptions, outcome)):
                issue(kis, timeout=0.3)
    assert issue(kis).status_code == 200
    stats = kis.stats()
    assert {**stats["refused"], **stats["failed"]} == {counted: 2}
    assert [one["outcome"] for one in stats["requests"]] == [counted, counted, "new"]
    assert time.time() - 60 < stats["requests"][0]["at"] < stats["requests"][2]["at"] < time.time()


def test_a_dripping_answer_outlasts_the_time_for_a_read(kis: Sandbox, capfd: pytest.CaptureFixture[str]) -> None:
    """`drip` comes a byte at a time, so that no read times out; a client that turns away leaves no traceback."""
    kis.fail("drip", count=1)
    start = time.monotonic()
    with requests.post(kis.url + TOKEN, json=credentials(), timeout=0.5, stream=True) as answer:
        assert b"".join(next(answer.iter_content(1)) for _ in range(18)) == b'{"access_token": "'
        assert int(answer.headers["Content-Length"]) > 400
    assert 0.5 < time.monotonic() - start < 5
    assert issue(kis).status_code == 200
    assert capfd.readouterr() == ("", "")


SCRIPTED: dict[str, tuple[dict[str, str] | str, int, dict[str, int]]] = {
    "tokenP's shape": ({"error_code": "EGW00121"}, 401, {"EGW00121": 1}),
    "the business shape": ({"msg_cd": "EGW00123"}, 500, {"EGW00123": 1}),
    "a page of maintenance": ("<p>점검 중</p>", 503, {}),
    "a refusal of the call itself": ({"rt_cd": "7", "msg_cd": "IGW00002"}, 200, {}),
}


@pytest.mark.parametrize(("content", "status", "counted"), SCRIPTED.values(), ids=SCRIPTED)
def test_any_answer_can_be_scripted_for_a_path(
    kis: Sandbox, content: dict[str, str] | str, status: int, counted: dict[str, int]
) -> None:
    """A path answers just what a test wants, as often as wanted; of paths that begin alike the longest counts."""
    token = token_of(kis)
    kis.answer("/uapi/", {"rt_cd": "1", "msg_cd": "EGW00201"}, 500)
    wish = {"path": PRICE, "content": content, "status": status, "count": 1}
    assert post(kis, "/sandbox/answer", wish).json() == {"ok": True}
    assert post(kis, "/uapi/order", {}).json()["msg_cd"] == "EGW00201"
    answer = quote(kis, token, PRICE)
    assert (answer.status_code, answer.text if isinstance(content, str) else answer.json()) == (status, content)
    assert quote(kis, token, PRICE).json()["msg_cd"] == "EGW00201"
    assert kis.stats()["quotes_refused"] == {**counted, "EGW00201": 2}
    assert post(kis, "/sandbox/clear", {}).json() == {"ok": True}
    assert post(kis, "/uapi/order", {}).status_code == 404


def test_it_is_driven_over_http(kis: Sandbox) -> None:
    """Another process can ask for a failure, kill the tokens, change a rule and read what happened."""
    post(kis, "/sandbox/fail", {"mode": "down", "count": 1})
    assert issue(kis).status_code == 500
    token = token_of(kis)
    post(kis, "/sandbox/fail", {"mode": "dead-token"})
    assert quote(kis, token).json()["msg_cd"] == "EGW00121"
    post(kis, "/sandbox/rules", {"issue_interval": 0, "same_token": 0})
    assert quote(kis, token_of(kis)).status_code == 200
    stats = requests.get(f"{kis.url}/sandbox/stats", timeout=5).json()
    assert (stats, stats["rules"]["issue_interval"]) == (kis.stats(), 0)


WISHES: list[tuple[str, Any]] = [
    *[("fail", wish) for wish in ({}, {"mode": "sulk"}, {"mode": ["limit"]}, {"mode": "limit", "count": "1"})],
    *[("answer", {"path": PRICE, **wish}) for wish in ({}, {"content": 7}, {"content": {}, "status": "200"})],
    *[("answer", {"path": path, "content": {}}) for path in (7, "uapi")],
    *[("rules", {"latency": value}) for value in (-1, "1", 1e300)],
    *[("rules", wish) for wish in ({"token_life": 0}, {"self": 1})],
]


@pytest.mark.parametrize(("path", "body"), WISHES, ids=str)
def test_impossible_wishes_change_nothing(kis: Sandbox, path: str, body: object) -> None:
    """A wish that makes no sense is answered 400 with a reason, and the gateway is as it was."""
    before = kis.stats()
    answer = post(kis, f"/sandbox/{path}", body)
    assert (answer.status_code, answer.json()["error"] != "", kis.stats()) == (400, True, before)
    assert quote(kis, token_of(kis), PRICE).status_code == 200


def test_stats_and_log_hold_no_secret(lenient: Sandbox, capfd: pytest.CaptureFixture[str]) -> None:
    """After every kind of request the statistics show no token, key or secret, and nothing is printed."""
    token = token_of(lenient)
    quote(lenient, token)
    requests.get(lenient.url + TOKEN, params={"appkey": KEY, "appsecret": SECRET}, timeout=5)
    post(lenient, APPROVAL, credentials(secretkey=SECRET))
    post(lenient, REVOKE, credentials(token=token))
    issue(lenient, appsecret="wrong-" + SECRET)
    for mode in ("no-token", "half"):
        lenient.fail(mode, 1)
        with pytest.raises((requests.RequestException, KeyError)):
            token_of(lenient)
    seen = json.dumps(lenient.stats()) + repr(vars(lenient)["_tokens"].values())
    assert [secret for secret in (KEY, SECRET, *token.split(".")[1:]) if secret in seen] == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("mode", ["hang", "drip", "slow"])
def test_leaving_ends_port_answers_and_threads(mode: str) -> None:
    """When the block ends the gateway is gone, even for clients that are still connected or waiting."""
    before = set(threading.enumerate())
    with requests.Session() as session, ThreadPoolExecutor(1) as pool:
        with Sandbox(latency=60 if mode == "slow" else 0) as gateway:
            assert session.get(f"{gateway.url}/sandbox/stats", timeout=5).status_code == 200
            if mode in FAILURES:
                gateway.fail(mode)
            waiting = pool.submit(issue, gateway, timeout=30)
            until(lambda: bool(gateway.stats()["requests"]))
        with pytest.raises(requests.RequestException):
            waiting.result(timeout=2)
        for _ in range(2):  # the kept connection, and a new one
            with pytest.raises(requests.ConnectionError):
                session.get(f"{gateway.url}/sandbox/stats", timeout=5)
    with gateway:
        assert requests.get(f"{gateway.url}/sandbox/stats", timeout=5).status_code == 200
    until(lambda: set(threading.enumerate()) <= before, within=2)


def test_it_listens_on_loopback_alone_and_says_when_it_cannot(kis: Sandbox) -> None:
    """It has no password, so no other address answers; a port in use, or none at all, is a ConfigurationError."""
    taken = int(kis.url.rpartition(":")[2])
    with pytest.raises(OSError, match=r"refused|reach|timed out|assign"):
        socket.create_connection(("127.0.0.2", taken), timeout=2)  # answers if something listens everywhere
    for port in (taken, 70_000):
        words = rf"^Cannot listen on 127.0.0.1:{port} .* --port\.$"
        with pytest.raises(ConfigurationError, match=words), Sandbox(port=port):
            pass


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_the_command_says_how_to_point_the_settings_here(sign: signal.Signals) -> None:
    """The command prints settings and a scripted answer that work as they stand, and ends with 0."""
    command = [sys.executable, "-m", "tokencore", "sandbox", "--port", "0"]
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            printed = "".join(takewhile(lambda line: "/sandbox/stats" not in line, process.stdout or ()))
            url, key, secret = re.findall(r"^export KIS_\w+=(.+)$", printed, re.MULTILINE)
            body = credentials(appkey=key, appsecret=secret)
            assert requests.post(url + TOKEN, json=body, timeout=5).json()["token_type"] == "Bearer"
            script = re.findall(r"/sandbox/answer -d '(.+)'", printed)[0]
            requests.post(url + "/sandbox/answer", data=script, timeout=5)
            assert requests.get(url + DOMESTIC, timeout=5).json() == {"error_code": "EGW00121"}
            process.send_signal(sign)
            rest, errors = process.communicate(timeout=5)
        finally:
            process.kill()
    assert (process.returncode, rest, errors) == (0, "", "")
    assert all(mode in printed for mode in (*FAILURES, "dead-token"))
    assert (key, secret, len(APP_KEY), len(APP_SECRET)) == (APP_KEY, APP_SECRET, 36, 180)
