"""The sandbox gateway: KIS's rules with a clock that is passed in, the rest over real HTTP, as a client asks KIS."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
from itertools import takewhile
from typing import Any

import pytest
import requests
from builders import KEY, SECRET

from tokencore.errors import ConfigurationError
from tokencore.sandbox import APP_KEY, APP_SECRET, Sandbox
from tokencore.sandbox.rules import APPROVAL, FAILURES, QUOTES, REVOKE, TEXTS, TOKEN, Answer, Gateway, Request
from tokencore.tokens import jwt_claims

DOMESTIC = next(iter(QUOTES))
OTHER = "요청하신 오류입니다."  # the sandbox's words for codes whose text it does not know
HOUR = 3600
GRANT: dict[str, Any] = {"grant_type": "client_credentials", "appkey": KEY, "appsecret": SECRET}


def headers(token: str) -> dict[str, str]:
    """The headers of a correct business call."""
    return {"authorization": f"Bearer {token}", "appkey": KEY, "appsecret": SECRET, "tr_id": QUOTES[DOMESTIC]}


def asked(gateway: Gateway, now: float, path: str = TOKEN, **changes: str) -> Answer:
    """The answer at a given time to a tokenP request, with changes to its body."""
    return gateway.respond(Request("POST", path, {**GRANT, **changes}), now)


def called(gateway: Gateway, now: float, token: str, **changes: str) -> Answer:
    """The answer at a given time to a business call, with changes to its headers."""
    return gateway.respond(Request("GET", DOMESTIC, headers={**headers(token), **changes}), now)


def issued(gateway: Gateway, now: float) -> str:
    """The token that tokenP returns at a given time."""
    content: Any = asked(gateway, now).content
    return str(content["access_token"])


def post(kis: Sandbox, path: str, body: object) -> requests.Response:
    """The answer to a POST of a JSON body."""
    return requests.post(kis.url + path, json=body, timeout=5)


def quote(kis: Sandbox, token: str) -> requests.Response:
    """The answer to a business call over HTTP."""
    return requests.get(kis.url + DOMESTIC, headers=headers(token), timeout=5)


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
    """A token is a JWT with the app key as `jti`; if it is handed out again, `expires_in` is overstated, as at KIS."""
    gateway = Gateway()
    first: Any = asked(gateway, 0).content
    token, claims = first["access_token"], jwt_claims(first["access_token"])
    assert (claims["iss"], claims["jti"], claims["iat"], claims["exp"]) == ("unogw", KEY, 0, 24 * HOUR)
    beside = {"access_token_token_expired": "1970-01-02 09:00:00", "expires_in": 24 * HOUR, "token_type": "Bearer"}
    assert first == {"access_token": token, **beside}
    assert asked(gateway, 5 * HOUR).content == first
    assert [called(gateway, now, token).outcome for now in (24 * HOUR - 1, 24 * HOUR)] == ["ok", "EGW00123"]
    assert issued(gateway, 24 * HOUR) != token


def test_a_dead_token_is_refused_and_handed_out_again() -> None:
    """A token revoked by its own key, or killed by maintenance, is refused, yet tokenP returns it for six hours."""
    gateway = Gateway()
    token = issued(gateway, 0)
    for change, code in (({"appkey": "x"}, "EGW00121"), ({"appsecret": "y"}, "EGW00105"), ({}, "ok"), ({}, "EGW00121")):
        assert (asked(gateway, 1, REVOKE, token=token, **change).outcome) == code
        assert called(gateway, 1, token).outcome == ("ok" if change else "EGW00121")
    assert issued(gateway, HOUR) == token
    other = issued(gateway, 7 * HOUR)
    gateway.kill_tokens()
    assert (called(gateway, 7 * HOUR, other).outcome, gateway.stats()["revokes"]) == ("EGW00121", 1)


BODIES = [("EGW00116", "grant_type", "password"), ("EGW00102", "appkey", ""), ("EGW00104", "appsecret", "")]
HEADERS = [("EGW00122", "authorization", ""), ("EGW00122", "authorization", "Bearer"), ("EGW00105", "appsecret", "")]
HEADERS += [("EGW00121", "authorization", "Bearer a.b.c"), ("EGW00103", "appkey", "x"), ("EGW00203", "tr_id", "x")]


def test_a_wrong_field_or_header_is_refused_in_kiss_shape_and_words() -> None:
    """A refusal by tokenP differs in shape and status from one of a business call."""
    gateway = Gateway()
    token = issued(gateway, 0)
    for code, field, text in [*BODIES, ("EGW00105", "appsecret", "not the first one of this key")]:
        content = {"error_description": TEXTS.get(code, OTHER), "error_code": code}
        assert asked(gateway, 60, **{field: text}) == Answer(403, content, code)
    for code, field, text in HEADERS:
        content = {"rt_cd": "1", "msg_cd": code, "msg1": TEXTS.get(code, OTHER)}
        assert called(gateway, 60, token, **{field: text}) == Answer(500, content, code)


def test_any_answer_can_be_scripted_for_a_path(gateway: Sandbox) -> None:
    """A path gives a scripted answer as often as wanted; of prefixes that match a path the longest counts."""
    token = issued(gateway, time.time())
    gateway.answer("/uapi/", {"rt_cd": "1", "msg_cd": "EGW00201"}, 500)
    assert post(gateway, "/sandbox/answer", {"path": DOMESTIC, "content": "<p>", "status": 503, "count": 1}).ok
    answer = quote(gateway, token)
    assert (answer.status_code, answer.text, answer.headers["Content-Type"][:9]) == (503, "<p>", "text/html")
    assert quote(gateway, token).json()["msg_cd"] == "EGW00201"
    assert post(gateway, "/sandbox/clear", {}).json() == {"ok": True}
    assert (post(gateway, "/uapi/order", {}).status_code, gateway.stats()["quotes_refused"]) == (404, {"EGW00201": 1})


def test_it_is_driven_over_http(gateway: Sandbox) -> None:
    """Another process can order failures, which start no minute, kill tokens, change rules and read the statistics."""
    post(gateway, "/sandbox/fail", {"mode": "limit", "count": 2})
    refused, again, granted = (post(gateway, TOKEN, GRANT) for _ in range(3))
    assert (refused.json()["error_code"], again.status_code, granted.status_code) == ("EGW00133", 403, 200)
    post(gateway, "/sandbox/fail", {"mode": "EGW00210"})
    assert post(gateway, TOKEN, GRANT).json()["error_code"] == "EGW00210"
    assert [one["outcome"] for one in gateway.stats()["requests"]] == ["EGW00133", "EGW00133", "new", "EGW00210"]
    post(gateway, "/sandbox/clear", {})
    post(gateway, "/sandbox/fail", {"mode": "dead-token"})
    post(gateway, "/sandbox/rules", {"issue_interval": 0, "same_token": 0})
    dead, fresh = quote(gateway, granted.json()["access_token"]), quote(gateway, issued(gateway, time.time()))
    assert (dead.status_code, fresh.status_code) == (500, 200)
    for path, fields in (("fail", {"mode": "x"}), ("rules", {"x": 1}), ("rules", {"latency": -1}), ("answer", {})):
        assert post(gateway, f"/sandbox/{path}", fields).status_code == 400
    stats = requests.get(f"{gateway.url}/sandbox/stats", timeout=5).json()
    assert (stats, stats["rules"]["issue_interval"]) == (gateway.stats(), 0)


def test_stats_and_log_hold_no_secret(gateway: Sandbox, capfd: pytest.CaptureFixture[str]) -> None:
    """After broken requests and a client that disconnects, the statistics show no secret, and nothing is printed."""
    token = issued(gateway, time.time())
    requests.get(gateway.url + TOKEN, params=GRANT, timeout=5)
    for body in (b"{not json", b"\xff\xfe", b"[" * 50_000, b"[1]"):
        assert requests.post(gateway.url + TOKEN, data=body, timeout=5).json()["error_code"] == "EGW00101"
    post(gateway, APPROVAL, {**GRANT, "secretkey": SECRET})
    gateway.fail("drip", 1)
    with requests.post(gateway.url + TOKEN, json=GRANT, timeout=5, stream=True) as answer:
        assert next(answer.iter_content(1)) == b"{"
    time.sleep(0.2)  # the next bytes meet a closed connection
    seen = json.dumps(gateway.stats()) + repr(vars(gateway)["_tokens"].values())
    assert [secret for secret in (KEY, SECRET, *token.split(".")[1:]) if secret in seen] == []
    assert capfd.readouterr() == ("", "")


def test_a_client_that_is_connected_gets_no_answer_any_more_when_the_block_ends() -> None:
    """A gateway that is down answers nobody, as KIS would, not even on a connection that has been kept open."""
    with requests.Session() as session:
        with Sandbox() as gateway:
            assert session.get(f"{gateway.url}/sandbox/stats", timeout=5).status_code == 200
        with pytest.raises(requests.ConnectionError):
            session.get(f"{gateway.url}/sandbox/stats", timeout=5)


def test_it_listens_on_loopback_alone_and_says_when_it_cannot(gateway: Sandbox) -> None:
    """As the sandbox has no password, it answers on no other address; a port in use is a ConfigurationError."""
    taken = int(gateway.url.rpartition(":")[2])
    with pytest.raises(OSError, match=r"refused|reach|timed out|assign"):
        socket.create_connection(("127.0.0.2", taken), timeout=2)  # answers if something listens everywhere
    with pytest.raises(ConfigurationError, match=rf"^Cannot listen on 127.0.0.1:{taken} "), Sandbox(port=taken):
        pass


def test_the_command_says_how_to_point_the_settings_here() -> None:
    """The command prints settings and a scripted answer that work as they stand, and ends with 0."""
    command = [sys.executable, "-m", "tokencore", "sandbox", "--port", "0"]
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            printed = "".join(takewhile(lambda line: "/sandbox/stats" not in line, process.stdout or ()))
            url, *credentials = re.findall(r"^export KIS_\w+=(.+)$", printed, re.MULTILINE)
            requests.post(url + "/sandbox/answer", data=re.findall(r"/answer -d '(.+)'", printed)[0], timeout=5)
            assert requests.get(url + DOMESTIC, timeout=5).json() == {"error_code": "EGW00121"}
            process.send_signal(signal.SIGTERM)
            assert (*process.communicate(timeout=5), process.returncode) == ("", "", 0)
        finally:
            process.kill()
    assert all(mode in printed for mode in (*FAILURES, "dead-token"))
    assert (credentials, len(APP_KEY), len(APP_SECRET)) == ([APP_KEY, APP_SECRET], 36, 180)
