"""The sandbox gateway: KIS's rules by a clock that is passed in, and the rest over real HTTP, as a client asks KIS."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import pytest
import requests
from running import until

from tokencore.errors import ConfigurationError
from tokencore.sandbox import APP_KEY, APP_SECRET, Sandbox
from tokencore.sandbox.rules import APPROVAL, FAILURES, QUOTES, REVOKE, TEXTS, TOKEN, Answer, Gateway, Request
from tokencore.tokens import jwt_claims

if TYPE_CHECKING:
    from collections.abc import Iterator

KEY, SECRET = "canary-key-" + "k" * 25, "canary-secret-" + "s" * 166
DOMESTIC, _, PRICE, _, DAILY = QUOTES
OTHER = "요청하신 오류입니다."  # KIS's words for codes that have none here
HOUR = 3600
GRANT: dict[str, Any] = {"grant_type": "client_credentials", "appkey": KEY, "appsecret": SECRET}


@pytest.fixture
def kis() -> Iterator[Sandbox]:
    """A gateway with KIS's own lengths."""
    with Sandbox() as running:
        yield running


def headers(token: str, path: str = DOMESTIC) -> dict[str, str]:
    """Those of a right business call."""
    return {"authorization": f"Bearer {token}", "appkey": KEY, "appsecret": SECRET, "tr_id": QUOTES[path]}


def post(kis: Sandbox, path: str, body: object, timeout: float = 5) -> requests.Response:
    """The answer to a JSON body, redirects not followed."""
    return requests.post(kis.url + path, json=body, timeout=timeout, allow_redirects=False)


def token_of(kis: Sandbox) -> str:
    """The token that tokenP grants."""
    token: str = post(kis, TOKEN, GRANT).json()["access_token"]
    return token


def quote(kis: Sandbox, token: str, path: str = DOMESTIC, excd: str = "NAS") -> requests.Response:
    """The answer of a business call."""
    params = {"EXCD": excd, "SYMB": "AAPL"} if path != DOMESTIC else {"FID_INPUT_ISCD": "005930"}
    return requests.get(kis.url + path, headers=headers(token, path), params=params, timeout=5)


# --- the rules


def asked(gateway: Gateway, now: float, path: str = TOKEN, **changes: str) -> Answer:
    """The answer at a time to tokenP's body, with changes."""
    return gateway.respond(Request("POST", path, {**GRANT, **changes}), now)


def called(gateway: Gateway, now: float, token: str) -> str:
    """The outcome of a business call at a time."""
    return gateway.respond(Request("GET", DOMESTIC, headers=headers(token)), now).outcome


def text_of(answer: Answer) -> str:
    """The token in it."""
    assert not isinstance(answer.content, str)
    text: str = answer.content["access_token"]
    return text


def test_the_minute_rolls_from_the_last_grant_and_the_six_hours_from_the_issue() -> None:
    """Refused requests do not prolong the wait, a token handed out again starts a new minute; each key has its own."""
    gateway = Gateway()
    outcomes = {now: asked(gateway, now).outcome for now in (0, 59, 60, 119, 120, 21_599, 21_600, 21_660)}
    assert list(outcomes.values()) == ["new", "EGW00133", "same", "EGW00133", "same", "same", "EGW00133", "new"]
    assert asked(gateway, 21_661, appkey="x" * 36).outcome == "new"
    stats = gateway.stats()
    assert (stats["token_requests"], stats["granted_new"], stats["granted_same"]) == (9, 3, 3)
    assert (stats["refused"], stats["requests"][1]) == ({"EGW00133": 3}, {"at": 59, "outcome": "EGW00133"})


def test_a_token_is_the_same_to_the_letter_for_six_hours_and_refused_after_its_day() -> None:
    """Handed out again, its `expires_in` is overstated, as at KIS; expired, it is refused as that and replaced.

    It is a JWT, whose `exp` is the expiry that stands beside it as text in KST, and whose `jti` is the app key.
    """
    gateway = Gateway()
    first = asked(gateway, 0)
    claims = jwt_claims(text_of(first))
    assert (claims["iss"], claims["jti"], claims["iat"], claims["exp"]) == ("unogw", KEY, 0, 24 * HOUR)
    told = {"access_token_token_expired": "1970-01-02 09:00:00", "expires_in": 24 * HOUR, "token_type": "Bearer"}
    assert first.content == {"access_token": text_of(first), **told}
    assert asked(gateway, 5 * HOUR).content == first.content
    assert [called(gateway, now, text_of(first)) for now in (24 * HOUR - 1, 24 * HOUR)] == ["ok", "EGW00123"]
    assert text_of(asked(gateway, 24 * HOUR)) != text_of(first)


def test_a_dead_token_is_refused_and_handed_out_again() -> None:
    """Revoked, by its own key only, or killed by maintenance, it is refused, yet tokenP returns it for six hours."""
    gateway = Gateway()
    token = text_of(asked(gateway, 0))
    for change, code in (({"appkey": "x" * 36}, "EGW00121"), ({"appsecret": "y"}, "EGW00105")):
        assert asked(gateway, 1, REVOKE, token=token, **change).outcome == code
    assert called(gateway, 1, token) == "ok"
    done, again = (asked(gateway, 1, REVOKE, token=token) for _ in range(2))
    assert (done.content, again.outcome) == ({"code": 200, "message": "접근토큰 폐기에 성공하였습니다"}, "EGW00121")
    assert (called(gateway, 2, token), gateway.stats()["revokes"]) == ("EGW00121", 1)
    assert text_of(asked(gateway, HOUR)) == token
    other = text_of(asked(gateway, 7 * HOUR))
    gateway.kill_tokens()
    assert (called(gateway, 7 * HOUR, other), gateway.stats()["quotes_refused"]) == ("EGW00121", {"EGW00121": 2})


BODIES = {"EGW00116": {"grant_type": "password"}, "EGW00102": {"appkey": ""}, "EGW00104": {"appsecret": ""}}
BODIES |= {"EGW00105": {"appsecret": "not the first one of this key"}}
HEADERS = [("EGW00122", {"authorization": ""}), ("EGW00122", {"authorization": "Bearer"})]
HEADERS += [("EGW00121", {"authorization": "Bearer a.b.c"}), ("EGW00103", {"appkey": "not the token's"})]
HEADERS += [("EGW00105", {"appsecret": ""}), ("EGW00203", {"tr_id": "HHDFS00000300"})]


def test_a_wrong_field_or_header_is_refused_in_kiss_shape_and_words() -> None:
    """A refusal of tokenP has another shape and status than one of a business call."""
    gateway = Gateway()
    token = text_of(asked(gateway, 0))
    for code, changes in BODIES.items():
        content = {"error_description": TEXTS.get(code, OTHER), "error_code": code}
        assert asked(gateway, 60, **changes) == Answer(403, content, code)
    for code, changes in HEADERS:
        answer = gateway.respond(Request("GET", DOMESTIC, headers={**headers(token), **changes}), 60)
        assert answer == Answer(500, {"rt_cd": "1", "msg_cd": code, "msg1": TEXTS.get(code, OTHER)}, code)


# --- over HTTP


def test_64_requests_at_once_are_granted_one_token(kis: Sandbox) -> None:
    """However many ask in one instant, one is granted and the others are refused; `latency` delays them all."""
    kis.set_rules(latency=0.3)
    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(lambda _: post(kis, TOKEN, GRANT, timeout=15), range(64)))
    assert sorted(answer.status_code for answer in answers) == [200] + [403] * 63
    assert min(answer.elapsed.total_seconds() for answer in answers) >= 0.3
    assert (kis.stats()["granted_new"], kis.stats()["refused"]) == (1, {"EGW00133": 63})


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
    assert (ordered["rt_cd"], ordered["output2"], kis.stats()["quotes"]) == ("0", [], len(QUOTES) + 1)


# --- its failures


@pytest.mark.parametrize("mode", ["limit", "EGW00210", "html", "drop"])
def test_failures_on_request_last_as_long_as_asked(kis: Sandbox, mode: str) -> None:
    """A failure happens twice if asked for twice, is counted by its name or code, and leaves the minute alone."""
    kis.fail(mode, count=2)
    for _ in range(2):
        with contextlib.suppress(requests.ConnectionError):
            assert "access_token" not in post(kis, TOKEN, GRANT).text
    assert post(kis, TOKEN, GRANT).status_code == 200
    stats, counted = kis.stats(), {"limit": "EGW00133"}.get(mode, mode)
    assert {**stats["refused"], **stats["failed"]} == {counted: 2}
    assert [one["outcome"] for one in stats["requests"]] == [counted, counted, "new"]


def test_any_answer_can_be_scripted_for_a_path(kis: Sandbox) -> None:
    """A path answers just what a test wants, as often as wanted; of paths that begin alike the longest counts."""
    scripted: list[tuple[dict[str, str] | str, int]] = [({"error_code": "EGW00121"}, 401), ("<p>점검 중</p>", 503)]
    token = token_of(kis)
    kis.answer("/uapi/", {"rt_cd": "1", "msg_cd": "EGW00201"}, 500)
    for content, status in scripted:
        wish = {"path": PRICE, "content": content, "status": status, "count": 1}
        assert post(kis, "/sandbox/answer", wish).json() == {"ok": True}
        assert post(kis, "/uapi/order", {}).json()["msg_cd"] == "EGW00201"
        answer = quote(kis, token, PRICE)
        assert (answer.status_code, answer.text if isinstance(content, str) else answer.json()) == (status, content)
        assert quote(kis, token, PRICE).json()["msg_cd"] == "EGW00201"
    assert kis.stats()["quotes_refused"] == {"EGW00121": 1, "EGW00201": 4}
    assert post(kis, "/sandbox/clear", {}).json() == {"ok": True}
    assert post(kis, "/uapi/order", {}).status_code == 404


def test_it_is_driven_over_http(kis: Sandbox) -> None:
    """Another process can ask for a failure, kill the tokens, change a rule and read what happened."""
    post(kis, "/sandbox/fail", {"mode": "down", "count": 1})
    assert post(kis, TOKEN, GRANT).status_code == 500
    token = token_of(kis)
    post(kis, "/sandbox/fail", {"mode": "dead-token"})
    assert quote(kis, token).json()["msg_cd"] == "EGW00121"
    post(kis, "/sandbox/rules", {"issue_interval": 0, "same_token": 0})
    assert quote(kis, token_of(kis)).status_code == 200
    stats = requests.get(f"{kis.url}/sandbox/stats", timeout=5).json()
    assert (stats, stats["rules"]["issue_interval"]) == (kis.stats(), 0)


def test_stats_and_log_hold_no_secret(kis: Sandbox, capfd: pytest.CaptureFixture[str]) -> None:
    """After every kind of request, and a client that turns away, the statistics show no secret; nothing is printed."""
    token = token_of(kis)
    quote(kis, token)
    requests.get(kis.url + TOKEN, params={"appkey": KEY, "appsecret": SECRET}, timeout=5)
    for body in (b"{not json", b"\xff\xfe", b"[" * 50_000, b"[1]"):
        assert requests.post(kis.url + TOKEN, data=body, timeout=5).json()["error_code"] == "EGW00101"
    assert post(kis, APPROVAL, GRANT).json()["error_code"] == "EGW00104"  # it wants `secretkey`
    assert len(post(kis, APPROVAL, {**GRANT, "secretkey": SECRET}).json()["approval_key"]) == 36
    post(kis, REVOKE, {**GRANT, "token": token})
    post(kis, TOKEN, {**GRANT, "appsecret": f"wrong-{SECRET}"})
    kis.fail("drip", 1)
    with requests.post(kis.url + TOKEN, json=GRANT, timeout=5, stream=True) as answer:
        assert next(answer.iter_content(1)) == b"{"
    time.sleep(0.2)  # the next bytes meet a closed connection
    seen = json.dumps(kis.stats()) + repr(vars(kis)["_tokens"].values())
    assert [secret for secret in (KEY, SECRET, *token.split(".")[1:]) if secret in seen] == []
    assert capfd.readouterr() == ("", "")


# --- its life


@pytest.mark.parametrize("mode", ["hang", "drip", "slow"])
def test_leaving_ends_port_answers_and_threads(mode: str) -> None:
    """When the block ends the gateway is gone, even for clients that are still connected or waiting."""
    before = set(threading.enumerate())
    with requests.Session() as session, ThreadPoolExecutor(1) as pool:
        with Sandbox(latency=60 if mode == "slow" else 0) as gateway:
            assert session.get(f"{gateway.url}/sandbox/stats", timeout=5).status_code == 200
            if mode in FAILURES:
                gateway.fail(mode)
            waiting = pool.submit(post, gateway, TOKEN, GRANT, timeout=30)
            until(lambda: bool(gateway.stats()["requests"]))
        with pytest.raises(requests.RequestException):
            waiting.result(timeout=2)
        for _ in range(2):  # the kept connection, and a new one
            with pytest.raises(requests.ConnectionError):
                session.get(f"{gateway.url}/sandbox/stats", timeout=5)
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
            body = {**GRANT, "appkey": key, "appsecret": secret}
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
