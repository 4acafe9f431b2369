"""KISAuth on real requests: its headers, its one retry, and where its secrets do not go."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import pytest
import requests
from running import asked, cached, folder, raised

from tokencore import ConfigurationError, IssuerUnavailableError, KISAuth, KRTokenManager, USTokenManager
from tokencore.sandbox import APP_KEY, APP_SECRET

if TYPE_CHECKING:
    from tokencore.sandbox import Sandbox

HOUR = 3600.0
PRICE = "/uapi/domestic-stock/v1/quotations/inquire-price"
TR_ID = {"tr_id": "FHKST01010100"}
SECRET_HEADERS = ("authorization", "appkey", "appsecret")


class Scripted:
    """A server on loopback that gives its answers in order, the last one for ever, and keeps what it was sent."""

    class Answer(NamedTuple):
        """Status, `msg_cd` of the JSON body, what the body is said to be, and where a redirect leads."""

        status: int = 200
        code: str = "MCA00000"
        kind: str = "application/json"
        location: str = ""

    def __init__(self, *answers: Answer) -> None:
        """Answer as told."""
        script, seen = list(answers), []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                headers = {name.lower(): value for name, value in self.headers.items()}
                seen.append((headers, self.rfile.read(length)))
                answer = script.pop(0) if len(script) > 1 else script[0]
                self.send_response(answer.status)
                self.send_header("Content-Type", answer.kind)
                self.send_header("Location", answer.location)
                self.end_headers()
                self.wfile.write(json.dumps({"rt_cd": "1", "msg_cd": answer.code}).encode())

            do_POST = do_GET  # noqa: N815 - the name http.server looks for

            def log_message(self, *_: object) -> None:
                """Silent."""

        self.seen: list[tuple[dict[str, str], bytes]] = seen
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._server.server_port}/uapi"


def price(gateway: Sandbox, **keywords: Any) -> requests.Response:  # noqa: ANN401 - requests' own keywords
    """A quote call, signed."""
    return requests.get(gateway.url + PRICE, auth=KISAuth("kr"), headers=TR_ID, timeout=5, **keywords)


def test_request_carries_token_key_secret_and_customer_type(gateway: Sandbox) -> None:
    """The four headers of KIS's business API; a customer type that the caller set himself is left as it is."""
    signed = requests.Request("GET", gateway.url, auth=KISAuth("us")).prepare().headers
    assert signed["authorization"] == f"Bearer {USTokenManager().get_valid_token()}"
    assert (signed["appkey"], signed["appsecret"], signed["custtype"]) == (APP_KEY, APP_SECRET, "P")
    firm = requests.Request("GET", gateway.url, auth=KISAuth("us", custtype="B")).prepare()
    own = requests.Request("GET", gateway.url, headers={"custtype": "B"}, auth=KISAuth("us")).prepare()
    assert firm.headers["custtype"] == own.headers["custtype"] == "B"
    assert asked(gateway) == 1


def test_business_call_succeeds_alone_and_in_a_session(gateway: Sandbox) -> None:
    """`auth=` on one request, or on a session for all of them."""
    assert price(gateway).json()["rt_cd"] == "0"
    with requests.Session() as session:
        session.auth = KISAuth("us")
        for _ in range(2):
            assert session.get(gateway.url + PRICE, headers=TR_ID, timeout=5).json()["rt_cd"] == "0"
    assert (gateway.stats()["quotes"], asked(gateway)) == (3, 1)


def test_rejected_token_is_renewed_and_the_request_repeated_once(gateway: Sandbox) -> None:
    """KIS no longer knows the token: the caller gets the second try's answer, with the first one in its history."""
    old = cached(17 * HOUR)
    seen: list[int] = []
    answer = price(gateway, hooks={"response": lambda response, **_: seen.append(response.status_code)})
    assert (answer.status_code, answer.json()["rt_cd"]) == (200, "0")
    assert [first.json()["msg_cd"] for first in answer.history] == ["EGW00121"]
    assert answer.request.headers["authorization"] != f"Bearer {old.access_token}"
    assert seen == [200]
    assert (asked(gateway), gateway.stats()["quotes"]) == (1, 1)
    assert price(gateway).json()["rt_cd"] == "0"
    assert asked(gateway) == 1


@pytest.mark.parametrize("code", ["EGW00121", "EGW00123"])
@pytest.mark.parametrize("status", [200, 500])
def test_dead_token_is_told_by_its_code_whatever_the_status(gateway: Sandbox, code: str, status: int) -> None:
    """Rejected or expired, with 500 or with 200: the request is sent again, body and all, with the successor."""
    old = cached(17 * HOUR)
    with Scripted(Scripted.Answer(status, code), Scripted.Answer()) as kis:
        answer = requests.post(kis.url, json={"order": 1}, auth=KISAuth("us"), timeout=5)
    assert answer.json()["msg_cd"] == "MCA00000"
    (first, body), (second, again) = kis.seen
    assert first["authorization"] == f"Bearer {old.access_token}"
    assert second["authorization"] == f"Bearer {USTokenManager().get_valid_token()}" != first["authorization"]
    assert body == again == b'{"order": 1}'
    assert asked(gateway) == 1


def test_second_rejection_is_the_callers(gateway: Sandbox) -> None:
    """KIS rejects the successor too: its answer is handed out, without a third try."""
    cached(17 * HOUR)
    with Scripted(Scripted.Answer(500, "EGW00121")) as kis:
        answer = requests.get(kis.url, auth=KISAuth("us"), timeout=5)
    assert (answer.status_code, answer.json()["msg_cd"]) == (500, "EGW00121")
    assert len(kis.seen) == 2
    assert asked(gateway) == 1


def test_young_rejected_token_has_no_successor_and_kiss_answer_is_handed_out(gateway: Sandbox) -> None:
    """Within six hours KIS would repeat the dead token: no request for one, no second try, and it is served no more."""
    price(gateway)
    gateway.kill_tokens()
    answer = price(gateway)
    assert answer.json()["msg_cd"] == "EGW00121"
    assert USTokenManager().get_token_status()["status"] == "REJECTED"
    assert (asked(gateway), gateway.stats()["quotes_refused"]) == (1, {"EGW00121": 1})


@pytest.mark.parametrize("code", ["EGW00201", "EGW00122", "EGW00002", "40310000"])
def test_other_refusals_say_nothing_about_the_token(gateway: Sandbox, code: str) -> None:
    """The call rate, a server fault, a refused order: one call, KIS's answer, and the token stays valid."""
    cached(17 * HOUR)
    with Scripted(Scripted.Answer(500, code)) as kis:
        assert requests.get(kis.url, auth=KISAuth("us"), timeout=5).json()["msg_cd"] == code
    assert len(kis.seen) == 1
    assert asked(gateway) == 0
    assert KRTokenManager().get_token_status()["status"] == "VALID"


def test_answer_that_is_no_json_is_not_read(gateway: Sandbox) -> None:
    """A streamed download is handed out unread."""
    cached(17 * HOUR)
    with Scripted(Scripted.Answer(code="EGW00121", kind="text/csv")) as kis:
        answer = requests.get(kis.url, auth=KISAuth("us"), stream=True, timeout=5)
        assert next(answer.iter_content(5)) == b'{"rt_'
    assert len(kis.seen) == 1
    assert asked(gateway) == 0


def test_redirect_takes_no_secret_with_it(gateway: Sandbox) -> None:
    """KIS never redirects; who does sees the request, and where it leads neither token, key nor secret arrives."""
    with Scripted(Scripted.Answer()) as elsewhere, Scripted(Scripted.Answer(302, location=elsewhere.url)) as first:
        requests.get(first.url, auth=KISAuth("us"), timeout=5)
    (arrived, _) = elsewhere.seen[0]
    assert not set(arrived) & set(SECRET_HEADERS)
    assert set(SECRET_HEADERS) <= set(first.seen[0][0])
    assert asked(gateway) == 1


def test_threads_that_meet_a_dead_token_renew_it_once(gateway: Sandbox) -> None:
    """Sixteen threads with one signer: all their calls succeed, and one token is issued."""
    cached(17 * HOUR)
    gateway.set_rules(latency=0.2)
    signer, told = KISAuth("kr"), []
    barrier = threading.Barrier(16)

    def call() -> None:
        barrier.wait()
        told.append(requests.get(gateway.url + PRICE, auth=signer, headers=TR_ID, timeout=10).json()["rt_cd"])

    threads = [threading.Thread(target=call) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told == ["0"] * 16
    assert asked(gateway) == 1


def test_without_a_token_nothing_is_sent(gateway: Sandbox) -> None:
    """Where no token can be had the package's error comes out of `requests.get`, before any business call."""
    gateway.fail("down")
    assert isinstance(raised(lambda: price(gateway)), IssuerUnavailableError)
    assert gateway.stats()["quotes_refused"] == {}
    assert not (folder() / "kr_api_token.json").exists()


def test_unknown_market_is_refused_when_the_signer_is_made() -> None:
    """A misspelt market fails where it is written."""
    assert isinstance(raised(lambda: KISAuth("hk")), ConfigurationError)
