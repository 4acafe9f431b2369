"""What both twins do alike: their headers, their one retry, and where their secrets do not go."""

from __future__ import annotations

import asyncio
import pickle
import ssl
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

import httpx
import pytest
import requests
from builders import CANARIES, KEY, SECRET
from running import asked, cached, raised
from scripted import Scripted

from tokencore import ConfigurationError, IssuerUnavailableError, KISAuth, KISHttpxAuth, KRTokenManager, USTokenManager
from tokencore.sandbox import APP_KEY, APP_SECRET

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tokencore.sandbox import Sandbox

    Send = Callable[..., "Got"]

HOUR = 3600.0
PRICE = "/uapi/domestic-stock/v1/quotations/inquire-price"
TR_ID = {"tr_id": "FHKST01010100"}
SECRET_HEADERS = {"authorization", "appkey", "appsecret"}
Answer = Scripted.Answer
CLIENT: dict[str, Any] = {"trust_env": False, "follow_redirects": True, "verify": ssl.create_default_context()}


class Got(NamedTuple):
    """What the caller has in the end: status, `msg_cd`, and those of the answers before."""

    status: int
    code: str
    before: list[str]


def by_requests(url: str, auth: Any = None, **keywords: Any) -> Got:  # noqa: ANN401 - requests' own keywords
    """By requests."""
    method = "POST" if {"json", "data"} & set(keywords) else "GET"
    answer = requests.request(method, url, auth=auth or KISAuth("us"), timeout=5, **keywords)
    return Got(answer.status_code, answer.json()["msg_cd"], [one.json()["msg_cd"] for one in answer.history])


def by_httpx(url: str, auth: Any = None, **keywords: Any) -> Got:  # noqa: ANN401 - httpx' own keywords
    """By httpx, from a thread."""
    keywords = {"content" if name == "data" else name: value for name, value in keywords.items()}
    method = "POST" if {"json", "content"} & set(keywords) else "GET"
    with httpx.Client(auth=auth or KISHttpxAuth("us"), **CLIENT) as client:
        answer = client.request(method, url, **keywords)
    return Got(answer.status_code, answer.json()["msg_cd"], [one.json()["msg_cd"] for one in answer.history])


def by_loop(url: str, auth: Any = None, **keywords: Any) -> Got:  # noqa: ANN401 - httpx' own keywords
    """By httpx, from an event loop."""
    if "data" in keywords:
        keywords["content"] = _drawn(keywords.pop("data"))

    async def send() -> Got:
        method = "POST" if {"json", "content"} & set(keywords) else "GET"
        async with httpx.AsyncClient(auth=auth or KISHttpxAuth("us"), **CLIENT) as client:
            answer = await client.request(method, url, **keywords)
        return Got(answer.status_code, answer.json()["msg_cd"], [one.json()["msg_cd"] for one in answer.history])

    return asyncio.run(send())


async def _drawn(pieces: Iterator[bytes]) -> Any:  # noqa: ANN401 - an async generator
    for piece in pieces:
        yield piece


@pytest.fixture(params=[by_requests, by_httpx, by_loop], ids=lambda function: function.__name__)
def send(request: pytest.FixtureRequest) -> Send:
    """Each way to send a signed request."""
    found: Send = request.param
    return found


@pytest.fixture
def kis(gateway: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Scripted]]:
    """Starts a KIS with a script; the settings point to it."""
    with ExitStack() as running:

        def started(*answers: Answer) -> Scripted:
            server = running.enter_context(Scripted(gateway, *answers))
            monkeypatch.setenv("KIS_BASE_URL", server.url)
            return server

        yield started


def test_request_carries_token_key_secret_and_customer_type(kis: Callable[..., Scripted], send: Send) -> None:
    """The four headers of KIS's business API; a customer type that the caller set himself is left as it is."""
    server = kis()
    send(server.url)
    send(server.url, headers={"custtype": "B", "appkey": "mine"})
    (first, _), (second, _) = server.seen
    assert first["authorization"] == second["authorization"] == f"Bearer {USTokenManager().get_valid_token()}"
    assert (first["appkey"], first["appsecret"], first["custtype"]) == (APP_KEY, APP_SECRET, "P")
    assert (second["appkey"], second["appsecret"], second["custtype"]) == (APP_KEY, APP_SECRET, "B")


@pytest.mark.parametrize("code", ["EGW00121", "EGW00123"])
@pytest.mark.parametrize("status", [200, 500])
def test_dead_token_is_told_by_its_code_whatever_the_status(
    gateway: Sandbox, kis: Callable[..., Scripted], send: Send, code: str, status: int
) -> None:
    """Rejected or expired, with 500 or with 200: the request is sent again, body and all, with the successor."""
    server = kis(Answer(status, code), Answer())
    old = cached(17 * HOUR)
    assert send(server.url, json={"order": 1}) == Got(200, "MCA00000", [code])
    (first, body), (second, again) = server.seen
    assert first["authorization"] == f"Bearer {old.access_token}"
    assert second["authorization"] == f"Bearer {USTokenManager().get_valid_token()}" != first["authorization"]
    assert body == again
    assert b'"order"' in body
    assert asked(gateway) == 1


def test_second_rejection_is_the_callers(gateway: Sandbox, kis: Callable[..., Scripted], send: Send) -> None:
    """KIS rejects the successor too: its answer is handed out, without a third try."""
    server = kis(Answer(500, "EGW00121"))
    cached(17 * HOUR)
    assert send(server.url) == Got(500, "EGW00121", ["EGW00121"])
    assert len(server.seen) == 2
    assert asked(gateway) == 1


def test_body_that_cannot_be_sent_again_is_not_but_the_token_is_reported(
    gateway: Sandbox, kis: Callable[..., Scripted], send: Send
) -> None:
    """A generator is used up by the first try: KIS's answer is handed out, and the next request has the successor."""
    server = kis(Answer(500, "EGW00123"), Answer())
    old = cached(17 * HOUR)
    assert send(server.url, data=iter([b'{"order":', b" 1}"])) == Got(500, "EGW00123", [])
    assert server.seen[0][1] == b'{"order": 1}'
    assert asked(gateway) == 1
    assert USTokenManager().get_valid_token() != old.access_token
    assert send(server.url).status == 200


@pytest.mark.parametrize("code", ["EGW00201", "EGW00122", "EGW00002", "40310000"])
def test_other_refusals_say_nothing_about_the_token(
    gateway: Sandbox, kis: Callable[..., Scripted], send: Send, code: str
) -> None:
    """The call rate, a server fault, a refused order: one call, KIS's answer, and the token stays valid."""
    server = kis(Answer(500, code))
    cached(17 * HOUR)
    assert send(server.url) == Got(500, code, [])
    assert len(server.seen) == 1
    assert asked(gateway) == 0
    assert KRTokenManager().get_token_status()["status"] == "VALID"


def test_young_rejected_token_has_no_successor_and_kiss_answer_is_handed_out(gateway: Sandbox, send: Send) -> None:
    """Within six hours KIS would repeat the dead token: no request for one, no second try, and it is served no more."""
    assert send(gateway.url + PRICE, headers=TR_ID).status == 200
    gateway.kill_tokens()
    assert send(gateway.url + PRICE, headers=TR_ID).code == "EGW00121"
    assert USTokenManager().get_token_status()["status"] == "REJECTED"
    assert (asked(gateway), gateway.stats()["quotes_refused"]) == (1, {"EGW00121": 1})


def test_redirect_takes_no_secret_with_it(gateway: Sandbox, kis: Callable[..., Scripted], send: Send) -> None:
    """KIS never redirects; who does sees the request, and where it leads neither token, key nor secret arrives."""
    with Scripted(gateway) as elsewhere:
        first = kis(Answer(302, location=elsewhere.url))
        send(first.url)
    assert not set(elsewhere.seen[0][0]) & SECRET_HEADERS
    assert set(first.seen[0][0]) >= SECRET_HEADERS


def test_redirect_of_the_second_try_takes_no_secret_with_it(
    gateway: Sandbox, kis: Callable[..., Scripted], send: Send
) -> None:
    """Nor does one that answers the request with the successor."""
    with Scripted(gateway) as elsewhere:
        first = kis(Answer(500, "EGW00121"), Answer(302, location=elsewhere.url))
        cached(17 * HOUR)
        send(first.url)
    assert len(first.seen) == 2
    assert not set(elsewhere.seen[0][0]) & SECRET_HEADERS


@pytest.mark.parametrize(
    "address",
    [
        "http://localhost:{port}/uapi",
        "http://127.0.0.1:9/uapi",
        "https://127.0.0.1:{port}/uapi",
        "http://127.0.0.1:{port}@localhost:9/uapi",
        "http://openapi.koreainvestment.com:9443/uapi",
    ],
)
def test_credentials_do_not_go_to_another_address(gateway: Sandbox, send: Send, address: str) -> None:
    """Another host, port or scheme than the base URL's: a sentence that names both, and nothing is sent or issued."""
    port = gateway.url.rpartition(":")[2]
    error = raised(lambda: send(address.format(port=port)))
    assert isinstance(error, ConfigurationError)
    assert gateway.url in str(error)
    assert asked(gateway) == 0


def test_address_is_the_same_however_it_is_spelt(gateway: Sandbox, send: Send, monkeypatch: pytest.MonkeyPatch) -> None:
    """Capital letters and a path in the base URL, capital letters in the request's: the same scheme, host and port."""
    port = gateway.url.rpartition(":")[2]
    monkeypatch.setenv("KIS_BASE_URL", f"http://LocalHost:{port}")
    assert send(f"HTTP://LOCALHOST:{port}{PRICE}", headers=TR_ID).status == 200


def test_without_a_token_nothing_is_sent(gateway: Sandbox, send: Send) -> None:
    """Where no token can be had the package's error comes out of the call, before any business call."""
    gateway.fail("down")
    assert isinstance(raised(lambda: send(gateway.url + PRICE)), IssuerUnavailableError)
    assert gateway.stats()["quotes_refused"] == {}


@pytest.mark.parametrize("twin", [KISAuth, KISHttpxAuth])
def test_twin_that_has_signed_shows_no_secret(
    gateway: Sandbox, monkeypatch: pytest.MonkeyPatch, twin: type[KISAuth | KISHttpxAuth]
) -> None:
    """Neither its repr, nor its attributes, nor a pickle has one."""
    monkeypatch.setenv("KIS_APP_KEY", KEY)
    monkeypatch.setenv("KIS_APP_SECRET", SECRET)
    auth = twin("us")
    (by_requests if twin is KISAuth else by_httpx)(gateway.url + PRICE, auth, headers=TR_ID)
    shown = f"{auth!r} {vars(auth)}"
    assert not any(canary in shown for canary in CANARIES)
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(auth)


@pytest.mark.parametrize("twin", [KISAuth, KISHttpxAuth])
def test_unknown_market_is_refused_when_the_twin_is_made(twin: type[KISAuth | KISHttpxAuth]) -> None:
    """A misspelt market fails where it is written."""
    assert isinstance(raised(lambda: twin("hk")), ConfigurationError)
