"""The sandbox gateway, asked over real HTTP as a client would ask KIS."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from itertools import takewhile
from subprocess import PIPE
from typing import TYPE_CHECKING, Any

import pytest
import requests

from tokencore.errors import ConfigurationError
from tokencore.sandbox import APP_KEY, APP_SECRET, Sandbox
from tokencore.sandbox_rules import FAILURES, Gateway, Rules

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

KEY, SECRET = "canary-key-" + "k" * 25, "canary-secret-" + "s" * 166
KST = timezone(timedelta(hours=9))
DOMESTIC = "/uapi/domestic-stock/v1/quotations/inquire-price"
PRICE = "/uapi/overseas-price/v1/quotations/price"
DAILY = "/uapi/overseas-price/v1/quotations/dailyprice"
TR_IDS = {DOMESTIC: "FHKST01010100", PRICE: "HHDFS00000300", DAILY: "HHDFS76240000"}
COMMAND = (
    "import argparse, sys; from tokencore import sandbox as s; p = argparse.ArgumentParser();"
    " s.add(lambda *_: p); sys.exit(s.run(p.parse_args()))"
)


@pytest.fixture
def gateway() -> Iterator[Sandbox]:
    """A gateway with KIS's own lengths."""
    with Sandbox() as running:
        yield running


def post(gateway: Sandbox, path: str, body: object, timeout: float = 5) -> requests.Response:
    """The answer to a JSON body, redirects not followed."""
    return requests.post(gateway.url + path, json=body, timeout=timeout, allow_redirects=False)


def credentials(**changes: object) -> dict[str, object]:
    """The body of a right token request, with changes; None leaves a field out."""
    body = {"grant_type": "client_credentials", "appkey": KEY, "appsecret": SECRET, **changes}
    return {name: value for name, value in body.items() if value is not None}


def issue(gateway: Sandbox, timeout: float = 5, **changes: object) -> requests.Response:
    """The answer of tokenP."""
    return post(gateway, "/oauth2/tokenP", credentials(**changes), timeout)


def token_of(gateway: Sandbox) -> str:
    """The token that tokenP grants."""
    token: str = issue(gateway).json()["access_token"]
    return token


def claims_of(token: str) -> dict[str, Any]:
    """The claims of a JWT."""
    part = token.split(".")[1]
    claims: dict[str, Any] = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    return claims


def code_of(answer: requests.Response) -> str:
    """The error code in the shape of `/oauth2/*`."""
    code: str = answer.json()["error_code"]
    return code


def quote(
    gateway: Sandbox,
    token: str,
    path: str = DOMESTIC,
    excd: str = "NAS",
    changes: Mapping[str, str | None] | None = None,
) -> requests.Response:
    """The answer of a business call, its headers changed; None leaves one out."""
    headers = {
        "authorization": f"Bearer {token}",
        "appkey": KEY,
        "appsecret": SECRET,
        "tr_id": TR_IDS[path],
    }
    params = {"AUTH": "", "EXCD": excd, "SYMB": "AAPL"}
    if path == DOMESTIC:
        params = {"FID_COND_MRKT_DIV_CODE": "J", "FID_INPUT_ISCD": "005930"}
    kept = {name: value for name, value in {**headers, **(changes or {})}.items() if value is not None}
    return requests.get(gateway.url + path, headers=kept, params=params, timeout=5)


def test_token_is_a_jwt_whose_expiry_is_the_text_in_kst(gateway: Sandbox) -> None:
    """A new token says the same expiry twice: as `exp`, and as KST text; its `jti` is the app key."""
    before = int(time.time())
    answer = issue(gateway)
    body = answer.json()
    claims = claims_of(body["access_token"])
    expiry = datetime.fromtimestamp(claims["exp"], KST).strftime("%Y-%m-%d %H:%M:%S")
    assert (answer.status_code, body["token_type"], body["expires_in"]) == (200, "Bearer", 86400)
    assert body["access_token_token_expired"] == expiry
    assert (claims["iss"], claims["jti"], claims["exp"] - claims["iat"]) == ("unogw", KEY, 86400)
    assert before <= claims["iat"] <= time.time()
    assert len(body["access_token"].split(".")) == 3


def test_same_token_within_the_window_and_another_after_it() -> None:
    """Inside the six hours the same token and expiry come back with a full `expires_in`, then a new one."""
    with Sandbox(issue_interval=0) as gateway:
        first = issue(gateway).json()
        assert issue(gateway).json() == first
        gateway.set_rules(same_token=0)
        assert token_of(gateway) != first["access_token"]
        stats = gateway.stats()
    assert (stats["token_requests"], stats["granted_new"], stats["granted_same"]) == (3, 2, 1)


def test_minute_limit_refuses_in_kis_words(gateway: Sandbox) -> None:
    """A second request within the minute is answered 403 with KIS's text, whatever the six hours say."""
    issue(gateway)
    answer = issue(gateway)
    text = "접근토큰 발급 잠시 후 다시 시도하세요(1분당 1회)"
    assert answer.status_code == 403
    assert answer.json() == {"error_description": text, "error_code": "EGW00133"}


def test_minute_rolls_from_the_last_grant() -> None:
    """Refused requests do not prolong the wait, and a token handed out again starts a new minute."""
    gateway = Gateway(Rules())
    outcomes = [gateway.issue(credentials(), now).outcome for now in (0, 59, 60, 119, 120, 21_599, 21_600)]
    assert outcomes == ["new", "EGW00133", "same", "EGW00133", "same", "same", "EGW00133"]
    assert gateway.issue(credentials(), 21_660).outcome == "new"


def test_every_key_has_its_own_minute_and_token(gateway: Sandbox) -> None:
    """Two app keys are granted a token each in the same minute."""
    tokens = {issue(gateway, appkey=key).json()["access_token"] for key in (KEY, "x" * 36)}
    assert len(tokens) == 2


def test_64_requests_at_once_are_granted_one_token(gateway: Sandbox) -> None:
    """However many ask in one instant, one is granted and the others are refused by the minute."""
    barrier = threading.Barrier(64)

    def ask(_: int) -> int:
        barrier.wait()
        return issue(gateway, timeout=15).status_code

    with ThreadPoolExecutor(64) as pool:
        statuses = sorted(pool.map(ask, range(64)))
    stats = gateway.stats()
    assert statuses == [200] + [403] * 63
    assert (stats["granted_new"], stats["granted_same"], stats["refused"]) == (1, 0, {"EGW00133": 63})


def test_only_the_given_pair_is_accepted() -> None:
    """With a pair given, another key and another secret are refused in KIS's words and grant nothing."""
    with Sandbox(app_key=KEY, app_secret=SECRET) as gateway:
        wrong_key, wrong_secret = issue(gateway, appkey="x"), issue(gateway, appsecret=SECRET + "\n")
        right = issue(gateway)
    assert (wrong_key.status_code, wrong_secret.status_code, right.status_code) == (403, 403, 200)
    assert wrong_key.json() == {
        "error_description": "유효하지 않은 AppKey입니다.",
        "error_code": "EGW00103",
    }
    assert wrong_secret.json()["error_description"] == "유효하지 않은 AppSecret입니다."
    assert code_of(wrong_secret) == "EGW00105"


def test_first_secret_of_a_key_is_the_right_one(gateway: Sandbox) -> None:
    """Without a pair any key is a customer, but its secret cannot change afterwards."""
    issue(gateway)
    assert code_of(issue(gateway, appsecret="another")) == "EGW00105"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        pytest.param(b"{not json", "EGW00101", id="no JSON"),
        pytest.param(b"\xff\xfe", "EGW00101", id="no text"),
        pytest.param(b"[" * 50_000, "EGW00101", id="nested too deep"),
        pytest.param(b"[1]", "EGW00101", id="no object"),
        pytest.param(b"", "EGW00101", id="no body"),
        pytest.param({"grant_type": "password"}, "EGW00116", id="another grant"),
        pytest.param({"appkey": None}, "EGW00102", id="no key"),
        pytest.param({"appkey": 7}, "EGW00102", id="a key that is no text"),
        pytest.param({"appsecret": None}, "EGW00104", id="no secret"),
        pytest.param({"appsecret": ["s"]}, "EGW00104", id="a secret that is no text"),
    ],
)
def test_malformed_requests_are_refused_with_a_code(
    gateway: Sandbox, body: bytes | dict[str, object], code: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whatever is wrong with a request, it is refused in KIS's shape, and nothing is printed."""
    data = body if isinstance(body, bytes) else json.dumps(credentials(**body)).encode()
    answer = requests.post(f"{gateway.url}/oauth2/tokenP", data=data, timeout=5)
    assert (answer.status_code, code_of(answer)) == (403, code)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("header", ["Content-Length: 100000", "Content-Length: -1", "Transfer-Encoding: chunked"])
def test_body_of_undue_length_is_not_read(gateway: Sandbox, header: str) -> None:
    """A body announced too long, or of no known length, is answered before a byte of it is read."""
    with socket.create_connection(("127.0.0.1", int(gateway.url.rpartition(":")[2])), timeout=5) as client:
        client.sendall(f"POST /oauth2/tokenP HTTP/1.1\r\nHost: x\r\n{header}\r\n\r\n".encode())
        assert client.recv(12) == b"HTTP/1.1 413"


def test_kept_alive_connections_answer_at_once(gateway: Sandbox) -> None:
    """A hundred calls on one connection take no 40 ms each, as they would if the body waited for an ACK."""
    with requests.Session() as session:
        start = time.monotonic()
        for _ in range(100):
            session.get(f"{gateway.url}/sandbox/stats", timeout=5)
    assert time.monotonic() - start < 3


def test_tokenp_takes_its_latency_and_nothing_else_does() -> None:
    """`latency` delays tokenP's answer, and only tokenP's."""
    with Sandbox(latency=0.3) as gateway:
        answer = issue(gateway)
        assert answer.elapsed >= timedelta(seconds=0.3)
        assert quote(gateway, answer.json()["access_token"]).elapsed < timedelta(seconds=0.25)


def test_short_life_is_not_cut_by_whole_seconds() -> None:
    """A day counts from the whole second of the issue, as at KIS; a short life is lived to its end."""
    for life, expires in ((0.4, 1002), (2, 1003), (86400, 87400)):
        content = Gateway(Rules(token_life=life)).issue(credentials(), 1000.7).content
        assert claims_of(content["access_token"])["exp"] == expires


def test_expired_token_is_refused_and_replaced() -> None:
    """A token past its expiry is refused as expired, and tokenP does not hand it out again."""
    with Sandbox(token_life=0.1, issue_interval=0) as gateway:
        token = token_of(gateway)
        assert quote(gateway, token).status_code == 200
        time.sleep(max(0, claims_of(token)["exp"] - time.time()) + 0.02)
        expired = quote(gateway, token)
        assert (expired.status_code, expired.json()["msg_cd"]) == (500, "EGW00123")
        assert token_of(gateway) != token


def test_revoked_token_is_refused_and_handed_out_again() -> None:
    """A revoked token is dead for business calls, yet tokenP returns it until the six hours are over."""
    with Sandbox(issue_interval=0) as gateway:
        token = token_of(gateway)
        body = {"appkey": KEY, "appsecret": SECRET, "token": token}
        answer = post(gateway, "/oauth2/revokeP", body)
        assert answer.json() == {"code": 200, "message": "접근토큰 폐기에 성공하였습니다"}
        assert quote(gateway, token).json()["msg_cd"] == "EGW00121"
        assert token_of(gateway) == token
        again = post(gateway, "/oauth2/revokeP", body)
        assert (again.status_code, code_of(again)) == (403, "EGW00121")
        assert gateway.stats()["revokes"] == 1


def test_a_token_is_revoked_only_by_its_own_key(gateway: Sandbox) -> None:
    """Another customer's credentials, or a wrong secret, do not kill a token."""
    token = token_of(gateway)
    for body, code in (
        ({"appkey": "x" * 36, "appsecret": "y", "token": token}, "EGW00121"),
        ({"appkey": KEY, "appsecret": "y", "token": token}, "EGW00105"),
    ):
        assert code_of(post(gateway, "/oauth2/revokeP", body)) == code
    assert quote(gateway, token).status_code == 200


def test_approval_wants_the_secret_under_its_own_name(gateway: Sandbox) -> None:
    """Approval answers a key when the secret comes as `secretkey`, and refuses `appsecret`."""
    body = {"grant_type": "client_credentials", "appkey": KEY}
    assert len(post(gateway, "/oauth2/Approval", {**body, "secretkey": SECRET}).json()["approval_key"]) == 36
    assert code_of(post(gateway, "/oauth2/Approval", {**body, "appsecret": SECRET})) == "EGW00104"
    assert gateway.stats()["approvals"] == 1


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [(DOMESTIC, "stck_prpr", "71500"), (PRICE, "last", "231.1000")],
)
def test_quotes_answer_rows_of_text(gateway: Sandbox, path: str, field: str, value: str) -> None:
    """A price call with the right headers answers `rt_cd` 0 and a row of strings."""
    answer = quote(gateway, token_of(gateway), path)
    assert (answer.status_code, answer.json()["rt_cd"]) == (200, "0")
    assert answer.json()["output"][field] == value
    assert all(isinstance(each, str) for each in answer.json()["output"].values())


def test_order_codes_get_no_daily_rows_and_no_error(gateway: Sandbox) -> None:
    """Daily prices of NAS have rows; of NASD, its order code, none, and both say success."""
    token = token_of(gateway)
    quoted, ordered = (quote(gateway, token, DAILY, excd=code).json() for code in ("NAS", "NASD"))
    assert len(quoted["output2"]) == 5
    assert {"xymd", "open", "high", "low", "clos", "tvol"} <= quoted["output2"][0].keys()
    assert (ordered["rt_cd"], ordered["output2"]) == ("0", [])


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        pytest.param({"authorization": None}, "EGW00122", id="no bearer"),
        pytest.param({"authorization": "Bearer"}, "EGW00122", id="an empty bearer"),
        pytest.param({"authorization": "Bearer a.b.c"}, "EGW00121", id="a foreign token"),
        pytest.param({"appkey": "x"}, "EGW00103", id="another key than the token's"),
        pytest.param({"appsecret": None}, "EGW00105", id="no secret"),
        pytest.param({"tr_id": "HHDFS00000300"}, "EGW00203", id="another call's tr_id"),
    ],
)
def test_business_calls_check_their_headers(gateway: Sandbox, headers: dict[str, str | None], code: str) -> None:
    """A business call with a wrong header is refused with status 500 in the business shape."""
    answer = quote(gateway, token_of(gateway), changes=headers)
    assert (answer.status_code, answer.json()["rt_cd"], answer.json()["msg_cd"]) == (500, "1", code)
    assert answer.json()["msg1"]
    assert gateway.stats()["quotes_refused"] == {code: 1}


def test_killed_tokens_are_refused_until_a_new_one_is_due() -> None:
    """A dead token is refused, handed out again within the six hours, and replaced after them."""
    with Sandbox(issue_interval=0) as gateway:
        token = token_of(gateway)
        gateway.kill_tokens()
        assert quote(gateway, token).json()["msg_cd"] == "EGW00121"
        assert token_of(gateway) == token
        gateway.set_rules(same_token=0)
        assert quote(gateway, token_of(gateway)).status_code == 200


@pytest.mark.parametrize(
    ("mode", "status", "code"),
    [
        ("limit", 403, "EGW00133"),
        ("bad-key", 403, "EGW00103"),
        ("bad-secret", 403, "EGW00105"),
        ("server-error", 403, "EGW00002"),
        ("down", 500, "EGW00002"),
    ],
)
def test_refusals_on_request_last_as_long_as_asked(gateway: Sandbox, mode: str, status: int, code: str) -> None:
    """A refusal asked for once happens once, counts by its code and leaves the minute alone."""
    gateway.fail(mode, count=1)
    answer = issue(gateway)
    assert (answer.status_code, code_of(answer)) == (status, code)
    assert issue(gateway).status_code == 200
    assert gateway.stats()["refused"] == {code: 1}


@pytest.mark.parametrize("mode", ["drop", "hang", "half"])
def test_answers_that_never_arrive_whole_are_network_errors(gateway: Sandbox, mode: str) -> None:
    """A dropped, hanging or half answer ends in a client's network error, and grants nothing."""
    gateway.fail(mode, count=1)
    errors = {
        "drop": requests.ConnectionError,
        "hang": requests.ReadTimeout,
        "half": requests.exceptions.ChunkedEncodingError,
    }
    with pytest.raises(errors[mode]):
        issue(gateway, timeout=0.3)
    assert issue(gateway).status_code == 200
    assert gateway.stats()["failed"] == {mode: 1}


@pytest.mark.parametrize(("mode", "status"), [("html", 403), ("garbage", 200)])
def test_answers_that_are_no_json(gateway: Sandbox, mode: str, status: int) -> None:
    """A proxy's page and garbage arrive whole, and are no JSON."""
    gateway.fail(mode)
    answer = issue(gateway)
    assert answer.status_code == status
    assert answer.headers["Content-Type"].startswith("text/html" if mode == "html" else "application/json")
    with pytest.raises(requests.JSONDecodeError):
        answer.json()


def test_answer_without_a_token(gateway: Sandbox) -> None:
    """`no-token` answers success with everything but the token."""
    gateway.fail("no-token")
    answer = issue(gateway)
    assert (answer.status_code, answer.json()["token_type"]) == (200, "Bearer")
    assert "access_token" not in answer.json()


def test_answer_whose_expiry_is_past(gateway: Sandbox) -> None:
    """`past` answers a token whose expiry lies behind, whatever `expires_in` says; it is refused so."""
    gateway.fail("past")
    body = issue(gateway).json()
    expiry = datetime.strptime(body["access_token_token_expired"], "%Y-%m-%d %H:%M:%S").replace(tzinfo=KST)
    assert expiry.timestamp() == claims_of(body["access_token"])["exp"] < time.time()
    assert quote(gateway, body["access_token"]).json()["msg_cd"] == "EGW00123"


def test_huge_answer_has_64_megabytes(gateway: Sandbox, capfd: pytest.CaptureFixture[str]) -> None:
    """`huge` sends 64 MB of one JSON object, and a client that turns away is no reason for a traceback."""
    gateway.fail("huge", count=2)
    url = f"{gateway.url}/oauth2/tokenP"
    with requests.post(url, json=credentials(), timeout=5, stream=True) as answer:
        assert next(answer.iter_content(18)) == b'{"access_token": "'
    with requests.post(url, json=credentials(), timeout=5, stream=True) as answer:
        size = sum(len(chunk) for chunk in answer.iter_content(1 << 20))
    assert size == int(answer.headers["Content-Length"]) > 64 * 1024 * 1024
    assert issue(gateway).status_code == 200
    assert capfd.readouterr() == ("", "")


def test_redirect_leads_to_a_path_that_has_nothing(gateway: Sandbox) -> None:
    """`redirect` answers 302; a client that follows finds nothing there."""
    gateway.fail("redirect")
    answer = issue(gateway)
    assert answer.status_code == 302
    assert requests.get(gateway.url + answer.headers["Location"], timeout=5).status_code == 404


def test_drip_is_slow_but_true() -> None:
    """`drip` sends the real answer a byte at a time: no read times out, the whole takes many seconds."""
    with Sandbox() as gateway:
        gateway.fail("drip", count=1)
        url = f"{gateway.url}/oauth2/tokenP"
        start = time.monotonic()
        with requests.post(url, json=credentials(), timeout=0.5, stream=True) as answer:
            begun = b"".join(next(answer.iter_content(1)) for _ in range(18))
            assert int(answer.headers["Content-Length"]) > 400
        assert begun == b'{"access_token": "'
        assert 0.5 < time.monotonic() - start < 5
        assert code_of(issue(gateway)) == "EGW00133"
        assert gateway.stats()["granted_new"] == 1


def test_failures_are_driven_over_http(gateway: Sandbox) -> None:
    """Another process can ask for a failure, end it, kill the tokens and change a rule."""
    assert post(gateway, "/sandbox/fail", {"mode": "down", "count": None}).status_code == 200
    assert [issue(gateway).status_code for _ in range(2)] == [500, 500]
    post(gateway, "/sandbox/clear", {})
    token = token_of(gateway)
    post(gateway, "/sandbox/fail", {"mode": "dead-token"})
    assert quote(gateway, token).json()["msg_cd"] == "EGW00121"
    post(gateway, "/sandbox/rules", {"issue_interval": 0, "same_token": 0})
    assert quote(gateway, token_of(gateway)).status_code == 200
    stats = requests.get(f"{gateway.url}/sandbox/stats", timeout=5).json()
    assert stats == gateway.stats()
    assert (stats["rules"]["issue_interval"], stats["failure"]) == (0, None)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/sandbox/fail", {}),
        ("/sandbox/fail", {"mode": "sulk"}),
        ("/sandbox/fail", {"mode": ["limit"]}),
        ("/sandbox/fail", {"mode": "limit", "count": 0}),
        ("/sandbox/fail", {"mode": "limit", "count": True}),
        ("/sandbox/rules", {"token_life": 0}),
        ("/sandbox/rules", {"latency": -1}),
        ("/sandbox/rules", {"latency": "1"}),
        ("/sandbox/rules", {"latency": True}),
        ("/sandbox/rules", {"latency": 1e300}),
        ("/sandbox/rules", {"self": 1}),
        ("/sandbox/rules", {"lock": 1}),
    ],
)
def test_impossible_wishes_change_nothing(gateway: Sandbox, path: str, body: object) -> None:
    """A wish that makes no sense is answered 400 with a sentence, and the gateway is as it was."""
    before = gateway.stats()
    answer = post(gateway, path, body)
    assert answer.status_code == 400
    assert answer.json()["error"].endswith(".")
    assert gateway.stats() == before


def test_stats_and_log_hold_no_secret(capfd: pytest.CaptureFixture[str]) -> None:
    """After every kind of request neither the statistics nor the verbose log show token, key or secret."""
    with Sandbox(verbose=True, issue_interval=0) as gateway:
        token = token_of(gateway)
        quote(gateway, token)
        requests.get(f"{gateway.url}/oauth2/tokenP", params={"appkey": KEY, "appsecret": SECRET}, timeout=5)
        for body in ({"mode": "no-token", "count": 1}, {"mode": "half", "count": 1}):
            post(gateway, "/sandbox/fail", body)
            with pytest.raises((requests.RequestException, KeyError)):
                token_of(gateway)
        post(gateway, "/oauth2/Approval", {**credentials(), "secretkey": SECRET})
        post(gateway, "/oauth2/revokeP", {"appkey": KEY, "appsecret": SECRET, "token": token})
        issue(gateway, appsecret="wrong-" + SECRET)
        seen = json.dumps(gateway.stats()) + repr(gateway.stats())
    log = capfd.readouterr().err
    assert "POST /oauth2/tokenP new\n" in log
    assert "POST /oauth2/tokenP EGW00105\n" in log
    assert f"GET {DOMESTIC} ok\n" in log
    for secret in (KEY, SECRET, token, *token.split(".")[1:]):
        assert secret not in seen + log


def test_requests_are_listed_with_time_and_outcome(gateway: Sandbox) -> None:
    """The statistics tell when each tokenP request came, in epoch seconds, and what became of it."""
    before = time.time()
    issue(gateway)
    gateway.fail("html", count=1)
    issue(gateway)
    requests_seen = gateway.stats()["requests"]
    assert [each["outcome"] for each in requests_seen] == ["new", "html"]
    assert before <= requests_seen[0]["at"] <= requests_seen[1]["at"] <= time.time()


@pytest.mark.parametrize("mode", ["hang", "drip", "slow"])
def test_leaving_ends_port_connections_and_threads(mode: str) -> None:
    """When the block ends the gateway is gone, even for clients that are still connected or waiting."""
    before = set(threading.enumerate())
    with requests.Session() as session, ThreadPoolExecutor(1) as pool:
        with Sandbox(latency=60 if mode == "slow" else 0) as gateway:
            assert session.get(f"{gateway.url}/sandbox/stats", timeout=5).status_code == 200
            if mode in FAILURES:
                gateway.fail(mode)
            waiting = pool.submit(issue, gateway, timeout=30)
            while not gateway.stats()["requests"]:
                time.sleep(0.01)
        with pytest.raises(requests.RequestException):
            waiting.result(timeout=2)
        with pytest.raises(requests.ConnectionError):
            session.get(f"{gateway.url}/sandbox/stats", timeout=5)
    deadline = time.monotonic() + 2
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert set(threading.enumerate()) <= before


def test_taken_port_is_a_sentence(gateway: Sandbox) -> None:
    """A port that is in use, or is none at all, is a ConfigurationError that names the option."""
    for port in (int(gateway.url.rpartition(":")[2]), 70_000):
        with (
            pytest.raises(ConfigurationError, match=rf"^Port {port} of 127.0.0.1 .*--port\.$"),
            Sandbox(port=port),
        ):
            pass


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_command_says_how_to_point_the_settings_here(sign: signal.Signals) -> None:
    """The command prints settings that work with it, keeps the failure asked for, and ends with 0."""
    options = ["--port", "0", "--issue-interval", "0.5", "--fail", "limit", "--verbose"]
    command = [sys.executable, "-c", COMMAND, *options]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(command, stdout=PIPE, stderr=PIPE, text=True, env=environment) as process:
        assert process.stdout
        try:
            printed = list(takewhile(lambda line: "/sandbox/stats" not in line, process.stdout))
            exports = [line.removeprefix("export ") for line in printed if line.startswith("export ")]
            settings = dict(each.strip().split("=") for each in exports)
            body = credentials(appkey=settings["KIS_APP_KEY"], appsecret=settings["KIS_APP_SECRET"])
            answer = requests.post(f"{settings['KIS_BASE_URL']}/oauth2/tokenP", json=body, timeout=5)
            assert code_of(answer) == "EGW00133"
            process.send_signal(sign)
            rest, errors = process.communicate(timeout=5)
        finally:
            process.kill()
    assert (process.returncode, rest, errors) == (0, "", "POST /oauth2/tokenP EGW00133\n")
    assert all(mode in "".join(printed) for mode in (*FAILURES, "dead-token"))
    assert (len(APP_KEY), len(APP_SECRET)) == (36, 180)
